//! The QEMU driver: q35, entered by PVH, under KVM where that really works, else under TCG.

mod accelerator;
mod boot_file;
mod cmdline;
mod device;
mod disk;
mod halt;
mod lend;
mod pci;
mod plug;
mod pmem;
mod probe;
mod qmp;
mod root;
mod snapshot;
mod tcg;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub use accelerator::{Accelerator, Wanted};
pub use disk::{DiskDriver, DiskSettings};

use self::accelerator::Memory;
use self::boot_file::BootFile;
use self::cmdline::Inherited;
use self::disk::{Disks, Way};
use self::pci::Bridge;
use self::qmp::Qmp;
use self::root::{RootArguments, RootFile};
use self::snapshot::Restore;
use crate::helper::{Helper, Pages};
use crate::{
    Begin, Boot, Channel, Console, Device, DiskAddress, Error, FileServer, Hypervisor, Lent, Vm, VmExit, VmSpec,
};

/// How QEMU allocates, by variables of glibc (mallopt(3)) and GLib: of one heap for all threads, and small parts (an entry for
/// each translated block) of that heap too, which is all that GLib since 2.76 can do. 0.8 MiB of each machine.
const ALLOCATION: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("G_SLICE", "always-malloc")];

/// What QEMU itself takes at most beside the guest's memory and translated code, MiB (docs/design/014-pod-memory.md).
const OWN_MIB: u64 = 24;

/// What the driver must know, from the configuration.
#[derive(Debug, Clone)]
pub struct QemuSettings {
    /// The program.
    pub path: PathBuf,
    /// `-machine`, for example `q35`.
    pub machine: String,
    /// KVM, TCG, or what works.
    pub wanted: Wanted,
    /// Added to the processor model, comma separated.
    pub cpu_features: String,
    /// Size of TCG's translation buffer, MiB; 0 leaves it to QEMU, which takes up to 1 GiB.
    pub tcg_buffer_mib: u32,
    /// `-bios`; `None` is QEMU's default.
    pub firmware: Option<PathBuf>,
    /// `-sandbox`; empty is none.
    pub seccomp_sandbox: String,
    /// How the guest has disks.
    pub disks: DiskSettings,
    /// Where the answer of the KVM probe is kept; emptied by a reboot.
    pub state_dir: PathBuf,
    /// How long a monitor command may take.
    pub command_deadline: Duration,
}

impl Default for QemuSettings {
    fn default() -> Self {
        Self {
            path: "/usr/bin/qemu-system-x86_64".into(),
            machine: "q35".into(),
            wanted: Wanted::Auto,
            cpu_features: String::new(),
            tcg_buffer_mib: 0,
            firmware: None,
            seccomp_sandbox: String::new(),
            disks: DiskSettings::default(),
            state_dir: "/run/kata-containers".into(),
            command_deadline: Duration::from_secs(10),
        }
    }
}

/// The driver.
#[derive(Debug, Clone)]
pub struct Qemu {
    settings: QemuSettings,
}

impl Qemu {
    /// A driver with these settings.
    pub fn new(settings: QemuSettings) -> Self {
        Self { settings }
    }

    /// Decides what runs the guest, by a probe once per boot of the host.
    async fn accelerator(&self, boot: &Boot) -> Result<Accelerator, Error> {
        if self.settings.wanted == Wanted::Tcg {
            return Ok(Accelerator::Tcg);
        }
        let memory = Memory::new(&self.settings.state_dir, &self.settings.path, boot);
        let (accelerator, reason) = if let Some(answer) = memory.recall() {
            answer
        } else {
            let (accelerator, reason) = match probe::try_kvm(self, boot).await {
                Ok(()) => (Accelerator::Kvm, "a guest ran under KVM".to_owned()),
                Err(reason) => (Accelerator::Tcg, reason),
            };
            memory.store(accelerator, &reason);
            tracing::warn!(accelerator = accelerator.name(), reason, "probed the accelerator");
            (accelerator, reason)
        };
        if self.settings.wanted == Wanted::Kvm && accelerator != Accelerator::Kvm {
            return Err(Error::Setting {
                key: "accelerator",
                value: "kvm".into(),
                why: reason,
                remedy: "set it to \"auto\" or \"tcg\", or repair KVM on this host",
            });
        }
        Ok(accelerator)
    }

    /// The rate of the guest's counter, where only the host knows it.
    async fn tsc_khz(&self, accelerator: Accelerator) -> Option<u64> {
        match accelerator {
            Accelerator::Tcg => tcg::rate(&self.settings.state_dir).await,
            Accelerator::Kvm => None,
        }
    }

