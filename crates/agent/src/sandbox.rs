//! The pod in the guest: its containers and what it has mounted. The VM's own IPC and UTS namespaces are the pod's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_api::agent as api;
use agent_api::oci::LinuxResources;
use agent_api::{limits, paths};

use crate::cgroup::{self, Cgroup};
use crate::container::{Container, Plan};
use crate::device;
use crate::error::Error;
use crate::oom::OomWatch;
use crate::process::Process;
use crate::reaper::Reaper;
use crate::storage::{self, Entered};
use crate::watched::Watched;

/// The state of the guest.
pub(crate) struct Sandbox {
    reaper: Reaper,
    pub(crate) oom: OomWatch,
    /// `None` while a container is being made.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    hostname: Mutex<String>,
    /// The first container's first process, whose PID namespace is the pod's.
    first: Mutex<Option<Arc<Process>>>,
    /// Mount points of the sandbox that have caches to be written back.
    mounts: Mutex<Vec<String>>,
    pub(crate) watched: Watched,
    entered: Entered,
    /// The first container's.
    ready: Mutex<Option<Cgroup>>,
    /// How long a plugged disk may take to appear.
    patience: Duration,
}

/// Ids become folder names.
pub(crate) fn check_id(kind: &str, id: &str) -> Result<(), Error> {
    let fine = !id.is_empty()
        && id.len() <= limits::ID
        && id != "."
        && id != ".."
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if fine {
        Ok(())
    } else {
        let shown: String = id.chars().take(80).collect();
        Err(Error::Invalid(format!("{kind} id {shown:?} must be 1 to {} of A-Z a-z 0-9 _ . -", limits::ID)))
    }
}

impl Sandbox {
    pub(crate) fn new(reaper: Reaper, oom: OomWatch, patience: Duration) -> Self {
        let (containers, hostname, first, mounts, watched, entered, ready) = Default::default();
        Self { reaper, oom, containers, hostname, first, mounts, watched, entered, ready, patience }
    }

