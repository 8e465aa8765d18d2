//! The pod: one VM, its containers, and every question that the shim asks about them.
//!
//! The states of a container are drawn in [`crate::container`], those of a pod beside the shim's `Pod` (`shim/src/task.rs`).

mod disks;
mod make;
mod memory;
mod processes;
mod resolver;
mod start;
mod stop;
#[cfg(test)]
mod tests;
mod volumes;
mod watch;

pub use start::FailedStart;

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use agent_api::agent as api;
use hypervisor::{Size, Vm};
use tokio::sync::mpsc;

use crate::agent_client::AgentClient;
use crate::cleanup::RunDir;
use crate::container::{Container, Logging, Process, spec};
use crate::host_work::HostWork;
use crate::machine::Env;
use crate::network::Following;
use crate::pod::Limits;
use crate::storage::disks::Disks;
use crate::storage::share::Share;
use crate::storage::shm::Shm;
use crate::{ContainerId, Error, Exit, ProcessRef, ProcessView, Status, sizing};

/// What is known before the first container.
#[derive(Debug)]
pub struct SandboxSpec {
    /// The pod's id: its first container's.
    pub id: ContainerId,
    /// The caller's namespace, of which log programs are told.
    pub namespace: String,
    /// Its run folder.
    pub run: RunDir,
}

/// Something happened that containerd wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process ended.
    Exit {
        /// Which.
        process: ProcessRef,
        /// How.
        exit: Exit,
        /// As [`Sandbox::pid`] of its container.
        pid: u32,
    },
    /// The guest's kernel killed a process of the container for want of memory, or the host's kernel the whole VM.
    Oom(ContainerId),
}

/// A pod. Clones are handles on the same one.
#[derive(Clone)]
pub struct Sandbox(Arc<Inner>);

struct Inner {
    env: Env,
    /// What the VM was started with.
    size: Size,
    memory: memory::HostMemory,
    agent: AgentClient,
    /// What is done with files of the host.
    work: HostWork,
    /// The pod's own container, with which it ends.
    first: ContainerId,
    namespace: crate::network::Namespace,
    containers: Mutex<HashMap<ContainerId, Slot>>,
    events: mpsc::UnboundedSender<Event>,
    logging: Logging,
    /// What its containers share as `/dev/shm`.
    shm: Option<Shm>,
    /// What the VM has of the host's block devices and images.
    disks: tokio::sync::Mutex<Disks>,
    /// Answers what is asked about volumes; there is nothing without them.
    serving: OnceLock<tokio::task::JoinHandle<()>>,
    /// What must be given back; taken by the stop.
    host: tokio::sync::Mutex<Option<Host>>,
    /// What the stop has taken, until all of it has been given back.
    ending: tokio::sync::Mutex<Option<Host>>,
}

/// A process that has been started, until others are told so.
#[must_use = "its end is told when this is dropped"]
#[derive(Debug)]
pub struct Started(#[expect(dead_code, reason = "held")] tokio::sync::OwnedMutexGuard<()>);

/// A process that has been taken away.
#[derive(Debug, Clone, Copy)]
pub struct Deleted {
    /// As [`Sandbox::pid`] of its container was.
    pub pid: u32,
    /// `None` for one that never ran.
    pub exit: Option<Exit>,
}

/// A container's place, taken before the container is made, so that of two equal creates one is refused.
enum Slot {
    /// Until this ends.
    Making(make::Making),
    Made(Arc<Container>),
}

/// The host's side of a running sandbox.
struct Host {
    vm: Arc<dyn Vm>,
    share: Share,
    run: Arc<RunDir>,
    /// Ends with the sandbox.
    forwarding: Option<crate::network::Forwarding>,
    /// The same.
    names: Option<crate::network::Names>,
    /// Ends with the VM.
    following: Option<Following>,
}

impl Inner {
    /// Whether the guest has processes that have not told their end.
    fn has_running(&self) -> bool {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.values().any(|slot| match slot {
            Slot::Making(_) => true,
            Slot::Made(container) => container.init.exit().is_none(),
        })
    }

    /// A container, if it is made.
    fn made(&self, id: &ContainerId) -> Option<Arc<Container>> {
        match self.containers.lock().unwrap_or_else(PoisonError::into_inner).get(id) {
            Some(Slot::Made(container)) => Some(Arc::clone(container)),
            _ => None,
        }
    }

    fn has(&self, id: &ContainerId) -> bool {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).contains_key(id)
    }

    /// Whether the guest has file systems of its own, whose data may not be on the host yet.
    fn has_disks(&self) -> bool {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.values().any(|slot| matches!(slot, Slot::Made(container) if !container.disks.is_empty()))
    }
}

