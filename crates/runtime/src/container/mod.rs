//! A container and its processes as the host sees them: state, exit, streams.
//!
//! The states of a container are those of its first process ([`Status`]). The sandbox reserves the id before the guest makes
//! the container (`making`), so that a second Create with this id is refused at once.
//!
//! ```text
//!  Create           the guest has made it           Start             Pause
//! --------> making ----------------------> created -------> running <--------> paused
//!             |                             |   |              |      Resume      |
//!             | failed               Delete |   | killed       | ended            | ended
//!             v                             |   |              v                  |
//!           (none)                          |   +---------> stopped <-------------+
//!                                           v                  |
//!                                         (none)               | Delete
//!                                                              v
//!                                                            (none)
//! ```
//!
//! An exec begins as `created` too; the guest knows it from its Start on. It stays `running` while its container is paused. A
//! process that ends with its VM has exit status 255, or 137 if the host's kernel killed the VM because memory ran out.

pub(crate) mod create;
mod destination;
pub mod hooks;
pub(crate) mod inherit;
pub(crate) mod io;
pub(crate) mod json;
mod logger;
mod outlet;
mod output;
mod process;
pub(crate) mod spec;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use hooks::Hooks;
pub use json::process as process_from_json;
pub(crate) use logger::Logging;
pub(crate) use process::Process;
pub use process::{Exit, ProcessRef, ProcessView, Status};

use crate::anchor::Anchor;
use crate::pod::Limits;
pub(crate) use crate::request::{ContainerSpec, Stdio};
use crate::storage::block::MountedVolume;
use crate::{Error, ExecId};

/// What containerd asks for with `Exec`.
#[derive(Debug, Clone)]
pub struct ExecSpec {
    /// The process to be.
    pub process: ProcessRef,
    /// As in `config.json`.
    pub spec: oci_spec::runtime::Process,
    /// Where its streams go.
    pub stdio: Stdio,
}

/// A container that was made in the guest.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) bundle: PathBuf,
    pub(crate) init: Arc<Process>,
    execs: Mutex<HashMap<ExecId, Arc<Process>>>,
    /// Stands for its processes on the host.
    pub(crate) anchor: Anchor,
    /// What it has at `/etc/resolv.conf`, on the host: clients may change it until the start.
    pub(crate) resolver_file: Option<PathBuf>,
    /// Names in the shared folder that go with it.
    pub(crate) shared: Vec<String>,
    /// Names of its disks in the VM.
    pub(crate) disks: Vec<String>,
    pub(crate) volumes: Vec<MountedVolume>,
    pub(crate) hooks: Hooks,
    /// What it was made with.
    pub(crate) limits: Limits,
}

/// What of the host's goes with a container.
#[derive(Debug)]
pub(crate) struct Belongings {
    /// As [`Container::anchor`].
    pub(crate) anchor: Anchor,
    /// As [`Container::resolver_file`].
    pub(crate) resolver_file: Option<PathBuf>,
    /// As [`Container::shared`].
    pub(crate) shared: Vec<String>,
    /// As [`Container::disks`].
    pub(crate) disks: Vec<String>,
    /// Its direct volumes.
    pub(crate) volumes: Vec<MountedVolume>,
    pub(crate) limits: Limits,
}

impl Container {
    pub(crate) fn new(bundle: PathBuf, init: Arc<Process>, has: Belongings, hooks: Hooks) -> Self {
        let Belongings { anchor, resolver_file, shared, disks, volumes, limits } = has;
        let execs = Mutex::new(HashMap::new());
        Self { bundle, init, execs, anchor, resolver_file, shared, disks, volumes, hooks, limits }
    }

    pub(crate) fn process(&self, of: &ProcessRef) -> Result<Arc<Process>, Error> {
        match &of.exec {
            None => Ok(Arc::clone(&self.init)),
            Some(exec) => self
                .execs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(exec)
                .cloned()
                .ok_or_else(|| Error::NotFound(format!("process does not exist {exec}"))),
        }
    }

    pub(crate) fn add(&self, exec: ExecId, process: Arc<Process>) -> Result<(), Error> {
        let mut execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        if execs.contains_key(&exec) {
            return Err(Error::Exists(format!("id {exec}")));
        }
        execs.insert(exec, process);
        Ok(())
    }

    pub(crate) fn remove(&self, exec: &ExecId) {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(exec);
    }

    /// Init and execs.
    pub(crate) fn all(&self) -> Vec<Arc<Process>> {
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(&self.init).chain(execs.values()).cloned().collect()
    }
}
