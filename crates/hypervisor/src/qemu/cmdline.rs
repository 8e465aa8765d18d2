//! The QEMU command line, as a pure function of what the VM is made of.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::QemuSettings;
use super::accelerator::Accelerator;
use super::device::{self, escape};
use super::disk::{self, DiskDriver, Disks, Frontend};
use super::pci::{self, Bridge};
use super::pmem;
use super::root::RootArguments;
use super::{snapshot, tcg};
use crate::guest_kernel;
use crate::{Channel, DaemonEnd, Device, FileServer, SharedDir, VmSpec};

/// What the child inherits: the kernel, the root and its ends of the sockets that the driver made.
#[derive(Debug, Clone)]
pub(super) struct Inherited {
    /// The rate of the guest's time stamp counter, where only the host knows it.
    pub(super) tsc_khz: Option<u64>,
    /// The kernel's path and the guest's root; a clone needs neither.
    pub(super) boot: Option<(String, RootArguments)>,
    pub(super) memory: Memory,
    pub(super) qmp: RawFd,
    pub(super) console: RawFd,
    pub(super) channel: Option<RawFd>,
}

/// What the guest's memory is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Memory {
    /// QEMU's own, which helpers can share, unless it is to be merged.
    Anonymous,
    /// A file. Not shared, what the guest writes stays out of it.
    File { path: String, is_shared: bool },
}

impl Memory {
    fn argument(&self, mib: u64, merge: bool) -> String {
        match self {
            // the kernel merges private pages only
            Self::Anonymous if merge => format!("memory-backend-ram,id=mem,size={mib}M"),
            Self::Anonymous => format!("memory-backend-memfd,id=mem,size={mib}M,share=on"),
            Self::File { path, is_shared } => {
                let share = if *is_shared { "on" } else { "off" };
                format!("memory-backend-file,id=mem,size={mib}M,mem-path={},share={share}", escape(path))
            }
        }
    }
}

/// Kernel parameters of this machine: its console and the way it resets (QEMU ends on a reset, `-no-reboot`), emulated timers
/// that are what they say (checking them costs tens of milliseconds), one bus to look at.
const KERNEL_PARAMS: &str = "console=ttyS0 reboot=t no_timer_check tsc=reliable pci=lastbus=0";

/// For devices whose requests are few and small: they are served where they are made, and QEMU's loop need not look at a
/// descriptor for each of their queues, seven of 23, in every round trip of a network.
const AT_ONCE: &str = "ioeventfd=off";

/// The kernel asks a new SCSI controller for each of its 256 units, of which all but some are missing and take 20 ms each. The
/// agent asks for those that it needs.
const ONE_BY_ONE: &str = " scsi_mod.scan=manual";

