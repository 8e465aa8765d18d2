//! Boots virtual machines for anyone.
//!
//! Owns the [`Hypervisor`] and [`Vm`] traits, what a VM is made of ([`VmSpec`]), and a folder a driver. Knows nothing of
//! containers, OCI, containerd or the agent's protocol.
//!
//! A VM is described as data, then launched: there is no half-made VM to be configured. What the host gives to the VMM
//! (sockets, the guest's channel) it gives as open file descriptors, so that the VMM opens nothing by path that could
//! be passed.

pub mod console;
mod error;
mod guest_kernel;
pub mod helper;
mod holes;
pub mod pidfd;
pub mod qemu;
mod spec;

use std::os::fd::OwnedFd;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use self::helper::Helper;
pub use console::Console;
pub use error::Error;
pub use holes::next_data;
pub use spec::{
    Begin, Boot, Channel, Device, Disk, DiskAddress, FileServer, Hello, HostDevice, Image, MemoryWay, NetDevice, Root,
    SharedDir, Size, Snapshot, Verity, VmSpec,
};

/// A VMM driver. Cheap to make: it holds paths and options, no VM.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// The driver's name in messages, for example `qemu`.
    fn name(&self) -> &'static str;

    /// Starts a VM and returns as soon as the VMM runs; the guest is then still booting.
    ///
    /// # Errors
    /// The VMM cannot be started. Nothing is left running.
    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error>;

    /// What the VMM takes of the host's memory beside that of a guest which boots like this, at most, MiB.
    ///
    /// # Errors
    /// As [`Hypervisor::launch`].
    async fn overhead_mib(&self, boot: &Boot) -> Result<u64, Error>;

    /// All that shapes the state of a VM like this one, devices and folders aside, as a text of a few dozen characters: a
    /// saved VM can be cloned for every spec with the same text, and for no other.
    ///
    /// # Errors
    /// As [`Hypervisor::launch`].
    async fn fingerprint(&self, spec: &VmSpec) -> Result<String, Error>;

    /// Takes over a VM that another process of ours has started. `channel` is the guest's serial channel.
    ///
    /// # Errors
    /// What was lent is not of this driver, or not whole.
    async fn adopt(&self, lent: Lent, process: Helper, channel: OwnedFd) -> Result<Box<dyn Vm>, Error>;
}

/// A VM as its driver hands it to another process: what is in it is the driver's business.
#[derive(Debug)]
pub struct Lent {
    /// What it knows of the VM, at most some KB.
    pub about: String,
    /// The VMM's sockets.
    pub fds: Vec<OwnedFd>,
}

/// A VM that runs. Dropping it kills the VMM.
#[async_trait]
pub trait Vm: Send + Sync {
    /// The host's end of the guest's serial channel; `None` when it was taken or the channel is vsock.
    fn take_channel(&mut self) -> Option<OwnedFd>;

    /// The VMM's process.
    fn pid(&self) -> u32;

    /// The threads that run the guest's processors, by their ids on the host.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    async fn vcpu_threads(&self) -> Result<Vec<u32>, Error>;

    /// How the guest's instructions run, for messages: `kvm` or `tcg`.
    fn accelerator(&self) -> &'static str;

    /// Becomes `Some` once, when the VMM is gone for whatever reason.
    fn exit(&self) -> watch::Receiver<Option<VmExit>>;

    /// The last lines that the guest wrote on its console.
    fn console(&self) -> &Console;

    /// The guest runs: what only its boot needed may go.
    fn booted(&self);

    /// Stops the guest for good and writes its devices' state to `to`; its memory is in [`Begin::Template`]'s file.
    ///
    /// # Errors
    /// As [`Vm::pause`], or it could not be written.
    async fn save(&self, to: OwnedFd) -> Result<(), Error>;

    /// Stops the guest's processors.
    ///
    /// # Errors
    /// The VMM refuses or does not answer.
    async fn pause(&self) -> Result<(), Error>;

    /// Lets them go on.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    async fn resume(&self) -> Result<(), Error>;

    /// Adds a device. The guest finds it a moment after this returns.
    ///
    /// # Errors
    /// No slot is free, the VMM refuses or does not answer. Nothing of the device is left.
    async fn plug(&self, device: Device) -> Result<(), Error>;

    /// Takes a device away again, one of the boot as well. The host's side of it is closed at once; returns when the
    /// guest has let go of the rest.
    ///
    /// # Errors
    /// The guest does not let go in time: its slot stays taken until it does.
    async fn unplug(&self, id: &str) -> Result<(), Error>;

    /// Whether a disk stays as long as the VM does, and as large as it is: it can be neither unplugged nor resized.
    fn is_fixed(&self, id: &str) -> bool;

    /// Where the guest sees a device: slot numbers in hexadecimal from the root bus on, as `1e/01`. `None` when there
    /// is no such device or its place is not known.
    fn guest_path(&self, id: &str) -> Option<String>;

    /// Where the guest sees a disk; `None` when there is no such disk.
    fn guest_disk(&self, id: &str) -> Option<DiskAddress>;

    /// Tells the guest that a disk is larger now: its file's or device's size, or `bytes`, to which a file is enlarged.
    ///
    /// # Errors
    /// There is no such disk, the device is smaller, or the VMM refuses.
    async fn resize_disk(&self, id: &str, bytes: u64) -> Result<(), Error>;

    /// Gives the VM to another process, and reads nothing of it any more: [`Hypervisor::adopt`] goes on with it there. Its
    /// process stays this one's.
    ///
    /// # Errors
    /// No descriptor is free.
    async fn lend(&self) -> Result<Lent, Error>;

    /// Waits `grace` for the VMM to end by itself, then kills it. Idempotent; the VMM is gone afterwards.
    ///
    /// # Errors
    /// The process could not be waited for.
    async fn stop(&self, grace: Duration) -> Result<(), Error>;
}

/// Why a VMM is gone.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VmExit {
    /// Exit status or signal, in words.
    pub reason: String,
    /// It ended by itself and found nothing wrong.
    pub is_success: bool,
    /// The last of what it wrote on its standard error.
    pub stderr: String,
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.reason)?;
        if !self.stderr.trim().is_empty() {
            write!(f, ": {}", self.stderr.trim())?;
        }
        Ok(())
    }
}
