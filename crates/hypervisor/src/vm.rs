//! A VM that runs: what every VM can do ([`Vm`]), and what some can do besides.

use std::os::fd::OwnedFd;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{Address, Console, Device, Error, Lent};

/// A VM that runs. Dropping it kills the VMM.
#[async_trait]
pub trait Vm: Send + Sync {
    /// The host's end of the guest's serial channel; `None` when it was taken, or the channel is of another kind.
    fn take_channel(&mut self) -> Option<OwnedFd>;

    /// The VMM's process.
    fn pid(&self) -> u32;

    /// The threads that run the guest's processors, by their ids on the host.
    ///
    /// # Errors
    /// The VMM refuses or does not answer.
    async fn vcpu_threads(&self) -> Result<Vec<u32>, Error>;

    /// Becomes `Some` once, when the VMM is gone for whatever reason.
    fn exit(&self) -> watch::Receiver<Option<VmExit>>;

    /// The last lines that the guest wrote on its console.
    fn console(&self) -> &Console;

    /// The guest runs: what only its boot needed may go.
    fn booted(&self) {}

    /// Where the guest sees a device, one of the boot as well; `None` when there is no such device or its place is not known.
    fn address(&self, id: &str) -> Option<Address>;

    /// Waits `grace` for the VMM to end by itself, then kills it. Idempotent; the VMM is gone afterwards.
    ///
    /// # Errors
    /// The process could not be waited for.
    async fn stop(&self, grace: Duration) -> Result<(), Error>;

    /// Devices that come and go while the guest runs.
    fn hotplug(&self) -> Option<&dyn HotPlug> {
        None
    }

    /// What grows while the guest runs.
    fn resize(&self) -> Option<&dyn Resize> {
        None
    }

    /// Saving the guest for clones.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// Giving the VM to another process.
    fn hand_over(&self) -> Option<&dyn HandOver> {
        None
    }
}

impl dyn Vm {
    /// [`Vm::hotplug`], for what cannot do without.
    ///
    /// # Errors
    /// [`Error::Lacks`].
    pub fn must_hotplug(&self) -> Result<&dyn HotPlug, Error> {
        self.hotplug().ok_or(Error::Lacks { what: "devices that come or go while it runs" })
    }

    /// Whether a device stays as long as the VM does.
    pub fn is_fixed(&self, id: &str) -> bool {
        self.hotplug().is_none_or(|hotplug| hotplug.is_fixed(id))
    }
}

/// Devices that come and go.
#[async_trait]
pub trait HotPlug: Send + Sync {
    /// Adds a device. The guest finds it a moment after this returns.
    ///
    /// # Errors
    /// No place is free, the VMM refuses or does not answer. Nothing of the device is left.
    async fn plug(&self, device: Device) -> Result<(), Error>;

    /// Takes a device away again, one of the boot as well. The host's side of it is closed at once; returns when the
    /// guest has let go of the rest.
    ///
    /// # Errors
    /// The guest does not let go in time: its place stays taken until it does.
    async fn unplug(&self, id: &str) -> Result<(), Error>;

    /// Whether a device stays as long as the VM does, and as large as it is: it can be neither unplugged nor resized.
    fn is_fixed(&self, id: &str) -> bool;

    /// How a guest finds devices that came while it heard of none.
    fn rescan(&self) -> Rescan;
}

/// Where a guest looks for devices that came while it was told of none: between its saving and its going on as a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rescan {
    /// The bridge behind which they come, as Kata's protocol writes the path of a PCI device; the whole bus without.
    pub bridge: Option<&'static str>,
    /// The ACPI event by which the VMM tells of them, as Linux names it in /sys/firmware/acpi/interrupts.
    pub acpi_event: Option<&'static str>,
}

/// What grows.
#[async_trait]
pub trait Resize: Send + Sync {
    /// Tells the guest that a disk is larger now: its file's or device's size, or `bytes`, to which a file is enlarged.
    ///
    /// # Errors
    /// There is no such disk, the device is smaller, or the VMM refuses.
    async fn disk(&self, id: &str, bytes: u64) -> Result<(), Error>;
}

/// Saving.
#[async_trait]
pub trait Snapshots: Send + Sync {
    /// Stops the guest for good and writes its devices' state to `to`; its memory is in [`crate::Begin::Template`]'s file.
    ///
    /// # Errors
    /// The VMM refuses or does not answer, or it could not be written.
    async fn save(&self, to: OwnedFd) -> Result<(), Error>;
}

/// Handing over.
#[async_trait]
pub trait HandOver: Send + Sync {
    /// Gives the VM to another process, and reads nothing of it any more: [`crate::Adoption::adopt`] goes on with it there.
    /// Its process stays this one's.
    ///
    /// # Errors
    /// No descriptor is free.
    async fn lend(&self) -> Result<Lent, Error>;
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
    /// The cause, where its driver knows it.
    pub fault: Option<Fault>,
}

/// What a VMM could not go on without.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Fault {
    /// A disk's file was refused.
    Disk {
        /// The device's id.
        id: String,
        /// The VMM's words.
        why: String,
    },
    /// The file of a disk is in use: another VM has locked it.
    DiskInUse {
        /// The device's id.
        id: String,
    },
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