/// All arguments after the program's name.
pub(super) fn arguments(
    settings: &QemuSettings,
    accelerator: Accelerator,
    spec: &VmSpec,
    bridge: &Bridge,
    disks: &Disks,
    inherited: &Inherited,
) -> Vec<String> {
    let mut args = Args(Vec::with_capacity(64));
    let size = spec.size;
    let is_translated = accelerator == Accelerator::Tcg;
    let has_hpet = is_translated && tcg::has_no_local_timer(size);
    args.pair("-name", format!("kata-{},debug-threads=on", escape(&spec.id)));
    args.pair(
        "-machine",
        format!(
            "{},memory-backend=mem,mem-merge={},hpet={},sata=off,smbus=off,usb=off,vmport=off,graphics=off,i8042=off",
            settings.machine,
            // QEMU's own default is on
            if spec.merge { "on" } else { "off" },
            if has_hpet { "on" } else { "off" },
        ),
    );
    match accelerator {
        Accelerator::Kvm => args.pair("-accel", "kvm"),
        Accelerator::Tcg => args.pair("-accel", tcg::option(settings.tcg_buffer_mib)),
    }
    let model = accelerator.cpu_model();
    match settings.cpu_features.trim_matches(',') {
        "" => args.pair("-cpu", model),
        features => args.pair("-cpu", format!("{model},{features}")),
    }
    args.pair("-smp", size.vcpus.to_string());
    let of_image = inherited.boot.as_ref().map_or(0, |(_, root)| root.memory);
    args.pair("-m", pmem::size(size.memory_mib, disks.room.saturating_add(of_image)));
    args.pair("-object", inherited.memory.argument(size.memory_mib, spec.merge));
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        args.0.push(flag.to_owned());
    }
    args.pair("-display", "none");
    if let Some(firmware) = &settings.firmware {
        args.pair("-bios", firmware.to_string_lossy());
    }
    if !settings.seccomp_sandbox.is_empty() {
        args.pair("-sandbox", settings.seccomp_sandbox.clone());
    }

    if let Some((kernel, root)) = &inherited.boot {
        // this takes its value as it is
        args.pair("-kernel", kernel.clone());
        for (name, value) in &root.arguments {
            args.pair(name, value.clone());
        }
        let (own, configured) = if is_translated {
            (
                tcg::kernel_params(size, inherited.tsc_khz, &spec.boot.kernel_params),
                tcg::without_broken(&spec.boot.kernel_params),
            )
        } else {
            (String::new(), spec.boot.kernel_params.clone())
        };
        let units = if settings.disks.driver == DiskDriver::Scsi { ONE_BY_ONE } else { "" };
        let every = guest_kernel::params(spec);
        args.pair("-append", format!("{KERNEL_PARAMS}{own}{units} {every}{} {configured}", root.kernel_params));
    } else {
        // told where the state is once the memory is there
        args.pair("-incoming", "defer");
    }

    args.pair("-chardev", format!("socket,id=qmp,fd={}", inherited.qmp));
    args.pair("-mon", "chardev=qmp,mode=control");
    args.pair("-chardev", format!("socket,id=console,fd={}", inherited.console));
    args.pair("-serial", "chardev:console");

    args.pair("-object", format!("rng-random,id=entropy,filename={}", escape(&spec.entropy_source.to_string_lossy())));
    if bridge.is_missing() {
        // nothing will come, so the guest need not know how things come
        args.pair("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
        args.pair("-device", format!("virtio-rng-pci,rng=entropy,{AT_ONCE}"));
    } else {
        args.pair("-device", pci::ARGUMENT);
        args.pair("-device", format!("virtio-rng-pci,rng=entropy,{AT_ONCE}{}", pci::RESIDENT));
    }
    match &spec.channel {
        Channel::Serial { port } => {
            if let Some(fd) = inherited.channel {
                args.pair("-chardev", format!("socket,id=agent,fd={fd}"));
                args.pair("-device", format!("virtio-serial-pci,max_ports=2,{AT_ONCE}"));
                args.pair("-device", format!("virtserialport,chardev=agent,name={}", escape(port)));
            }
        }
        Channel::Vsock { vhost, cid } => {
            args.pair("-device", format!("vhost-vsock-pci,vhostfd={},guest-cid={cid}", vhost.as_raw_fd()));
        }
        // such a VM is not launched
        Channel::HybridVsock { .. } => {}
    }
    if spec.reclaim {
        args.pair("-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on");
    }
    for (index, dir) in spec.shared_dirs.iter().enumerate() {
        share(&mut args, index, dir, inherited.boot.is_some());
    }
    devices(&mut args, settings, accelerator, spec, bridge, disks);
    args.0
}

/// What the pod brings.
fn devices(
    args: &mut Args,
    settings: &QemuSettings,
    accelerator: Accelerator,
    spec: &VmSpec,
    bridge: &Bridge,
    disks: &Disks,
) {
    if disks.controller {
        args.pair("-device", disk::controller(bridge.find(disk::CONTROLLER)).line());
    }
    for device in &spec.devices {
        let place = bridge.find(device.id());
        match device {
            Device::Net(card) => {
                let numbers = |fds: &[OwnedFd]| fds.iter().map(|fd| fd.as_raw_fd().to_string()).collect::<Vec<_>>();
                args.pair("-netdev", device::tap(&card.id, &numbers(&card.queues), &numbers(&card.vhost)).line());
                args.pair("-device", device::card(&card.id, &card.mac, card.queues.len(), place).line());
            }
            Device::Host(host) => args.pair("-device", device::host(&host.id, &host.address, place).line()),
            Device::Disk(one) => {
                let Some((set, frontend)) = disks.find(&one.id) else { continue };
                if matches!(frontend, Frontend::Memory(_)) {
                    args.pair("-object", pmem::backend(one, one.file.as_raw_fd().into()).line());
                } else {
                    args.pair("-add-fd", disk::set_line(one.file.as_raw_fd(), set));
                    args.pair("-blockdev", disk::node(one, set, &settings.disks).to_string());
                }
                args.pair("-device", disk::device(one, frontend, place, &settings.disks, accelerator).line());
            }
        }
    }
}

/// What QEMU opens where there is no folder yet: something that is always there, and that the guest of a template, in which
/// nothing of a pod is, does not mount.
const NO_FOLDER: &str = "/proc/self/fdinfo";

