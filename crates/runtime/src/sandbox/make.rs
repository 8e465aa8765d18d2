//! A container that joins a pod which runs.

use std::collections::hash_map::Entry;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use tokio::sync::watch::{Receiver, Sender, channel};
use tokio::time::{Instant, timeout_at};

use super::{Sandbox, Slot, disks, to_the_end, watch};
use crate::anchor::Anchor;
use crate::container::{Container, create, io, spec};
use crate::host_work::{HostWork, Progress};
use crate::storage::block::Plan;
use crate::{ContainerId, ContainerSpec, Error, ProcessRef, ProcessView, Status, Stdio};

impl Sandbox {
    /// Makes another container. Goes on to its end also when nobody waits for it any more: whoever asks for it next, be it
    /// for its deletion, finds it whole.
    ///
    /// # Errors
    /// [`Error::Exists`], or what the host or the guest refused; the sandbox stays as it was.
    pub async fn create_container(&self, from: ContainerSpec) -> Result<(), Error> {
        let place = self.reserve(&from)?;
        let sandbox = self.clone();
        to_the_end("creating", async move {
            let (container, outputs) = sandbox.make(&from, &place).await?;
            let init = Arc::clone(&container.init);
            place.fill(container);
            watch::process(&sandbox.0, init, outputs);
            sandbox.watch_anchor(&from.id);
            sandbox.serve_volumes().await;
            Ok(())
        })
        .await
    }

    /// Waits until a container that is being made is made, or is not. What asks for a container whose creator has gone
    /// away (a client killed, a containerd that died) shall not miss it. One whose files are on a file system of the host
    /// that does not answer is not waited for: it may take its whole deadline.
    pub async fn settled(&self, id: &ContainerId) {
        let Some(mut making) = self.making(id) else { return };
        loop {
            let phase = *making.phase.borrow_and_update();
            let changed = making.phase.changed();
            let is_over = match phase {
                Phase::Host { since } => match timeout_at(since + PROMPT, changed).await {
                    Ok(changed) => changed.is_err(),
                    Err(_) => return,
                },
                Phase::Guest => changed.await.is_err(),
            };
            if is_over {
                return;
            }
        }
    }

    /// As [`Sandbox::settled`], of a container that is not wanted any more: what waits for the host's files is given up, and
    /// what the guest does is waited for.
    pub(super) async fn given_up(&self, id: &ContainerId) {
        let Some(mut making) = self.making(id) else { return };
        making.cancel.send_replace(true);
        // the end of the making is the end of its sender
        while making.phase.changed().await.is_ok() {}
    }

    /// A container that is being made, to those who do not wait for it: created, with no process yet. containerd deletes a
    /// task of that kind.
    pub(super) fn view_of_making(&self, name: &ProcessRef) -> Option<ProcessView> {
        let Making { bundle, stdio, .. } = self.making(&name.container).filter(|_| name.exec.is_none())?;
        Some(ProcessView { pid: 0, status: Status::Created, exit: None, stdio, bundle })
    }

    /// A signal to a container that is being made: one that kills ends the wait for the host's files.
    pub(super) async fn signal_making(&self, name: &ProcessRef, signal: u32) -> Option<Result<(), Error>> {
        self.making(&name.container).filter(|_| name.exec.is_none())?;
        if signal != libc::SIGKILL as u32 {
            return Some(Err(Error::WrongState("process not created".into())));
        }
        self.given_up(&name.container).await;
        // what was past that is a container now
        self.0.made(&name.container).is_none().then_some(Ok(()))
    }

    /// Gives up every container that waits for the host's files.
    pub(super) async fn give_up_all(&self) {
        let ids: Vec<_> = self.containers().keys().cloned().collect();
        for mut making in ids.iter().filter_map(|id| self.making(id)) {
            making.cancel.send_replace(true);
            while matches!(*making.phase.borrow_and_update(), Phase::Host { .. })
                && making.phase.changed().await.is_ok()
            {}
        }
    }

    fn making(&self, id: &ContainerId) -> Option<Making> {
        match self.containers().get(id) {
            Some(Slot::Making(making)) => Some(making.clone()),
            _ => None,
        }
    }

