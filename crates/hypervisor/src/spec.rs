//! What a VM is made of: plain data, decided before anything is started.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

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
    /// A cpio archive with `/init`.
    pub initrd: PathBuf,
    /// Added after the driver's own parameters.
    pub kernel_params: String,
}

/// How the host speaks to the guest.
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
}

/// A folder that the guest mounts by virtio-fs.
#[derive(Debug)]
pub struct SharedDir {
    /// The guest's name for it.
    pub tag: &'static str,
    /// A connection to the vhost-user daemon.
    pub socket: OwnedFd,
    /// Entries of the request queue.
    pub queue_size: u32,
}

/// A network card.
#[derive(Debug)]
pub struct NetDevice {
    /// Its MAC address, as `52:54:00:12:34:56`.
    pub mac: String,
    /// Open taps, one a pair of queues.
    pub queues: Vec<OwnedFd>,
}

/// One VM.
#[derive(Debug)]
pub struct VmSpec {
    /// For process titles and messages.
    pub id: String,
    /// Kernel and initrd.
    pub boot: Boot,
    /// Processors and memory.
    pub size: Size,
    /// The agent's channel.
    pub channel: Channel,
    /// Folders; a VM with one has its memory shared with the daemon.
    pub shared_dirs: Vec<SharedDir>,
    /// Network cards.
    pub network: Vec<NetDevice>,
    /// Where the guest's random numbers come from, for example `/dev/urandom`.
    pub entropy_source: PathBuf,
    /// Log what the guest's console says.
    pub debug: bool,
}