fn share(args: &mut Args, index: usize, dir: &SharedDir, boots: bool) {
    match &dir.server {
        FileServer::VirtioFs { socket, queue_size } => {
            let end = match socket {
                DaemonEnd::Connection(socket) => format!("fd={}", socket.as_raw_fd()),
                DaemonEnd::Path(path) => format!("path={}", escape(&path.to_string_lossy())),
            };
            args.pair("-chardev", format!("socket,id=fs{index},{end}"));
            // its state cannot be read, so a clone gets it after that
            if boots {
                args.pair("-device", device::folder(index, dir.tag, *queue_size, None).line());
            }
        }
        // owners and modes are the host's own, as with virtio-fs, and one that the host's file system does not take is no
        // reason to fail (an NFS that makes root nobody); files of several file systems get numbers of their own
        FileServer::NineP { folder } => {
            let path = folder.as_ref().map_or_else(|| NO_FOLDER.into(), snapshot::path_of);
            args.pair("-fsdev", format!("local,id=fs{index},path={path},security_model=none,multidevs=remap"));
            args.pair("-device", device::packets(index, dir.tag).line());
        }
    }
}

struct Args(Vec<String>);

impl Args {
    fn pair(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Boot, Root, Size};

    fn spec(memory_mib: u64) -> VmSpec {
        VmSpec {
            id: "pod,1".into(),
            begin: crate::Begin::Boot,
            boot: Boot {
                kernel: "/k,x".into(),
                root: Root::Initrd("/i,x".into()),
                kernel_params: "agent.log=debug".into(),
                hello: None,
            },
            size: Size { vcpus: 2, memory_mib },
            channel: Channel::Serial { port: "agent.0" },
            shared_dirs: Vec::new(),
            devices: Vec::new(),
            pluggable: false,
            reclaim: false,
            merge: false,
            entropy_source: "/dev/urandom".into(),
            debug: false,
        }
    }

    const INHERITED: Inherited = Inherited {
        tsc_khz: Some(2_000_000),
        boot: None,
        memory: Memory::Anonymous,
        qmp: 3,
        console: 4,
        channel: Some(5),
    };

    fn line(settings: &QemuSettings, spec: &VmSpec) -> String {
        let (bridge, disks) = super::super::launch::places(settings, spec).expect("room");
        let root = RootArguments::new(&spec.boot.root, "/proc/self/fd/7", 1);
        let inherited = Inherited { boot: Some(("/proc/self/fd/6".into(), root)), ..INHERITED };
        arguments(settings, Accelerator::Tcg, spec, &bridge, &disks, &inherited).join(" ")
    }

