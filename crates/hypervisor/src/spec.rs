//! What a VM is made of: plain data, decided before anything is started.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::{ChannelKind, DeviceKind};

/// Processors and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors at boot.
    pub vcpus: u32,
    /// Memory at boot, MiB.
    pub memory_mib: u64,
}

/// What the guest boots.
#[derive(Debug, Clone)]
pub struct Boot {
    /// A bzImage, or an uncompressed ELF with a PVH note.
    pub kernel: PathBuf,
    /// What its first process is in.
    pub root: Root,
    /// Added after the driver's own parameters.
    pub kernel_params: String,
    /// How a guest that is only tried says that it runs; without, its console is watched.
    pub hello: Option<Hello>,
}

/// How a guest says that it runs.
#[derive(Debug, Clone)]
pub struct Hello {
    /// It writes to the virtio-serial port of this name…
    pub port: &'static str,
    /// …with these kernel parameters besides.
    pub kernel_params: String,
}

/// The guest's root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// A cpio archive with `/init`, which the kernel unpacks into memory.
    Initrd(PathBuf),
    /// A disk.
    Image(Image),
}

impl Root {
    /// The file on the host.
    pub fn path(&self) -> &Path {
        match self {
            Self::Initrd(path) => path,
            Self::Image(image) => &image.path,
        }
    }
}

/// A disk with the guest's root in its first partition and `/sbin/init` in that. Many VMs have the same, none writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The file on the host.
    pub path: PathBuf,
    /// The kernel's name of the file system.
    pub file_system: String,
    /// What the guest's kernel holds every block that it reads against; `None` believes the disk.
    pub verity: Option<Verity>,
    /// It is persistent memory instead of a disk; its size is a multiple of 2 MiB then.
    pub is_memory: bool,
}

/// dm-verity over the first partition, with SHA-256; the hashes are the second partition, without a superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verity {
    /// 64 hexadecimal digits.
    pub root_hash: String,
    /// Hexadecimal digits, or `-` for none.
    pub salt: String,
    /// Blocks of data.
    pub data_blocks: u64,
    /// Bytes of each, a power of two from 512.
    pub data_block_size: u64,
    /// Bytes of a block of hashes, likewise.
    pub hash_block_size: u64,
}

/// How the host speaks to the guest: its end points, which the driver chooses ([`crate::Hypervisor::open_channel`]).
#[derive(Debug)]
pub enum Channel {
    /// A virtio-serial port of this name; the host's end comes with [`crate::Vm::take_channel`].
    Serial {
        /// What the guest reads in `/sys/class/virtio-ports/*/name`.
        port: &'static str,
    },
    /// The kernel's vsock.
    Vsock {
        /// Open `/dev/vhost-vsock` with the CID already claimed.
        vhost: OwnedFd,
        /// The guest's context id.
        cid: u32,
    },
    /// vsock that ends in the VMM. The host connects to `socket` and asks for a port of the guest's (`CONNECT port`); what the
    /// guest connects to at port P of the host arrives at the socket `<socket>_P`.
    HybridVsock {
        /// Where the VMM listens.
        socket: PathBuf,
        /// The guest's context id.
        cid: u32,
    },
}

impl Channel {
    /// Its kind.
    pub fn kind(&self) -> ChannelKind {
        match self {
            Self::Serial { .. } => ChannelKind::Serial,
            Self::Vsock { .. } => ChannelKind::Vsock,
            Self::HybridVsock { .. } => ChannelKind::HybridVsock,
        }
    }
}

/// A folder that the guest mounts.
#[derive(Debug)]
pub struct SharedDir {
    /// The guest's name for it.
    pub tag: &'static str,
    /// Who serves it.
    pub server: FileServer,
}

impl SharedDir {
    /// What the VM that is saved has of it: the device of one that the VMM serves, whose folder is the clone's own affair.
    /// That of a daemon has a state that cannot be saved.
    pub fn of_template(&self) -> Option<Self> {
        match self.server {
            FileServer::VirtioFs { .. } => None,
            FileServer::NineP { .. } => Some(Self { tag: self.tag, server: FileServer::NineP { folder: None } }),
        }
    }
}

/// Who serves a folder.
#[derive(Debug)]
pub enum FileServer {
    /// A vhost-user daemon, by virtio-fs.
    VirtioFs {
        /// How the VMM reaches it.
        socket: DaemonEnd,
        /// Entries of the request queue.
        queue_size: u32,
    },
    /// The VMM itself, by 9p.
    NineP {
        /// The folder, open; none yet in a VM that is saved for its clones.
        folder: Option<OwnedFd>,
    },
}

/// The VMM's end of the way to a vhost-user daemon, of the kind that the driver names ([`crate::DaemonSocket`]).
#[derive(Debug)]
pub enum DaemonEnd {
    /// A connection.
    Connection(OwnedFd),
    /// Where the daemon listens.
    Path(PathBuf),
}

/// Something that a VM is booted with, or gets while it runs.
#[derive(Debug)]
pub enum Device {
    /// A network card.
    Net(NetDevice),
    /// A PCI device of the host.
    Host(HostDevice),
    /// A disk.
    Disk(Disk),
}

