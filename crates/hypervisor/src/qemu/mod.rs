//! The QEMU driver: q35, entered by PVH, under KVM where that really works, else under TCG.

mod accelerator;
mod boot_file;
mod cmdline;
mod device;
mod disk;
mod fault;
mod halt;
mod launch;
mod lend;
mod pci;
mod plug;
mod pmem;
mod probe;
mod qmp;
mod root;
mod snapshot;
mod tcg;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::watch;

pub use accelerator::{Accelerator, AcceleratorChoice};
pub use disk::{DiskDriver, DiskSettings};

use self::accelerator::KeptAnswer;
use self::boot_file::BootFile;
use self::disk::Disks;
use self::launch::Terminal;
use self::pci::Bridge;
use self::qmp::Qmp;
use crate::helper::Helper;
use crate::{
    Address, Adoption, Boot, Capabilities, Channel, ChannelKind, ChannelNames, Console, DaemonSocket, DeviceKind,
    Error, HandOver, HotPlug, Hypervisor, Resize, SharingKind, Snapshots, Vm, VmExit, VmSpec, vsock,
};

/// The driver's name.
const NAME: &str = "qemu";

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
    pub accelerator: AcceleratorChoice,
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
            accelerator: AcceleratorChoice::Auto,
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
    capabilities: Capabilities,
}

const DEVICES: &[DeviceKind] = &[DeviceKind::Net, DeviceKind::Host, DeviceKind::Disk];

impl Qemu {
    /// A driver with these settings.
    pub fn new(settings: QemuSettings) -> Self {
        let capabilities = Capabilities {
            channels: &[ChannelKind::Vsock, ChannelKind::Serial],
            sharing: &[SharingKind::VirtioFs(DaemonSocket::Connection), SharingKind::NineP],
            devices: DEVICES,
            // other machines have no bridge
            hotplug: if launch::has_bridge(&settings) { DEVICES } else { &[] },
            // the kernel's vsock has a state that cannot be saved
            snapshots: Some(ChannelKind::Serial),
            hand_over: true,
        };
        Self { settings, capabilities }
    }

    /// Decides what runs the guest, by a probe once per boot of the host.
    async fn accelerator(&self, boot: &Boot) -> Result<Accelerator, Error> {
        if self.settings.accelerator == AcceleratorChoice::Tcg {
            return Ok(Accelerator::Tcg);
        }
        let kept = KeptAnswer::new(&self.settings.state_dir, &self.settings.path, boot);
        let (accelerator, reason) = if let Some(answer) = kept.recall() {
            answer
        } else {
            let (accelerator, reason) = match probe::try_kvm(self, boot).await {
                Ok(()) => (Accelerator::Kvm, "a guest ran under KVM".to_owned()),
                Err(reason) => (Accelerator::Tcg, reason),
            };
            kept.store(accelerator, &reason);
            tracing::warn!(accelerator = accelerator.name(), reason, "probed the accelerator");
            (accelerator, reason)
        };
        if self.settings.accelerator == AcceleratorChoice::Kvm && accelerator != Accelerator::Kvm {
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
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn open_channel(&self, kind: ChannelKind, names: ChannelNames<'_>) -> Result<Channel, Error> {
        match kind {
            ChannelKind::Serial => Ok(Channel::Serial { port: names.serial_port }),
            ChannelKind::Vsock => vsock::claim(),
            ChannelKind::HybridVsock => Err(launch::no_hybrid()),
        }
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
        let (bridge, disks) = launch::places(&self.settings, &plain)?;
        Ok(snapshot::fingerprint(&self.settings, accelerator, &plain, &bridge, &disks, self.tsc_khz(accelerator).await))
    }

    fn adoption(&self) -> Option<&dyn Adoption> {
        Some(self)
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

    fn exit(&self) -> watch::Receiver<Option<VmExit>> {
        self.process.exit()
    }

    fn console(&self) -> &Console {
        &self.console
    }

    fn booted(&self) {
        for file in &self.boot_files {
            if let Err(error) = file.give_back() {
                tracing::warn!(%error, "freeing the copies of kernel and initrd");
            }
        }
    }

    async fn vcpu_threads(&self) -> Result<Vec<u32>, Error> {
        let answer = self.qmp.execute("query-cpus-fast", json!({})).await?;
        let id = |cpu: &serde_json::Value| u32::try_from(cpu.get("thread-id")?.as_u64()?).ok();
        Ok(answer.as_array().into_iter().flatten().filter_map(id).collect())
    }

    fn address(&self, id: &str) -> Option<Address> {
        let place = self.lock_bridge().find(id);
        let disks = self.lock_disks();
        if disks.find(id).is_some() {
            disks.address(id, place)
        } else {
            place.map(|place| Address::Pci(place.guest_path()))
        }
    }

    async fn stop(&self, grace: Duration) -> Result<(), Error> {
        self.process.stop(grace).await;
        Ok(())
    }

    fn hotplug(&self) -> Option<&dyn HotPlug> {
        Some(self)
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
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

fn stream(fd: OwnedFd) -> std::io::Result<UnixStream> {
    let blocking = std::os::unix::net::UnixStream::from(fd);
    blocking.set_nonblocking(true)?;
    UnixStream::from_std(blocking)
}
