//! Disks in QEMU's words, and where each of them is. Pure.
//!
//! A disk is a node of QEMU's (the file), a descriptor set through which that opens it, and a device: a PCI device of its
//! own, or a unit of one SCSI controller, which takes one place for all of them. One that is memory of the guest (`pmem`) has
//! no node.

use serde_json::{Value, json};

use super::accelerator::Accelerator;
use super::device::{Options, at};
use super::pci::Slot;
use super::pmem;
use crate::{Address, Disk, Error};

/// How the guest has its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskDriver {
    /// virtio-blk: a PCI device each.
    #[default]
    Block,
    /// virtio-scsi: units of one controller.
    Scsi,
    /// virtio-pmem: memory, a PCI device each; as [`Self::Block`] what cannot be that.
    Pmem,
}

/// How QEMU works with the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSettings {
    /// How the guest has them.
    pub driver: DiskDriver,
    /// QEMU's `aio`: `threads`, `native` or `io_uring`.
    pub aio: &'static str,
    /// Past the host's page cache.
    pub direct: bool,
    /// The guest's flushes are ignored.
    pub no_flush: bool,
    /// Bytes; 0 is QEMU's.
    pub logical_sector: u32,
    /// Bytes; 0 is QEMU's.
    pub physical_sector: u32,
}

impl Default for DiskSettings {
    fn default() -> Self {
        Self {
            driver: DiskDriver::default(),
            aio: "threads",
            direct: false,
            no_flush: false,
            logical_sector: 0,
            physical_sector: 0,
        }
    }
}

/// The controller's name, when there is one.
pub(super) const CONTROLLER: &str = "scsi";
/// Units of it: as many as every guest finds.
const MOST_UNITS: u16 = 256;

/// Where a VM has no more places for disks, there is another way.
pub(super) const MORE: &str =
    "block_device_driver = \"virtio-scsi\" has room for 256 disks, \"virtio-blk\" for 30 with the network cards";

/// The disks of a VM.
#[derive(Debug, Default)]
pub(super) struct Disks {
    sets: u32,
    all: Vec<Known>,
    /// How much can be memory, bytes.
    pub(super) room: u64,
    /// The controller is there.
    pub(super) controller: bool,
}

#[derive(Debug)]
struct Known {
    id: String,
    set: u32,
    frontend: Frontend,
}

/// How the guest has one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frontend {
    /// A PCI device.
    Pci,
    /// A unit of the controller.
    Unit(u16),
    /// Memory of so many bytes, a PCI device too.
    Memory(u64),
}

impl Disks {
    /// None yet; so much can be memory.
    pub(super) fn with_room(room: u64) -> Self {
        Self { room, ..Self::default() }
    }

    /// A set's number, never given twice, and how the guest is to have the disk.
    pub(super) fn add(&mut self, disk: &Disk, driver: DiskDriver) -> Result<(u32, Frontend), Error> {
        let frontend = match driver {
            DiskDriver::Block => Frontend::Pci,
            DiskDriver::Scsi => {
                let is_free = |unit: &u16| self.all.iter().all(|disk| disk.frontend != Frontend::Unit(*unit));
                let unit = (0..MOST_UNITS)
                    .find(is_free)
                    .ok_or_else(|| Error::NoSlot { device: disk.id.clone(), remedy: "" })?;
                Frontend::Unit(unit)
            }
            DiskDriver::Pmem => self.memory(disk),
        };
        self.sets += 1;
        self.all.push(Known { id: disk.id.clone(), set: self.sets, frontend });
        Ok((self.sets, frontend))
    }

    fn memory(&self, disk: &Disk) -> Frontend {
        let used = self.all.iter().filter_map(|known| match known.frontend {
            Frontend::Memory(bytes) => Some(bytes),
            _ => None,
        });
        match pmem::obstacle(disk.bytes, self.room, used) {
            None => Frontend::Memory(disk.bytes),
            Some(why) => {
                tracing::warn!(disk = disk.id, why, "a disk cannot be persistent memory: using virtio-blk");
                Frontend::Pci
            }
        }
    }

