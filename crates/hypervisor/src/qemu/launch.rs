//! From a description to a QEMU that runs: what it inherits, where its devices are, what is done before a clone can go on.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::boot_file::BootFile;
use super::cmdline::{self, Inherited};
use super::disk::{self, DiskDriver, Disks, Frontend};
use super::pci::{self, Bridge};
use super::qmp::Qmp;
use super::root::{RootArguments, RootFile};
use super::snapshot::{self, Restore};
use super::{Accelerator, Qemu, QemuSettings, QemuVm, device, fault, halt, pmem, stream, tcg};
use crate::helper::{Helper, Pages, Program};
use crate::{Begin, Boot, Channel, Console, DaemonEnd, Device, Error, FileServer, VmSpec};

/// How QEMU allocates, by variables of glibc (mallopt(3)) and GLib: of one heap for all threads, and small parts (an entry for
/// each translated block) of that heap too, which is all that GLib since 2.76 can do. 0.8 MiB of each machine.
const ALLOCATION: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("G_SLICE", "always-malloc")];

impl Qemu {
    pub(super) async fn start(&self, spec: VmSpec, accelerator: Accelerator) -> Result<QemuVm, Error> {
        let (mut bridge, disks) = places(&self.settings, &spec)?;
        lock_memory(&spec, &disks)?;
        let later = if matches!(spec.begin, Begin::Clone(_)) { folders(&spec, &mut bridge)? } else { Vec::new() };
        let (qmp, qmp_child) = pair()?;
        let (console_stream, console_child) = pair()?;
        let (channel, channel_child) = match spec.channel {
            Channel::Serial { .. } => {
                let (ours, theirs) = pair()?;
                (Some(ours), Some(theirs))
            }
            Channel::Vsock { .. } => (None, None),
            Channel::HybridVsock { .. } => return Err(no_hybrid()),
        };
        let mut passed = vec![qmp_child, console_child];
        let (boot, boot_files) = match spec.begin {
            Begin::Clone(_) => (None, Vec::new()),
            Begin::Boot | Begin::Template { .. } => {
                let (boot, files) = boot(&spec.boot, &mut passed).await?;
                (Some(boot), files)
            }
        };
        let (memory, restore) =
            memory(spec.begin, &mut passed).map_err(Error::system("allocating the guest's memory"))?;
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
            FileServer::VirtioFs { socket: DaemonEnd::Connection(socket), .. } => Some(socket),
            FileServer::VirtioFs { socket: DaemonEnd::Path(_), .. } => None,
            FileServer::NineP { folder } => folder,
        }));
        if let Channel::Vsock { vhost, .. } = spec.channel {
            passed.push(vhost);
        }
        let process = Helper::spawn(&Program {
            env: &ALLOCATION,
            fds: &passed,
            pages,
            fault: fault::find,
            ..Program::new("QEMU", "path", &self.settings.path, &args)
        })?;
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
                    tracing::warn!(%error, "the guest does not run after the restore");
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

/// Locks the files that are memory of the guest, as QEMU locks disks.
fn lock_memory(spec: &VmSpec, disks: &Disks) -> Result<(), Error> {
    for device in &spec.devices {
        if let Device::Disk(disk) = device
            && matches!(disks.find(&disk.id), Some((_, Frontend::Memory(_))))
        {
            pmem::lock(disk)?;
        }
    }
    Ok(())
}

/// The host's end of the guest's console, and who reads it.
#[derive(Debug)]
pub(super) struct Terminal {
    pub(super) end: OwnedFd,
    pub(super) reader: AbortHandle,
    pub(super) is_logged: bool,
}

impl Terminal {
    pub(super) fn follow(end: OwnedFd, is_logged: bool) -> Result<(Console, Self), Error> {
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
        .map_err(Error::system("opening the guest's kernel, initrd and image"))?;
    let (kernel_child, path) = kernel.share().map_err(Error::system("copying the guest's kernel"))?;
    let (root_child, arguments) = root.share(&boot.root).map_err(Error::system("copying the guest's initrd"))?;
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

/// Whether the machine has a place for the bridge.
pub(super) fn has_bridge(settings: &QemuSettings) -> bool {
    settings.machine.contains("q35")
}

/// The bridge of a VM that can change, with the places of its cards, and its disks. What belongs to the host stays on the
/// root bus, as a part of the machine.
pub(super) fn places(settings: &QemuSettings, spec: &VmSpec) -> Result<(Bridge, Disks), Error> {
    let (mut bridge, mut disks) = (Bridge::default(), Disks::default());
    if spec.pluggable && has_bridge(settings) {
        bridge = Bridge::new();
        if settings.disks.driver == DiskDriver::Pmem {
            disks.room = pmem::room(spec.size.memory_mib);
        }
    }
    let too_many = || Error::TooManyDevices {
        count: spec.devices.len(),
        most: pci::MOST,
        remedy: if spec.devices.iter().any(|device| matches!(device, Device::Disk(_))) { disk::MORE } else { "" },
    };
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
            bridge.take(device.id()).ok_or_else(too_many)?;
        } else if matches!(device, Device::Disk(_)) && !disks.controller {
            bridge.take(disk::CONTROLLER).ok_or_else(too_many)?;
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
            let place = bridge.take(&name).ok_or(Error::NoSlot { device: name, remedy: "" })?;
            later.push(device::folder(index, dir.tag, queue_size, Some(place)));
        }
    }
    Ok(later)
}

/// vsock without the host's kernel.
pub(super) fn no_hybrid() -> Error {
    Error::Unsupported { driver: super::NAME, what: "vsock that ends in the VMM".into() }
}

pub(super) fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    use std::os::unix::net::UnixStream as Blocking;
    let (ours, theirs) = Blocking::pair().map_err(Error::system("socketpair"))?;
    Ok((ours.into(), theirs.into()))
}