    /// Makes what the first container will need, whatever it is.
    pub(crate) fn prepare(&self) {
        match Cgroup::ready() {
            Ok(cgroup) => {
                self.oom.add(cgroup::READY, cgroup.memory_events());
                *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(cgroup);
            }
            // it is tried again for the container, where somebody hears of it
            Err(error) => crate::log::debug(&error.to_string()),
        }
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn create(&self, request: &api::CreateSandboxRequest) -> Result<(), Error> {
        if !request.kernel_modules.is_empty() {
            return Err(Error::Unsupported("loading kernel modules, which this kernel has built in,".into()));
        }
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname).map_err(Error::failed("setting the host name"))?;
            self.hostname.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&request.hostname);
        }
        if !request.dns.is_empty() {
            write_resolver(&request.dns).map_err(Error::failed("writing /etc/resolv.conf of the guest"))?;
        }
        for storage in &request.storages {
            let point = storage::connect(storage, self.patience).await?;
            if storage.driver != "virtio-fs" {
                self.mounts.lock().unwrap_or_else(PoisonError::into_inner).push(point);
            }
        }
        Ok(())
    }

    /// Ends every container and unmounts what has caches, so that everything written is on the host.
    ///
    /// Not virtio-fs, and no sync(2): it writes through, also for memory maps when they end (the kernel's fs/fuse), and
    /// asking it to sync makes the host write back the dirty data of everybody: seconds on a busy one.
    pub(crate) async fn destroy(&self) {
        // they stay known: nothing is removed that goes with the machine
        let all: Vec<_> = self.containers().values().flatten().cloned().collect();
        for container in &all {
            if let Err(error) = container.end().await {
                crate::log::warn(&error.to_string());
            }
        }
        answered();
        for container in all {
            // a disk's file system is whole only when its last mount has gone
            container.unmount();
            container.mounts.iter().rev().for_each(|point| storage::disconnect(point));
        }
        let mounts = std::mem::take(&mut *self.mounts.lock().unwrap_or_else(PoisonError::into_inner));
        mounts.iter().rev().for_each(|point| storage::disconnect(point));
    }

    pub(crate) async fn create_container(&self, request: api::CreateContainerRequest) -> Result<(), Error> {
        let id = request.container_id;
        check_id("container", &id)?;
        let spec = request
            .OCI
            .into_option()
            .ok_or_else(|| Error::Invalid("the request has no container specification".into()))?;
        for (name, present) in [
            ("a container specification without process", spec.Process.is_none()),
            ("a container specification without root", spec.Root.is_none() && !request.namespace_holder),
            ("a container specification without linux", spec.Linux.is_none()),
            ("a hook other than startContainer", spec.Hooks.as_ref().is_some_and(has_other_hooks)),
            ("a sandbox container with a terminal", request.namespace_holder && spec.Process.Terminal),
        ] {
            if present {
                return Err(Error::Unsupported(name.into()));
            }
        }
        let pids_of = self.pids_of(request.sandbox_pidns)?;
        {
            let mut containers = self.containers();
            if containers.contains_key(&id) {
                return Err(Error::Exists(format!("container {id}")));
            }
            containers.insert(id.clone(), None);
        }
        let plan = Plan {
            own_hostname: !spec.Hostname.is_empty()
                && *self.hostname.lock().unwrap_or_else(PoisonError::into_inner) != spec.Hostname,
            spec,
            mounts: Vec::new(),
            volumes: Vec::new(),
            holder: request.namespace_holder,
            pids_of,
            submounts: request.submounts,
        };
        let made = self.make(&id, plan, &request.storages, &request.watched, &request.devices).await;
        let mut containers = self.containers();
        match made {
            Ok(container) => {
                self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| container.init());
                containers.insert(id, Some(Arc::new(container)));
            }
            Err(error) => {
                containers.remove(&id);
                // its limits may have made the scheduler mind cgroups
                weigh(&containers);
                return Err(error);
            }
        }
        weigh(&containers);
        Ok(())
    }

    pub(crate) fn limit(&self, id: &str, resources: &LinuxResources) -> Result<(), Error> {
        let limited = self.container(id)?.cgroup.limit(resources);
        weigh(&self.containers());
        limited
    }

    /// Whose processes a container sees beside its own.
    fn pids_of(&self, shared: bool) -> Result<Option<Arc<Process>>, Error> {
        if !shared {
            return Ok(None);
        }
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).clone();
        first.map(Some).ok_or_else(|| Error::State("the pod has no PID namespace to share yet".into()))
    }

    async fn make(
        &self,
        id: &str,
        mut plan: Plan,
        storages: &[api::Storage],
        watched: &[api::WatchedVolume],
        devices: &[api::Device],
    ) -> Result<Container, Error> {
        let mut mounts = Vec::new();
        let outcome = async {
            device::translate(devices, &mut plan.spec, self.patience).await?;
            for storage in storages {
                if storage.shared {
                    self.connect_shared(storage)?;
                } else {
                    mounts.push(storage::connect(storage, self.patience).await?);
                }
            }
            for volume in watched {
                self.watched.refresh(volume)?;
            }
            plan.mounts.clone_from(&mounts);
            plan.volumes = self.entered.enter(&plan.spec);
            let volumes = plan.volumes.clone();
            let ready = || self.ready.lock().unwrap_or_else(PoisonError::into_inner).take();
            let made = Container::create(id, plan, ready, &self.reaper).await;
            made.inspect_err(|_| self.entered.leave(&volumes))
        }
        .await;
        if outcome.is_err() {
            for point in mounts.iter().rev() {
                storage::disconnect(point);
            }
        }
        outcome
    }

    /// Lives as long as the sandbox; every container that has it names it.
    fn connect_shared(&self, storage: &api::Storage) -> Result<(), Error> {
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        if storage.driver == "local" {
            // nothing is mounted, and nothing is to be written back
            storage::connect_now(storage)?;
        } else if !mounts.contains(&storage.mount_point) {
            mounts.push(storage::connect_now(storage)?);
        }
        Ok(())
    }

    pub(crate) fn start_container(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        self.oom.add(id, container.cgroup.memory_events());
        // what the host has changed since the container was made is seen by its first process
        storage::renew();
        container.start()
    }

    pub(crate) async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.end().await?;
        for point in container.mounts.iter().rev() {
            storage::disconnect(point);
        }
        answered();
        container.unmount();
        self.oom.remove(id);
        self.containers().remove(id);
        self.entered.leave(&container.volumes);
        // with it its namespace is gone: the next one's is the pod's
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take_if(|first| Arc::ptr_eq(first, &container.init()));
        Ok(())
    }

    pub(crate) async fn exec(&self, request: &api::ExecProcessRequest) -> Result<(), Error> {
        check_id("exec", &request.exec_id)?;
        let process =
            request.process.as_ref().ok_or_else(|| Error::Invalid("the exec request has no process".into()))?;
        storage::renew();
        self.container(&request.container_id)?.exec(&request.exec_id, process, &self.reaper).await
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.containers().get(id).cloned().flatten().ok_or_else(|| Error::NotFound(format!("container {id:.80}")))
    }
}

/// Where the guest is translated (elsewhere a weight counts at once): lets the containers' weights count when there are two that
/// work, or when the scheduler minds cgroups anyway. For one alone it would go through a hierarchy at each wake-up and
/// sleep, 8 % of all instructions of a TCP round trip, to no end.
fn weigh(containers: &HashMap<String, Option<Arc<Container>>>) {
    let all = || containers.values().flatten();
    let is_wanted = all().filter(|one| !one.is_holder()).count() > 1 || all().any(|one| one.cgroup.is_weighed());
    for container in all().filter(|_| is_wanted) {
        if let Err(error) = container.cgroup.weigh() {
            crate::log::warn(&error.to_string());
        }
    }
}

/// Asks virtio-fs for something, which is answered after all that was asked before: the mounts of containers that have
/// ended may go then.
fn answered() {
    if let Err(errno) = nix::sys::statfs::statfs(paths::SHARED) {
        crate::log::debug(&format!("statfs of the shared folder: {errno}"));
    }
}

/// Names are resolved by whatever runs in the guest itself; containers bring their own file.
fn write_resolver(lines: &[String]) -> std::io::Result<()> {
    std::fs::create_dir_all("/etc")?;
    std::fs::write("/etc/resolv.conf", lines.join("\n") + "\n")
}

/// Those are the host's.
fn has_other_hooks(hooks: &agent_api::oci::Hooks) -> bool {
    [&hooks.Prestart, &hooks.Poststart, &hooks.Poststop, &hooks.CreateRuntime, &hooks.CreateContainer]
        .iter()
        .any(|list| !list.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_id_is_one_folder_name(id in ".*") {
            if check_id("container", &id).is_ok() {
                let path = std::path::Path::new("/run").join(&id);
                prop_assert_eq!(path.parent(), Some(std::path::Path::new("/run")));
                prop_assert!(path.file_name().is_some());
            }
        }
    }
}