    /// A disk's set and frontend.
    pub(super) fn find(&self, id: &str) -> Option<(u32, Frontend)> {
        self.all.iter().find(|disk| disk.id == id).map(|disk| (disk.set, disk.frontend))
    }

    pub(super) fn remove(&mut self, id: &str) {
        self.all.retain(|disk| disk.id != id);
    }

    /// Where it is, on the controller or at `place`.
    pub(super) fn address(&self, id: &str, place: Option<Slot>) -> Option<Address> {
        match self.find(id)?.1 {
            Frontend::Unit(lun) => Some(Address::Scsi { id: 0, lun }),
            Frontend::Pci | Frontend::Memory(_) => place.map(|place| Address::Pci(place.guest_path())),
        }
    }
}

/// The node's name.
pub(super) fn node_name(id: &str) -> String {
    format!("{id}-host")
}

/// For `blockdev-add` and `-blockdev`: the file of a descriptor set.
pub(super) fn node(disk: &Disk, set: u32, settings: &DiskSettings) -> Value {
    let kind = nix::sys::stat::fstat(&disk.file).map_or(0, |stat| stat.st_mode) & libc::S_IFMT;
    json!({
        "driver": if kind == libc::S_IFBLK { "host_device" } else { "file" },
        "node-name": node_name(&disk.id),
        "filename": format!("/dev/fdset/{set}"),
        "read-only": disk.read_only,
        "aio": settings.aio,
        "cache": {"direct": settings.direct, "no-flush": settings.no_flush},
        // what the guest gives back is free on the host
        "discard": if disk.read_only { "ignore" } else { "unmap" },
    })
}

/// For `-add-fd`.
pub(super) fn set_line(fd: i32, set: u32) -> String {
    format!("fd={fd},set={set}")
}

/// The controller of all SCSI units.
pub(super) fn controller(place: Option<Slot>) -> Options {
    let mut options = vec![("driver", json!("virtio-scsi-pci")), ("id", json!(CONTROLLER)), ("romfile", json!(""))];
    at(&mut options, place);
    Options(options)
}

/// The guest's side.
///
/// Under TCG the thread of the guest's processor passes a request on to the threads that do it: to wake QEMU's loop for that
/// takes the lock that both want from one to the other and back, 5 to 7 % of a request of 4 KiB. Under KVM the kernel wakes
/// the loop by itself, and the processor is in the guest meanwhile.
pub(super) fn device(
    disk: &Disk,
    frontend: Frontend,
    place: Option<Slot>,
    settings: &DiskSettings,
    accelerator: Accelerator,
) -> Options {
    let driver = match frontend {
        Frontend::Memory(_) => return pmem::device(&disk.id, &node_name(&disk.id), place),
        Frontend::Unit(_) => "scsi-hd",
        Frontend::Pci => "virtio-blk-pci",
    };
    let mut options = vec![("driver", json!(driver)), ("id", json!(disk.id)), ("drive", json!(node_name(&disk.id)))];
    for (name, size) in
        [("logical_block_size", settings.logical_sector), ("physical_block_size", settings.physical_sector)]
    {
        if size > 0 {
            options.push((name, json!(size)));
        }
    }
    if disk.shared {
        options.push(("share-rw", json!(true)));
    }
    // QEMU's own way is to stop the guest when the host's disk is full, until somebody sees it
    options.extend([("werror", json!("report")), ("rerror", json!("report"))]);
    if let Frontend::Unit(unit) = frontend {
        options.extend([("bus", json!(format!("{CONTROLLER}.0"))), ("scsi-id", json!(0)), ("lun", json!(unit))]);
    } else {
        if accelerator == Accelerator::Tcg {
            options.push(("ioeventfd", json!(false)));
        }
        at(&mut options, place);
    }
    Options(options)
}

#[cfg(test)]
mod tests {
    use super::super::pci::Bridge;
    use super::*;

    fn disk(read_only: bool, shared: bool) -> Disk {
        sized("disk1", 1 << 20, read_only, shared)
    }

