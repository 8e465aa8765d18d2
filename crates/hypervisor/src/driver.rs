//! The border between the sandbox and a VMM: what every driver does ([`Hypervisor`]), and what some can do besides.
//!
//! The optional parts are accessors that answer `None`. A caller asks for the part that it needs, and degrades, or refuses with
//! the names of the part and the driver, where there is none; it never asks which driver it has.

use std::os::fd::OwnedFd;
use std::path::Path;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::{Boot, Capabilities, Channel, ChannelKind, Error, Vm, VmExit, VmSpec};

/// A VMM driver. Cheap to make: it holds paths and options, no VM.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// The driver's name in messages.
    fn name(&self) -> &'static str;

    /// What its VMs can have.
    fn capabilities(&self) -> &Capabilities;

    /// Takes what a channel of this kind needs on the host, before there is a VM: an address that is the VM's alone, or a
    /// path of a socket.
    ///
    /// # Errors
    /// The host does not have it (the error's kind is `NotFound` where that is ordinary), or the driver does not know it.
    fn open_channel(&self, kind: ChannelKind, names: ChannelNames<'_>) -> Result<Channel, Error>;

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

    /// Taking over VMs that another process of ours has started.
    fn adoption(&self) -> Option<&dyn Adoption> {
        None
    }
}

/// What a channel is called where it needs a name.
#[derive(Debug, Clone, Copy)]
pub struct ChannelNames<'a> {
    /// What a guest finds as the name of a serial port.
    pub serial_port: &'static str,
    /// Where sockets may be made.
    pub folder: &'a Path,
}

/// The receiving end of [`crate::HandOver`].
#[async_trait]
pub trait Adoption: Send + Sync {
    /// Goes on with a VM that was lent. `channel` is the guest's serial channel.
    ///
    /// # Errors
    /// What was lent is not of this driver, or not whole.
    async fn adopt(&self, lent: Lent, process: LentProcess, channel: OwnedFd) -> Result<Box<dyn Vm>, Error>;
}

/// A VM as its driver hands it to another process: what is in it is the driver's business.
#[derive(Debug)]
pub struct Lent {
    /// What it knows of the VM, at most some KB.
    pub about: String,
    /// The VMM's sockets.
    pub fds: Vec<OwnedFd>,
}

/// The VMM's process, which is another's child.
#[derive(Debug)]
pub struct LentProcess {
    /// Its process id.
    pub pid: u32,
    /// A pidfd of it.
    pub process: OwnedFd,
    /// Where its parent says why it has ended.
    pub exit: oneshot::Receiver<VmExit>,
}