    #[test]
    fn is_what_the_spec_says() {
        let settings = QemuSettings { tcg_buffer_mib: 32, cpu_features: "pmu=off".into(), ..QemuSettings::default() };
        let line = line(&settings, &spec(512));
        for part in [
            "-name kata-pod,,1,debug-threads=on",
            "-accel tcg,tb-size=32",
            "-cpu max,erms=off,fsrm=off,pmu=off",
            "-m 512M",
            "size=512M,share=on",
            "-kernel /proc/self/fd/6",
            "-initrd /proc/self/fd/7 ",
            "-smp 2",
            "socket,id=agent,fd=5",
            " pci=lastbus=0 tsc_early_khz=2000000 mitigations=off noreplace-smp ",
            " quiet nr_cpus=2 clearcpuid=cx16 agent.log=debug",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
    }

    #[test]
    fn a_clone_boots_nothing() {
        let memory = Memory::File { path: "/proc/self/fd/8".into(), is_shared: false };
        let inherited = Inherited { memory, ..INHERITED };
        let settings = QemuSettings::default();
        let line =
            arguments(&settings, Accelerator::Tcg, &spec(512), &Bridge::default(), &Disks::default(), &inherited)
                .join(" ");
        assert!(line.contains("memory-backend-file,id=mem,size=512M,mem-path=/proc/self/fd/8,share=off "), "{line}");
        assert!(line.contains("-incoming defer") && !line.contains("-kernel") && !line.contains("-append"), "{line}");
    }

    #[test]
    fn memory_is_merged_for_those_who_ask() {
        let usual = line(&QemuSettings::default(), &spec(512));
        assert!(usual.contains(",mem-merge=off,") && usual.contains("memory-backend-memfd,"), "{usual}");
        let merged = line(&QemuSettings::default(), &VmSpec { merge: true, ..spec(512) });
        assert!(merged.contains(",mem-merge=on,") && merged.contains("-object memory-backend-ram,id=mem,"), "{merged}");
    }

    #[test]
    fn a_folder_is_served_by_a_daemon_or_by_qemu() {
        let fd = || OwnedFd::from(tempfile::tempfile().expect("a file"));
        let served = |server| {
            let spec = VmSpec { shared_dirs: vec![SharedDir { tag: "files", server }], ..spec(512) };
            line(&QemuSettings::default(), &spec)
        };
        let virtio_fs = served(FileServer::VirtioFs { socket: DaemonEnd::Connection(fd()), queue_size: 512 });
        assert!(virtio_fs.contains("vhost-user-fs-pci,id=folder0,chardev=fs0,tag=files,queue-size=512"), "{virtio_fs}");
        let nine_p = served(FileServer::NineP { folder: Some(fd()) });
        assert!(
            nine_p.contains(
                ",security_model=none,multidevs=remap -device virtio-9p-pci,id=folder0,fsdev=fs0,mount_tag=files"
            ),
            "{nine_p}"
        );
        assert!(nine_p.contains("-fsdev local,id=fs0,path=/proc/self/fd/"), "{nine_p}");
    }

    #[test]
    fn devices_are_behind_a_bridge() {
        let settings = QemuSettings::default();
        let bare = line(&settings, &spec(512));
        assert!(!bare.contains("pci-bridge") && bare.contains("hotplug-with-bridge-support=off"), "{bare}");
        let fd = OwnedFd::from(tempfile::tempfile().expect("a file"));
        let number = fd.as_raw_fd();
        let card = crate::NetDevice { id: "net0".into(), mac: "m".into(), queues: vec![fd], vhost: Vec::new() };
        let host = crate::HostDevice { id: "nic1".into(), address: "0000:01:00.0".into() };
        let spec = VmSpec { devices: vec![Device::Host(host), Device::Net(card)], pluggable: true, ..spec(512) };
        let line = line(&settings, &spec);
        assert!(!line.contains("bridge-support=off"), "{line}");
        for part in [
            "-device pci-bridge,id=plug,",
            "-device virtio-rng-pci,rng=entropy,ioeventfd=off,bus=plug,addr=0x1f",
            &format!("-netdev tap,id=net0-host,fd={number} "),
            "-device virtio-net-pci,id=net0,netdev=net0-host,mac=m,romfile=,bus=plug,addr=0x1",
            "-device vfio-pci,id=nic1,host=0000:01:00.0",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
    }

    #[test]
    fn disks_are_passed_open() {
        let spec_with = |ids: &[&str]| {
            let disk = |id: &&str| {
                let file = tempfile::tempfile().expect("a file").into();
                Device::Disk(crate::Disk { id: (*id).to_owned(), file, bytes: 4 << 20, read_only: true, shared: false })
            };
            VmSpec { devices: ids.iter().map(disk).collect(), pluggable: true, ..spec(512) }
        };
        let settings = QemuSettings::default();
        let blocks = spec_with(&["disk1", "disk2"]);
        let Device::Disk(first) = &blocks.devices[0] else { panic!("a disk") };
        let number = first.file.as_raw_fd();
        let blk = line(&settings, &blocks);
        for part in [
            &format!("-add-fd fd={number},set=1 -blockdev {{"),
            "\"filename\":\"/dev/fdset/2\"",
            "-device virtio-blk-pci,id=disk2,drive=disk2-host,werror=report,rerror=report,ioeventfd=off,bus=plug,addr=0x2",
        ] {
            assert!(blk.contains(part), "{part} is missing in {blk}");
        }
        let with = |driver| {
            let disks = crate::qemu::DiskSettings { driver, ..crate::qemu::DiskSettings::default() };
            line(&QemuSettings { disks, ..settings.clone() }, &blocks)
        };
        let pmem = with(crate::qemu::DiskDriver::Pmem);
        for part in [
            "-m 512M,maxmem=",
            &format!(
                "-object memory-backend-file,id=disk1-host,mem-path=/proc/self/fd/{number},size=4194304,share=on,"
            ),
            "-device virtio-pmem-pci,id=disk2,memdev=disk2-host,bus=plug,addr=0x2",
        ] {
            assert!(pmem.contains(part), "{part} is missing in {pmem}");
        }
        let scsi = with(crate::qemu::DiskDriver::Scsi);
        for part in [
            "-device virtio-scsi-pci,id=scsi,romfile=,bus=plug,addr=0x1",
            "-device scsi-hd,id=disk2,drive=disk2-host,werror=report,rerror=report,bus=scsi.0,scsi-id=0,lun=1",
            " scsi_mod.scan=manual ",
        ] {
            assert!(scsi.contains(part), "{part} is missing in {scsi}");
        }
        assert!(!pmem.contains("scsi"), "{pmem}");
    }
}