    fn sized(id: &str, bytes: u64, read_only: bool, shared: bool) -> Disk {
        Disk { id: id.into(), file: tempfile::tempfile().expect("a file").into(), bytes, read_only, shared }
    }

    #[test]
    fn a_disk_of_its_own() {
        let mut disks = Disks::default();
        let place = Bridge::new().take("disk1");
        let (set, frontend) = disks.add(&disk(true, false), DiskDriver::Block).expect("room");
        let settings = DiskSettings { aio: "io_uring", logical_sector: 4096, ..DiskSettings::default() };
        let one = disk(true, false);
        let node = node(&one, set, &settings);
        assert_eq!((node["filename"].as_str(), node["driver"].as_str()), (Some("/dev/fdset/1"), Some("file")));
        assert_eq!((node["read-only"].as_bool(), node["aio"].as_str()), (Some(true), Some("io_uring")));
        assert_eq!(
            device(&one, frontend, place, &settings, Accelerator::Kvm).line(),
            "virtio-blk-pci,id=disk1,drive=disk1-host,logical_block_size=4096,werror=report,rerror=report,bus=plug,addr=0x1"
        );
        assert_eq!(
            device(&one, frontend, place, &settings, Accelerator::Tcg).line(),
            "virtio-blk-pci,id=disk1,drive=disk1-host,logical_block_size=4096,werror=report,rerror=report,ioeventfd=off,bus=plug,addr=0x1"
        );
        assert_eq!(disks.address("disk1", place), Some(Address::Pci("1e/01".into())));
        assert_eq!(disks.address("disk2", place), None);
    }

    #[test]
    fn units_of_one_controller() {
        let mut disks = Disks::default();
        for id in ["disk1", "disk2"] {
            disks.add(&sized(id, 1, false, false), DiskDriver::Scsi).expect("room");
        }
        disks.remove("disk1");
        // a set that QEMU may still hold is not used again, a unit is
        let third = disks.add(&sized("disk3", 1, false, false), DiskDriver::Scsi).expect("room");
        assert_eq!(third, (3, Frontend::Unit(0)));
        assert_eq!(disks.address("disk2", None), Some(Address::Scsi { id: 0, lun: 1 }));
        assert_eq!(
            device(&disk(false, true), Frontend::Unit(7), None, &DiskSettings::default(), Accelerator::Tcg).line(),
            "scsi-hd,id=disk1,drive=disk1-host,share-rw=on,werror=report,rerror=report,bus=scsi.0,scsi-id=0,lun=7"
        );
        for number in 0..MOST_UNITS - 2 {
            disks.add(&sized(&format!("more{number}"), 1, false, false), DiskDriver::Scsi).expect("room");
        }
        disks.add(&sized("last", 1, false, false), DiskDriver::Scsi).expect_err("no unit is left");
    }

    #[test]
    fn what_cannot_be_memory_is_a_disk() {
        let mut disks = Disks::with_room(4 << 20);
        let mut bridge = Bridge::new();
        for (id, bytes, frontend) in [
            ("disk1", 2 << 20, Frontend::Memory(2 << 20)),
            ("disk2", (2 << 20) + 512, Frontend::Pci),
            ("disk3", 4 << 20, Frontend::Pci),
            ("disk4", 2 << 20, Frontend::Memory(2 << 20)),
        ] {
            let place = bridge.take(id);
            assert_eq!(disks.add(&sized(id, bytes, false, false), DiskDriver::Pmem).expect("room").1, frontend, "{id}");
            assert_eq!(disks.address(id, place), place.map(|place| Address::Pci(place.guest_path())));
        }
        let one = sized("disk1", 2 << 20, true, false);
        assert_eq!(
            device(&one, Frontend::Memory(2 << 20), bridge.find("disk1"), &DiskSettings::default(), Accelerator::Tcg)
                .line(),
            "virtio-pmem-pci,id=disk1,memdev=disk1-host,bus=plug,addr=0x1"
        );
        assert_eq!(
            pmem::backend(&one, 7).line(),
            "memory-backend-file,id=disk1-host,mem-path=/proc/self/fd/7,size=2097152,share=on,readonly=on"
        );
    }
}
