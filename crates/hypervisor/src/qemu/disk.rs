//! Disks in QEMU's words, and where each of them is. Pure.
//!
//! A disk is a node of QEMU's (the file), a descriptor set through which that opens it, and a device: a PCI device of its
//! own, or a unit of one SCSI controller, which takes one place for all of them.

use serde_json::{Value, json};

use super::accelerator::Accelerator;
use super::device::{Options, at};
use super::pci::Place;
use crate::{Disk, DiskAddress, Error};

/// How the guest has its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskDriver {
    /// virtio-blk: a PCI device each.
    #[default]
    Block,
    /// virtio-scsi: units of one controller.
    Scsi,
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

/// The disks of a VM.
#[derive(Debug, Default)]
pub(super) struct Disks {
    sets: u32,
    all: Vec<Known>,
    /// The controller is there.
    pub(super) controller: bool,
}

#[derive(Debug)]
struct Known {
    id: String,
    set: u32,
    unit: Option<u16>,
}

impl Disks {
    /// A set's number, never given twice, and for SCSI a unit's.
    pub(super) fn add(&mut self, id: &str, driver: DiskDriver) -> Result<(u32, Option<u16>), Error> {
        let unit = match driver {
            DiskDriver::Block => None,
            DiskDriver::Scsi => {
                let is_free = |unit: &u16| self.all.iter().all(|disk| disk.unit != Some(*unit));
                Some((0..MOST_UNITS).find(is_free).ok_or_else(|| Error::NoSlot { device: id.to_owned() })?)
            }
        };
        self.sets += 1;
        self.all.push(Known { id: id.to_owned(), set: self.sets, unit });
        Ok((self.sets, unit))
    }

    /// A disk's set and unit.
    pub(super) fn find(&self, id: &str) -> Option<(u32, Option<u16>)> {
        self.all.iter().find(|disk| disk.id == id).map(|disk| (disk.set, disk.unit))
    }

    pub(super) fn remove(&mut self, id: &str) {
        self.all.retain(|disk| disk.id != id);
    }

    /// Where it is, on the controller or at `place`.
    pub(super) fn address(&self, id: &str, place: Option<Place>) -> Option<DiskAddress> {
        match self.all.iter().find(|disk| disk.id == id)?.unit {
            Some(lun) => Some(DiskAddress::Scsi { id: 0, lun }),
            None => place.map(|place| DiskAddress::Pci(place.guest_path())),
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
pub(super) fn controller(place: Option<Place>) -> Options {
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
    unit: Option<u16>,
    place: Option<Place>,
    settings: &DiskSettings,
    accelerator: Accelerator,
) -> Options {
    let driver = if unit.is_some() { "scsi-hd" } else { "virtio-blk-pci" };
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
    if let Some(unit) = unit {
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
        Disk { id: "disk1".into(), file: tempfile::tempfile().expect("a file").into(), read_only, shared }
    }

    #[test]
    fn a_disk_of_its_own() {
        let mut disks = Disks::default();
        let place = Bridge::new().take("disk1");
        let (set, unit) = disks.add("disk1", DiskDriver::Block).expect("room");
        let settings = DiskSettings { aio: "io_uring", logical_sector: 4096, ..DiskSettings::default() };
        let one = disk(true, false);
        let node = node(&one, set, &settings);
        assert_eq!((node["filename"].as_str(), node["driver"].as_str()), (Some("/dev/fdset/1"), Some("file")));
        assert_eq!((node["read-only"].as_bool(), node["aio"].as_str()), (Some(true), Some("io_uring")));
        assert_eq!(
            device(&one, unit, place, &settings, Accelerator::Kvm).line(),
            "virtio-blk-pci,id=disk1,drive=disk1-host,logical_block_size=4096,bus=plug,addr=0x1"
        );
        assert_eq!(
            device(&one, unit, place, &settings, Accelerator::Tcg).line(),
            "virtio-blk-pci,id=disk1,drive=disk1-host,logical_block_size=4096,ioeventfd=off,bus=plug,addr=0x1"
        );
        assert_eq!(disks.address("disk1", place), Some(DiskAddress::Pci("1e/01".into())));
        assert_eq!(disks.address("disk2", place), None);
    }

    #[test]
    fn units_of_one_controller() {
        let mut disks = Disks::default();
        for id in ["disk1", "disk2"] {
            disks.add(id, DiskDriver::Scsi).expect("room");
        }
        disks.remove("disk1");
        // a set that QEMU may still hold is not used again, a unit is
        assert_eq!(disks.add("disk3", DiskDriver::Scsi).expect("room"), (3, Some(0)));
        assert_eq!(disks.address("disk2", None), Some(DiskAddress::Scsi { id: 0, lun: 1 }));
        assert_eq!(
            device(&disk(false, true), Some(7), None, &DiskSettings::default(), Accelerator::Tcg).line(),
            "scsi-hd,id=disk1,drive=disk1-host,share-rw=on,bus=scsi.0,scsi-id=0,lun=7"
        );
        for number in 0..MOST_UNITS - 2 {
            disks.add(&format!("more{number}"), DiskDriver::Scsi).expect("room");
        }
        disks.add("last", DiskDriver::Scsi).expect_err("no unit is left");
    }
}