    async fn start(&self, spec: VmSpec, accelerator: Accelerator) -> Result<QemuVm, Error> {
        let (mut bridge, disks) = places(&self.settings, &spec)?;
        for device in &spec.devices {
            if let Device::Disk(disk) = device
                && matches!(disks.find(&disk.id), Some((_, Way::Memory(_))))
            {
                pmem::lock(disk)?;
            }
        }
        let later = if matches!(spec.begin, Begin::Clone(_)) { folders(&spec, &mut bridge)? } else { Vec::new() };
        let (qmp, qmp_child) = pair()?;
        let (console_stream, console_child) = pair()?;
        let (channel, channel_child) = match spec.channel {
            Channel::Serial { .. } => {
                let (ours, theirs) = pair()?;
                (Some(ours), Some(theirs))
            }
            Channel::Vsock { .. } => (None, None),
        };
        let mut passed = vec![qmp_child, console_child];
        let (boot, boot_files) = match spec.begin {
            Begin::Clone(_) => (None, Vec::new()),
            Begin::Boot | Begin::Template { .. } => {
                let (boot, files) = boot(&spec.boot, &mut passed).await?;
                (Some(boot), files)
            }
        };
        let (memory, restore) = memory(spec.begin, &mut passed).map_err(Error::system("the guest's memory"))?;
        let [qmp_child, console_child] = [&passed[0], &passed[1]];
        let inherited = Inherited {
            tsc_khz: self.tsc_khz(accelerator).await,
            boot,
            memory,
            qmp: qmp_child.as_raw_fd(),
            console: console_child.as_raw_fd(),
            channel: channel_child.as_ref().map(AsRawFd::as_raw_fd),
        };
        let pages = match accelerator {
            Accelerator::Kvm => Pages::AsHost,
            Accelerator::Tcg => tcg::pages(&inherited.memory),
        };
        let spec = VmSpec { begin: Begin::Boot, ..spec };
        let args = cmdline::arguments(&self.settings, accelerator, &spec, &bridge, &disks, &inherited);
        tracing::debug!(program = %self.settings.path.display(), ?args, "starting QEMU");

        passed.extend(channel_child);
        for device in spec.devices {
            match device {
                Device::Net(card) => passed.extend(card.queues.into_iter().chain(card.vhost)),
                Device::Disk(disk) => passed.push(disk.file),
                Device::Host(_) => {}
            }
        }
        passed.extend(spec.shared_dirs.into_iter().filter_map(|dir| match dir.server {
            FileServer::VirtioFs { socket, .. } => Some(socket),
            FileServer::NineP { folder } => folder,
        }));
        if let Channel::Vsock { vhost, .. } = spec.channel {
            passed.push(vhost);
        }
        let process = Helper::spawn("QEMU", "path", &self.settings.path, &args, &ALLOCATION, &passed, pages)?;
        // the child has its own copies; ours would keep its sockets from ever reaching their end
        drop(passed);

        let (console, terminal) = Terminal::follow(console_stream, spec.debug)?;
        let qmp =
            Qmp::start(stream(qmp).map_err(Error::system("monitor socket"))?, self.settings.command_deadline).await?;
        let (process, qmp) = (Arc::new(process), Arc::new(qmp));
        halt::watch(&qmp, &process);
        if let Some(restore) = restore {
            let (process, qmp) = (Arc::clone(&process), Arc::clone(&qmp));
            // whoever waits for the guest learns from QEMU's end that it will not come
            tokio::spawn(async move {
                if let Err(error) = restore.finish(&qmp, later).await {
                    tracing::warn!(%error, "the guest does not go on from what was saved");
                    process.stop(Duration::ZERO).await;
                }
            });
        }
        let bridge = Arc::new(Mutex::new(bridge));
        let plugging = tokio::sync::Mutex::default();
        let (disks, disk_settings) = (Arc::new(Mutex::new(disks)), self.settings.disks.clone());
        Ok(QemuVm {
            process,
            qmp,
            console,
            terminal,
            channel,
            accelerator,
            boot_files,
            bridge,
            disks,
            disk_settings,
            plugging,
        })
    }
}

/// The host's end of the guest's console, and who reads it.
#[derive(Debug)]
struct Terminal {
    end: OwnedFd,
    reader: AbortHandle,
    is_logged: bool,
}

