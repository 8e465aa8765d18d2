//! A container that joins a pod which runs.

use std::collections::hash_map::Entry;
use std::os::fd::AsFd;
use std::sync::Arc;

use oci_spec::runtime::Spec;
use tokio::sync::watch::{Sender, channel};

use super::{Sandbox, Slot, disks, to_the_end, watch};
use crate::anchor::Anchor;
use crate::container::{Container, create, io, spec};
use crate::storage::block::Plan;
use crate::{ContainerId, ContainerSpec, Error};

impl Sandbox {
    /// Makes another container. Goes on to its end also when nobody waits for it any more: whoever asks for it next, be it
    /// for its deletion, finds it whole.
    ///
    /// # Errors
    /// [`Error::Exists`], or what the host or the guest refused; the sandbox stays as it was.
    pub async fn create_container(&self, from: ContainerSpec) -> Result<(), Error> {
        let place = self.reserve(&from.id)?;
        let sandbox = self.clone();
        to_the_end("creating", async move {
            let (container, outputs) = sandbox.make(&from).await?;
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
    /// away (a client killed, a containerd that died) shall not miss it.
    pub async fn settled(&self, id: &ContainerId) {
        let mut making = match self.containers().get(id) {
            Some(Slot::Making(making)) => making.clone(),
            _ => return,
        };
        // nothing is ever sent: the end of the making is the end of its sender
        let _ = making.changed().await;
    }

    /// Whether there is such a container, or soon will be.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn knows(&self, id: &ContainerId) -> Result<(), Error> {
        if self.0.has(id) { Ok(()) } else { Err(Error::NotFound(format!("container {id}"))) }
    }

    fn reserve(&self, id: &ContainerId) -> Result<Place, Error> {
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => Err(Error::Exists(format!("container {id}"))),
            Entry::Vacant(entry) => {
                let (making, made) = channel(());
                entry.insert(Slot::Making(made));
                Ok(Place { sandbox: self.clone(), id: id.clone(), _making: making })
            }
        }
    }

    async fn make(&self, from: &ContainerSpec) -> Result<(Container, io::Outputs), Error> {
        io::Outputs::check(&from.stdio)?;
        let oci = spec::read(&from.bundle)?;
        let policy = spec::Policy::of(&self.0.env.config.runtime);
        let blocks = disks::wanted(from, &oci, &self.0.env.config.hypervisor)?;
        let plan = self.plug(from, blocks).await?;
        let plugged = plan.disks.clone();
        let made = self.make_with(from, &oci, plan, policy).await;
        if made.is_err() {
            self.unplug(&plugged).await;
        }
        made
    }

    /// The guest's part of a container; its disks are in the VM.
    async fn make_with(
        &self,
        from: &ContainerSpec,
        oci: &Spec,
        plan: Plan,
        policy: spec::Policy,
    ) -> Result<(Container, io::Outputs), Error> {
        // the host's side is held for the host's part only: a guest that does not answer must not hold up the stop
        let (prepared, journal) = {
            let mut host = self.0.host.lock().await;
            let host = host.as_mut().ok_or_else(|| Error::WrongState("the sandbox is stopped".into()))?;
            let guest_empty_dir = !self.0.env.config.runtime.disable_guest_empty_dir;
            let given = create::Given { share: &host.share, shm: self.0.shm.as_ref(), policy, guest_empty_dir };
            (create::prepare(given, from, oci, plan, &mut host.run)?, host.run.journal())
        };
        let shared = prepared.shared.clone();
        let anchor = Anchor::start(oci, self.0.namespace.as_fd(), &journal);
        let limit = self.0.env.config.runtime.create_container_timeout;
        let made = match anchor {
            Ok(anchor) => create::create(&self.0.agent, anchor, from, prepared, &self.0.logging, limit).await,
            Err(error) => Err(error),
        };
        self.follow_volumes().await;
        if made.is_err() {
            self.release(&shared).await;
        }
        made
    }

    /// Changes of volumes that the guest has copies of reach it from now on.
    async fn follow_volumes(&self) {
        if let Some(host) = self.0.host.lock().await.as_ref() {
            host.share.watcher().follow(&self.0.agent);
        }
    }

    pub(super) async fn release(&self, shared: &[String]) {
        if let Some(host) = self.0.host.lock().await.as_ref() {
            create::release(&host.share, shared);
        }
    }
}

/// The place of a container that is being made; free again when this is dropped before it was filled.
struct Place {
    sandbox: Sandbox,
    id: ContainerId,
    /// Those who wait for the end of the making wait for its drop.
    _making: Sender<()>,
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