impl Sandbox {
    /// The process id of a container: of the process that stands for it on the host ([`crate::anchor`]). containerd gets it
    /// for every process of the container, since the guest's ids mean nothing on the host.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn pid(&self, id: &ContainerId) -> Result<u32, Error> {
        self.container(id).map(|container| container.anchor.pid())
    }

    /// Where a process is.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn view(&self, name: &ProcessRef) -> Result<ProcessView, Error> {
        if let Some(view) = self.view_of_making(name) {
            return Ok(view);
        }
        let container = self.container(&name.container)?;
        let process = container.process(name)?;
        Ok(ProcessView {
            pid: container.anchor.pid(),
            status: process.status(),
            exit: process.exit(),
            stdio: process.stdio.clone(),
            bundle: container.bundle.clone(),
        })
    }

    /// Takes an ended (or never started) process away, when it is made. With the last container the whole sandbox goes. Goes
    /// on to its end also when nobody waits for it any more: the making may take longer than containerd waits.
    ///
    /// # Errors
    /// [`Error::WrongState`] while it runs.
    pub async fn delete(&self, name: &ProcessRef) -> Result<Deleted, Error> {
        let (sandbox, name) = (self.clone(), name.clone());
        to_the_end("deleting", async move {
            if name.exec.is_none() {
                sandbox.given_up(&name.container).await;
            }
            // with the container it is forgotten
            let pid = sandbox.pid(&name.container)?;
            let exit = sandbox.delete_now(&name).await?;
            Ok(Deleted { pid, exit })
        })
        .await
    }

    async fn delete_now(&self, name: &ProcessRef) -> Result<Option<Exit>, Error> {
        let container = self.container(&name.container)?;
        let process = container.process(name)?;
        let _changing = process.changing.lock().await;
        // another deletion may have gone before
        if !Arc::ptr_eq(&self.container(&name.container)?, &container) {
            return Err(Error::NotFound(format!("container {}", name.container)));
        }
        if matches!(process.status(), Status::Running | Status::Paused) {
            return Err(Error::WrongState(format!("cannot delete a {} process", process.status().name())));
        }
        if process.exit().is_some() {
            // what was written before the exit is delivered before the process is forgotten
            process.output.before_the_delete(|| self.0.agent.round_trip()).await;
        }
        if let Some(exec) = &name.exec {
            container.remove(exec);
        } else {
            self.remove_container(&container, &name.container).await?;
            container.hooks.stopped().await;
        }
        if process.status() == Status::Created {
            // what never ran does not end either: nobody is told
            process.ended(0);
        }
        Ok(process.exit())
    }

    async fn remove_container(&self, container: &Container, id: &ContainerId) -> Result<(), Error> {
        // it holds the root file system
        container.anchor.end().await;
        if *id == self.0.first {
            // nobody can be in a pod without it
            self.give_up_all().await;
        }
        let last = {
            let containers = self.containers();
            containers.keys().all(|other| other == id)
        };
        if last {
            self.stop().await?;
        } else {
            let request = api::RemoveContainerRequest { container_id: id.as_str().into(), ..Default::default() };
            let removed = self
                .0
                .agent
                .call("removing the container", |client, context| async {
                    client.remove_container(context, &request).await
                })
                .await;
            match removed {
                // with its VM everything of it in the guest is gone
                Ok(_) | Err(Error::VmGone { .. }) => {}
                Err(error) => return Err(error),
            }
            self.release(&container.shared).await;
            self.unplug(&container.disks).await;
        }
        self.containers().remove(id);
        Ok(())
    }

    /// Ends the VM and gives everything back to the host. Idempotent.
    ///
    /// # Errors
    /// Something could not be given back; the rest was.
    pub async fn stop(&self) -> Result<(), Error> {
        stop::stop(&self.0).await
    }

    /// No container is left.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless it runs.
    pub async fn pause(&self, id: &ContainerId) -> Result<(), Error> {
        let container = self.in_state(id, Status::Running, |status| format!("cannot pause a {status} container"))?;
        let request = api::PauseContainerRequest { container_id: id.as_str().into(), ..Default::default() };
        self.0
            .agent
            .call("pausing", |client, context| async { client.pause_container(context, &request).await })
            .await?;
        container.init.advance(Status::Paused)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless it is paused.
    pub async fn resume(&self, id: &ContainerId) -> Result<(), Error> {
        let container = self.in_state(id, Status::Paused, |status| format!("cannot resume a {status} process"))?;
        let request = api::ResumeContainerRequest { container_id: id.as_str().into(), ..Default::default() };
        self.0
            .agent
            .call("resuming", |client, context| async { client.resume_container(context, &request).await })
            .await?;
        container.init.advance(Status::Running)
    }

    /// With runc's words for one that is in another state.
    fn in_state(
        &self,
        id: &ContainerId,
        wanted: Status,
        words: impl FnOnce(&str) -> String,
    ) -> Result<Arc<Container>, Error> {
        let container = self.container(id)?;
        let status = container.init.status();
        if status != wanted {
            return Err(Error::WrongState(words(status.name())));
        }
        Ok(container)
    }

    /// The container's processes on the host: the one of [`Sandbox::pid`] while the container runs. Clients look the ids up
    /// on the host, so the guest's are none of them.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn pids(&self, id: &ContainerId) -> Result<Vec<u32>, Error> {
        let container = self.container(id)?;
        let is_alive = container.init.exit().is_none();
        Ok(is_alive.then(|| container.anchor.pid()).into_iter().collect())
    }

    /// What the container uses.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the guest said.
    pub async fn stats(&self, id: &ContainerId) -> Result<api::StatsContainerResponse, Error> {
        self.container(id)?;
        let request = api::StatsContainerRequest { container_id: id.as_str().into(), ..Default::default() };
        self.0
            .agent
            .call("reading statistics", |client, context| async { client.stats_container(context, &request).await })
            .await
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// [`Error::NotFound`], a limit that the guest cannot keep, or what the guest said.
    pub async fn update(&self, id: &ContainerId, limits: &oci_spec::runtime::LinuxResources) -> Result<(), Error> {
        let container = self.container(id)?;
        sizing::check_update(self.0.size, container.limits, Limits::of_resources(limits))?;
        let mut resources = agent_api::oci_convert::resources(limits)?;
        spec::for_guest_resources(&mut resources)?;
        let request = api::UpdateContainerRequest {
            container_id: id.as_str().into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.0
            .agent
            .call("updating limits", |client, context| async { client.update_container(context, &request).await })
            .await
            .map(drop)
    }

    /// Sets a terminal's size, characters; that of an exec also before its start.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the guest said.
    pub async fn resize(&self, name: &ProcessRef, width: u32, height: u32) -> Result<(), Error> {
        let process = self.process(name)?;
        let mut _changing = None;
        if name.exec.is_some() && process.status() == Status::Created {
            // a start that is under way has looked at what was kept
            _changing = Some(process.changing.lock().await);
        }
        match process.status() {
            Status::Stopped => return Ok(()),
            // its terminal is made by its start
            Status::Created if name.exec.is_some() && process.stdio.terminal => {
                process.keep_size(width, height);
                return Ok(());
            }
            Status::Created if name.exec.is_some() => {
                return Err(Error::WrongState("the process has no terminal".into()));
            }
            _ => {}
        }
        let request = api::TtyWinResizeRequest {
            container_id: name.container.as_str().into(),
            exec_id: name.wire_exec(),
            row: height,
            column: width,
            ..Default::default()
        };
        self.0
            .agent
            .call("resizing the terminal", |client, context| async { client.tty_win_resize(context, &request).await })
            .await
            .map(drop)
    }

    /// No more input for the process than what is in its pipe.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn close_stdin(&self, name: &ProcessRef) -> Result<(), Error> {
        self.process(name)?.close_stdin.notify_one();
        Ok(())
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<ContainerId, Slot>> {
        self.0.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &ContainerId) -> Result<Arc<Container>, Error> {
        self.0.made(id).ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    fn process(&self, name: &ProcessRef) -> Result<Arc<Process>, Error> {
        self.container(&name.container)?.process(name)
    }
}

/// runc's word for a signal that comes too late.
fn finished() -> Error {
    Error::NotFound("process already finished".into())
}

/// Does `work` as a task of its own: a caller that goes away must not leave half of it.
async fn to_the_end<T: Send + 'static>(
    what: &'static str,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(Error::Host { what: what.into(), source: std::io::Error::other(error) }))
}

/// How long the guest may take to write its caches back before its VM is ended.
const GOODBYE: Duration = Duration::from_secs(5);