impl Terminal {
    fn follow(end: OwnedFd, is_logged: bool) -> Result<(Console, Self), Error> {
        let failed = || Error::system("console socket");
        let console = Console::default();
        let read = stream(end.try_clone().map_err(failed())?).map_err(failed())?;
        let reader = tokio::spawn(console.clone().follow(read, is_logged)).abort_handle();
        Ok((console, Self { end, reader, is_logged }))
    }
}

/// What the guest boots, open: what QEMU is told of it, and what can be given back after the boot. QEMU's descriptors are
/// added to `passed`.
async fn boot(boot: &Boot, passed: &mut Vec<OwnedFd>) -> Result<((String, RootArguments), Vec<BootFile>), Error> {
    let (kernel, root) = (boot.kernel.clone(), boot.root.clone());
    let opened = tokio::task::spawn_blocking(move || Ok((BootFile::new(&kernel)?, RootFile::open(&root)?)));
    let (kernel, root) = opened
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(Error::system("opening what the guest boots"))?;
    let (kernel_child, path) = kernel.share().map_err(Error::system("the kernel's copy"))?;
    let (root_child, arguments) = root.share(&boot.root).map_err(Error::system("the guest's root"))?;
    passed.extend([kernel_child, root_child]);
    Ok(((path, arguments), std::iter::once(kernel).chain(root.into_copy()).collect()))
}

/// What the guest's memory is, and for a clone what is to be done before it can go on. QEMU's descriptor of it is added to
/// `passed`.
fn memory(begin: Begin, passed: &mut Vec<OwnedFd>) -> std::io::Result<(cmdline::Memory, Option<Restore>)> {
    let (file, is_shared, restore) = match begin {
        Begin::Boot => return Ok((cmdline::Memory::Anonymous, None)),
        Begin::Template { memory } => (memory, true, None),
        Begin::Clone(snapshot) => {
            let (memory, is_shared, restore) = Restore::begin(snapshot)?;
            (memory, is_shared, Some(restore))
        }
    };
    let path = snapshot::path_of(&file);
    passed.push(file);
    Ok((cmdline::Memory::File { path, is_shared }, restore))
}

/// The bridge of a VM that can change, with the places of its cards, and its disks. What belongs to the host stays on the
/// root bus, as a part of the machine.
fn places(settings: &QemuSettings, spec: &VmSpec) -> Result<(Bridge, Disks), Error> {
    let (mut bridge, mut disks) = (Bridge::default(), Disks::default());
    if spec.pluggable && settings.machine.contains("q35") {
        bridge = Bridge::new();
        if settings.disks.driver == DiskDriver::Pmem {
            disks.room = pmem::room(spec.size.memory_mib);
        }
    }
    let count = spec.devices.len();
    for device in &spec.devices {
        let of_the_bridge = match device {
            Device::Net(card) => !bridge.is_missing() && bridge.find(&card.id).is_none(),
            Device::Host(_) => false,
            Device::Disk(disk) => {
                disks.add(disk, settings.disks.driver)?;
                settings.disks.driver != DiskDriver::Scsi
            }
        };
        if of_the_bridge {
            bridge.take(device.id()).ok_or(Error::TooManyDevices { count, most: pci::MOST })?;
        } else if matches!(device, Device::Disk(_)) && !disks.controller {
            bridge.take(disk::CONTROLLER).ok_or(Error::TooManyDevices { count, most: pci::MOST })?;
            disks.controller = true;
        }
    }
    Ok((bridge, disks))
}

