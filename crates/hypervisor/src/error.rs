//! What can go wrong with a VMM, in terms that tell a driver's user what to do.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A VMM could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The program could not be run.
    #[error("cannot run {what} {}: {source}: install it or set `{key}` in configuration.toml", .binary.display())]
    Spawn {
        /// What the program is for.
        what: &'static str,
        /// Its path.
        binary: PathBuf,
        /// The configuration's key.
        key: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The VMM refused a command.
    #[error("{call} refused by the VMM: {answer}")]
    Refused {
        /// The command.
        call: String,
        /// What it said.
        answer: String,
    },
    /// A command named a device that the VM does not have.
    #[error("{call} refused by the VMM: {answer}")]
    NoDevice {
        /// The command.
        call: String,
        /// What the VMM said.
        answer: String,
    },
    /// No answer came.
    #[error("the VMM did not answer {call} within {after:?}")]
    Timeout {
        /// The command.
        call: String,
        /// The limit that passed.
        after: Duration,
    },
    /// The VM has no room for more, or was booted without any.
    #[error("no slot is free for {device}{}", after(.remedy))]
    NoSlot {
        /// The device's id.
        device: String,
        /// What has room for more; empty where nothing has.
        remedy: &'static str,
    },
    /// A VM, maybe this one, has for itself what is wanted.
    #[error("the file of {device} is in use: a VM has locked it")]
    InUse {
        /// The device's id.
        device: String,
    },
    /// The VMM refused a disk's file.
    #[error("the file of {device}: {why}")]
    Disk {
        /// The device's id.
        device: String,
        /// The VMM's words.
        why: String,
    },
    /// The VM would have more devices than places for them.
    #[error("{count} devices: a VM can have at most {most}{}", after(.remedy))]
    TooManyDevices {
        /// Wanted.
        count: usize,
        /// Possible.
        most: usize,
        /// What has room for more; empty where nothing has.
        remedy: &'static str,
    },
    /// The driver has no such part.
    #[error("hypervisor {driver} has no support for {what}")]
    Unsupported {
        /// The driver.
        driver: &'static str,
        /// What is wanted.
        what: String,
    },
    /// This VM cannot do that.
    #[error("the hypervisor of this VM does not support {what}")]
    Lacks {
        /// What is wanted.
        what: &'static str,
    },
    /// A VM could not be saved, or did not go on from what was saved.
    #[error("{what} a VM: {why}")]
    Snapshot {
        /// Saving or restoring.
        what: &'static str,
        /// The VMM's words.
        why: String,
    },
    /// The VMM is gone.
    #[error("the VMM has exited")]
    Gone,
    /// A setting asks for what this host does not have.
    #[error("{key} = {value:?} is set, but {why}: {remedy}")]
    Setting {
        /// The configuration's key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is in the way.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The operating system refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A remedy, where there is one.
fn after(remedy: &str) -> String {
    if remedy.is_empty() { String::new() } else { format!(": {remedy}") }
}

impl Error {
    /// For `map_err`: names what was tried.
    pub fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}