    /// Whether there is such a container, or soon will be.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn knows(&self, id: &ContainerId) -> Result<(), Error> {
        if self.0.has(id) { Ok(()) } else { Err(Error::NotFound(format!("container {id}"))) }
    }

    fn reserve(&self, from: &ContainerSpec) -> Result<Place, Error> {
        let id = &from.id;
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => Err(Error::Exists(format!("container {id}"))),
            Entry::Vacant(entry) => {
                let (tell, phase) = channel(Phase::host());
                let (cancel, cancelled) = channel(false);
                let (bundle, stdio) = (from.bundle.clone(), from.stdio.clone());
                entry.insert(Slot::Making(Making { phase, cancel: Arc::new(cancel), bundle, stdio }));
                Ok(Place { sandbox: self.clone(), id: id.clone(), phase: tell, cancelled })
            }
        }
    }

    async fn make(&self, from: &ContainerSpec, place: &Place) -> Result<(Container, io::Outputs), Error> {
        io::Outputs::check(&from.stdio)?;
        let work = self.0.work.until(place.cancelled.clone());
        let (own, in_guest) = (from.clone(), !self.0.env.config.hypervisor.disable_block_device_use);
        let read = move |progress: &Progress| {
            let oci = spec::read(&own.bundle)?;
            let blocks = disks::wanted(&own, &oci, in_guest, progress)?;
            Ok((Arc::new(oci), blocks))
        };
        let (oci, blocks) = work.run(&spec::name(&from.bundle), read).await?;
        place.phase.send_replace(Phase::Guest);
        let plan = self.plug(from, blocks).await?;
        let plugged = plan.disks.clone();
        let made = self.make_with(from, &oci, plan, &work, place).await;
        if made.is_err() {
            self.unplug(&plugged).await;
        }
        made
    }

    /// The guest's part of a container; its disks are in the VM.
    async fn make_with(
        &self,
        from: &ContainerSpec,
        oci: &Arc<Spec>,
        plan: Plan,
        work: &HostWork,
        place: &Place,
    ) -> Result<(Container, io::Outputs), Error> {
        place.phase.send_replace(Phase::host());
        let runtime = &self.0.env.config.runtime;
        // the host's side is not held meanwhile: neither files nor a guest that do not answer may hold up the stop
        let given = {
            let host = self.0.host.lock().await;
            let host = host.as_ref().ok_or_else(|| Error::WrongState("the sandbox is stopped".into()))?;
            create::Given {
                folder: Arc::clone(host.share.folder()),
                shm: self.0.shm.clone(),
                policy: spec::Policy::of(runtime),
                guest_empty_dir: !runtime.disable_guest_empty_dir,
                journal: host.run.journal(),
                pod: host.run.name().to_owned(),
            }
        };
        let journal = given.journal.clone();
        let prepared = create::prepare(work, given, from, oci, plan).await?;
        let shared = prepared.shared.clone();
        let made = async {
            let anchor = Anchor::start(oci, self.0.namespace.as_fd(), &journal)?;
            let outputs = create::outputs(from, &self.0.logging, work).await;
            place.phase.send_replace(Phase::Guest);
            create::create(&self.0.agent, anchor, from, prepared, outputs, runtime.create_container_timeout).await
        }
        .await;
        self.follow_volumes().await;
        if made.is_err() {
            self.release(&shared).await;
        }
        made
    }

    /// Changes of volumes that the guest has copies of reach it from now on.
    async fn follow_volumes(&self) {
        if let Some(host) = self.0.host.lock().await.as_ref() {
            host.share.folder().watcher().follow(&self.0.agent);
        }
    }

    pub(super) async fn release(&self, shared: &[String]) {
        let folder = self.0.host.lock().await.as_ref().map(|host| Arc::clone(host.share.folder()));
        if let Some(folder) = folder {
            create::release_later(&folder, shared).await;
        }
    }
}

/// The place of a container that is being made; free again when this is dropped before it was filled.
struct Place {
    sandbox: Sandbox,
    id: ContainerId,
    /// Those who wait for the end of the making wait for its drop.
    phase: Sender<Phase>,
    cancelled: Receiver<bool>,
}

/// Files of the host that are there answer sooner, so who asks for a container whose files do not is answered meanwhile.
const PROMPT: Duration = Duration::from_millis(750);

/// A container that is being made, as others see it.
#[derive(Clone)]
pub(super) struct Making {
    phase: Receiver<Phase>,
    cancel: Arc<Sender<bool>>,
    bundle: PathBuf,
    stdio: Stdio,
}

/// What the making waits for.
#[derive(Clone, Copy)]
enum Phase {
    /// The host's files.
    Host { since: Instant },
    /// The VM or its guest.
    Guest,
}

impl Phase {
    fn host() -> Self {
        Self::Host { since: Instant::now() }
    }
}

impl Place {
    fn fill(self, container: Container) {
        self.sandbox.containers().insert(self.id.clone(), Slot::Made(Arc::new(container)));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut containers = self.sandbox.containers();
        if matches!(containers.get(&self.id), Some(Slot::Making(_))) {
            containers.remove(&self.id);
        }
    }
}