/// Places behind the bridge for the folders that a clone has and its template has not; returns them: QEMU gets them later
/// than on its command line.
fn folders(spec: &VmSpec, bridge: &mut Bridge) -> Result<Vec<device::Options>, Error> {
    let mut later = Vec::new();
    for (index, dir) in spec.shared_dirs.iter().enumerate() {
        if let FileServer::VirtioFs { queue_size, .. } = dir.server {
            let name = device::folder_name(index);
            let place = bridge.take(&name).ok_or(Error::NoSlot { device: name })?;
            later.push(device::folder(index, dir.tag, queue_size, Some(place)));
        }
    }
    Ok(later)
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn overhead_mib(&self, boot: &Boot) -> Result<u64, Error> {
        Ok(match self.accelerator(boot).await? {
            Accelerator::Kvm => OWN_MIB,
            Accelerator::Tcg => OWN_MIB + tcg::overhead_mib(self.settings.tcg_buffer_mib),
        })
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error> {
        let accelerator = self.accelerator(&spec.boot).await?;
        Ok(Box::new(self.start(spec, accelerator).await?))
    }

    async fn fingerprint(&self, spec: &VmSpec) -> Result<String, Error> {
        let accelerator = self.accelerator(&spec.boot).await?;
        let plain = snapshot::plain(spec);
        let (bridge, disks) = places(&self.settings, &plain)?;
        Ok(snapshot::fingerprint(&self.settings, accelerator, &plain, &bridge, &disks, self.tsc_khz(accelerator).await))
    }

    async fn adopt(&self, lent: Lent, process: Helper, channel: OwnedFd) -> Result<Box<dyn Vm>, Error> {
        Ok(Box::new(lend::adopt(&self.settings, lent, process, channel).await?))
    }
}

/// A QEMU that runs.
#[derive(Debug)]
struct QemuVm {
    process: Arc<Helper>,
    qmp: Arc<Qmp>,
    console: Console,
    terminal: Terminal,
    channel: Option<OwnedFd>,
    accelerator: Accelerator,
    boot_files: Vec<BootFile>,
    bridge: Arc<Mutex<Bridge>>,
    disks: Arc<Mutex<Disks>>,
    disk_settings: DiskSettings,
    /// Held while a device is plugged: what belongs to it goes in several commands.
    plugging: tokio::sync::Mutex<()>,
}

#[async_trait]
impl Vm for QemuVm {
    fn take_channel(&mut self) -> Option<OwnedFd> {
        self.channel.take()
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn accelerator(&self) -> &'static str {
        self.accelerator.name()
    }

    fn exit(&self) -> watch::Receiver<Option<VmExit>> {
        self.process.exit()
    }

    fn console(&self) -> &Console {
        &self.console
    }

    fn booted(&self) {
        for file in &self.boot_files {
            if let Err(error) = file.give_back() {
                tracing::warn!(%error, "giving back the copies of kernel and initrd");
            }
        }
    }

    async fn vcpu_threads(&self) -> Result<Vec<u32>, Error> {
        let answer = self.qmp.execute("query-cpus-fast", json!({})).await?;
        let id = |cpu: &serde_json::Value| u32::try_from(cpu.get("thread-id")?.as_u64()?).ok();
        Ok(answer.as_array().into_iter().flatten().filter_map(id).collect())
    }

    async fn save(&self, to: OwnedFd) -> Result<(), Error> {
        snapshot::save(&self.qmp, to).await
    }

    async fn pause(&self) -> Result<(), Error> {
        self.qmp.execute("stop", json!({})).await.map(drop)
    }

    async fn resume(&self) -> Result<(), Error> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn plug(&self, device: Device) -> Result<(), Error> {
        self.plug_device(device).await
    }

    async fn unplug(&self, id: &str) -> Result<(), Error> {
        self.unplug_device(id).await
    }

    fn guest_path(&self, id: &str) -> Option<String> {
        self.lock_bridge().find(id).map(pci::Place::guest_path)
    }

    fn guest_disk(&self, id: &str) -> Option<DiskAddress> {
        let place = self.lock_bridge().find(id);
        self.lock_disks().address(id, place)
    }

    fn is_fixed(&self, id: &str) -> bool {
        matches!(self.lock_disks().find(id), Some((_, Way::Memory(_))))
    }

    async fn resize_disk(&self, id: &str, bytes: u64) -> Result<(), Error> {
        self.qmp.execute("block_resize", json!({"node-name": disk::node_name(id), "size": bytes})).await.map(drop)
    }

    async fn lend(&self) -> Result<Lent, Error> {
        self.lend_sockets().await
    }

    async fn stop(&self, grace: Duration) -> Result<(), Error> {
        self.process.stop(grace).await;
        Ok(())
    }
}

/// Firmware that QEMU brings and that enters a kernel fastest, where it is installed.
pub fn quick_firmware() -> Option<PathBuf> {
    ["/usr/share/qemu/qboot.rom", "/usr/share/qemu-kvm/qboot.rom", "/usr/local/share/qemu/qboot.rom"]
        .iter()
        .map(Path::new)
        .find(|path| path.is_file())
        .map(Path::to_owned)
}

fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    use std::os::unix::net::UnixStream as Blocking;
    let (ours, theirs) = Blocking::pair().map_err(Error::system("socketpair"))?;
    Ok((ours.into(), theirs.into()))
}

fn stream(fd: OwnedFd) -> std::io::Result<UnixStream> {
    let blocking = std::os::unix::net::UnixStream::from(fd);
    blocking.set_nonblocking(true)?;
    UnixStream::from_std(blocking)
}