impl Device {
    /// The same once more, for a VM that is started in the place of one that did not come up.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let again = |fds: &[OwnedFd]| fds.iter().map(OwnedFd::try_clone).collect::<std::io::Result<Vec<_>>>();
        Ok(match self {
            Self::Net(card) => Self::Net(NetDevice {
                id: card.id.clone(),
                mac: card.mac.clone(),
                queues: again(&card.queues)?,
                vhost: again(&card.vhost)?,
            }),
            Self::Host(device) => Self::Host(device.clone()),
            Self::Disk(disk) => Self::Disk(Disk {
                id: disk.id.clone(),
                file: disk.file.try_clone()?,
                bytes: disk.bytes,
                read_only: disk.read_only,
                shared: disk.shared,
            }),
        })
    }

    /// What it is.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Net(_) => DeviceKind::Net,
            Self::Host(_) => DeviceKind::Host,
            Self::Disk(_) => DeviceKind::Disk,
        }
    }

    /// Its name for [`crate::HotPlug::unplug`].
    pub fn id(&self) -> &str {
        match self {
            Self::Net(card) => &card.id,
            Self::Host(device) => &device.id,
            Self::Disk(disk) => &disk.id,
        }
    }
}

/// A network card.
#[derive(Debug)]
pub struct NetDevice {
    /// The caller's name for it: a letter, then letters and digits; never used twice in a VM.
    pub id: String,
    /// Its MAC address, as `52:54:00:12:34:56`.
    pub mac: String,
    /// Open taps, one a pair of queues.
    pub queues: Vec<OwnedFd>,
    /// `/dev/vhost-net`, opened once for each of `queues`; or nothing: then the VMM copies every frame itself.
    pub vhost: Vec<OwnedFd>,
}

/// A PCI device of the host, bound to `vfio-pci`.
#[derive(Debug, Clone)]
pub struct HostDevice {
    /// As [`NetDevice::id`].
    pub id: String,
    /// Where it is on the host, as `0000:3b:02.1`.
    pub address: String,
}

/// How a VM begins.
#[derive(Debug, Default)]
pub enum Begin {
    /// It boots.
    #[default]
    Boot,
    /// It boots with this file for its memory, to be saved by [`crate::Snapshots::save`].
    Template {
        /// Empty, as long as the memory is large.
        memory: OwnedFd,
    },
    /// It goes on where a saved one stopped. Size, kernel and parameters must be what they were
    /// ([`crate::Hypervisor::fingerprint`]); devices of this VM alone are found when the guest looks for them.
    Clone(Snapshot),
}

/// A saved VM.
#[derive(Debug)]
pub struct Snapshot {
    /// What [`Begin::Template`] had.
    pub memory: OwnedFd,
    /// What [`crate::Snapshots::save`] wrote.
    pub state: OwnedFd,
    /// How the clone gets the memory.
    pub mode: CloneMemory,
}

/// How a clone gets its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloneMemory {
    /// Its own copy of what was used: helpers such as virtiofsd can share it.
    Copied,
    /// The saved file itself, of which it copies only the pages that it writes: helpers cannot share it.
    Private,
}

impl CloneMemory {
    /// In messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Copied => "copied",
            Self::Private => "copy-on-write",
        }
    }
}

/// A regular file or a block device of the host that the guest has as a disk.
#[derive(Debug)]
pub struct Disk {
    /// As [`NetDevice::id`].
    pub id: String,
    /// Open for what the guest may do with it.
    pub file: OwnedFd,
    /// Its size.
    pub bytes: u64,
    /// The guest may only read it, and `file` is open for no more.
    pub read_only: bool,
    /// Others on this host may write it at the same time: it is a raw device, which has no file system that would break.
    pub shared: bool,
}

/// Where the guest finds a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A PCI device: device numbers in hexadecimal from the root bus on, as Kata's protocol writes them (`02/1f`).
    Pci(String),
    /// A unit of the only SCSI controller.
    Scsi {
        /// The target.
        id: u16,
        /// The unit.
        lun: u16,
    },
}

/// One VM.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct VmSpec {
    /// For process titles and messages.
    pub id: String,
    /// How it begins.
    pub begin: Begin,
    /// Kernel and root.
    pub boot: Boot,
    /// Processors and memory.
    pub size: Size,
    /// The agent's channel.
    pub channel: Channel,
    /// Folders; a VM with one has its memory shared with the daemon.
    pub shared_dirs: Vec<SharedDir>,
    /// What it boots with.
    pub devices: Vec<Device>,
    /// Devices can be plugged and unplugged while it runs, which costs the guest a little of its start.
    pub pluggable: bool,
    /// The guest gives back what it has freed, which costs its start a little. Not for a clone of
    /// [`CloneMemory::Private`]: parts of the saved file would be given back.
    pub reclaim: bool,
    /// The host's kernel may keep pages once that are equal in several guests. Not with folders of a daemon's, nor for a
    /// clone of [`CloneMemory::Copied`]: shared memory is never merged.
    pub merge: bool,
    /// Where the guest's random numbers come from, for example `/dev/urandom`.
    pub entropy_source: PathBuf,
    /// Log what the guest's console says.
    pub debug: bool,
}
