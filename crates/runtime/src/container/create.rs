//! A container's own part of `Create`: rootfs and volumes into the share, then the agent's call.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::agent::CreateContainerRequest;
use oci_spec::runtime::Spec;

use super::io::Outputs;
use super::process::Process;
use super::{Belongings, Container, ContainerSpec, Logging, ProcessRef, inherit, spec};
use crate::Error;
use crate::agent_client::AgentClient;
use crate::anchor::Anchor;
use crate::cleanup::{self, Journal, Step};
use crate::direct_volume::Store;
use crate::hooks::Hooks;
use crate::host_work::{HostWork, Progress};
use crate::network::resolver_file;
use crate::pod::{Limits, Role};
use crate::storage::block::{MountedVolume, Plan};
use crate::storage::rootfs;
use crate::storage::share::{PodFolder, guest_path};
use crate::storage::shm::Shm;
use crate::storage::tree;
use crate::storage::volume::{self, Volumes};

/// What has been prepared on the host.
pub(crate) struct Prepared {
    request: CreateContainerRequest,
    /// The names in the share that are the container's.
    pub(crate) shared: Vec<String>,
    hooks: Hooks,
    /// A copy of its root file system's mounts, for the anchor; `None` when the guest has it from elsewhere.
    root: Option<OwnedFd>,
    /// As [`Container::resolver_file`].
    resolver_file: Option<PathBuf>,
    /// Its disks in the VM.
    disks: Vec<String>,
    volumes: Vec<MountedVolume>,
    limits: Limits,
    /// What the guest calls them, and what they are on the host.
    names: Vec<(String, String)>,
}

impl Prepared {
    /// The guest for which it was made is gone: it will be prepared again, for another.
    pub(crate) async fn take_back(self, folder: &Arc<PodFolder>) {
        let folder = Arc::clone(folder);
        in_the_background("taking a container's files back", move || {
            self.hooks.hide();
            release(&folder, &self.shared);
        })
        .await;
    }
}

/// What a pod gives to each of its containers.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    pub(crate) folder: Arc<PodFolder>,
    pub(crate) shm: Option<Shm>,
    pub(crate) policy: spec::Policy,
    /// emptyDirs on disk are the VM's own.
    pub(crate) guest_empty_dir: bool,
    pub(crate) journal: Journal,
    /// The name of the pod's run folder.
    pub(crate) pod: String,
}

/// The host's part; needs no guest, so it is done while the guest boots.
///
/// # Errors
/// What the host refuses, or a source that does not answer, by its name. Nothing is left then, once it has answered.
pub(crate) async fn prepare(
    work: &HostWork,
    given: Given,
    from: &ContainerSpec,
    oci: &Arc<Spec>,
    blocks: Plan,
) -> Result<Prepared, Error> {
    let (from, oci) = (from.clone(), Arc::clone(oci));
    let (folder, journal) = (Arc::clone(&given.folder), given.journal.clone());
    let prepare = move |progress: &Progress| prepare_now(&given, &from, &oci, blocks, progress);
    let undo = move |prepared: Prepared| give_up(&prepared.hooks, &folder, &prepared.shared, &journal);
    work.run_or_undo("the container's files", prepare, undo).await
}

/// Of a container that is not wanted any more. Once the pod's end has begun, which takes everything off, the names may be
/// another pod's.
fn give_up(hooks: &Hooks, folder: &PodFolder, shared: &[String], journal: &Journal) {
    if !journal.is_closed() {
        hooks.hide();
        release(folder, shared);
    }
}

fn prepare_now(
    given: &Given,
    from: &ContainerSpec,
    oci: &Spec,
    mut blocks: Plan,
    progress: &Progress,
) -> Result<Prepared, Error> {
    let Given { folder: share, shm, policy, guest_empty_dir, journal, pod } = given;
    let (policy, guest_empty_dir) = (*policy, *guest_empty_dir);
    if Role::of_spec(oci)? == Role::Sandbox {
        return holder(from, oci, policy);
    }
    // another try may have the container's own name for as long as its files are not taken away
    let own_name = share.shelf().own_or(from.id.as_str());
    let mut shared = vec![own_name.clone()];
    let mut hooks = Hooks::of(&from.id, &from.bundle, oci);
    let mut root = None;
    let outcome = (|| {
        let root_name = format!("{own_name}/rootfs");
        let guest_root = blocks.rootfs.clone().unwrap_or_else(|| guest_path(&root_name));
        let (mut guest, sandbox_pidns) = spec::for_guest(oci, &from.id, guest_root, policy)?;
        let bundle_root = match oci.root() {
            // an absolute path stays as it is
            Some(root) => from.bundle.join(root.path()),
            None => return Err(Error::Invalid("the specification has no root".into())),
        };
        if blocks.rootfs.is_none() {
            share.must_serve("the container's root file system")?;
            let rootfs = share.host_path(&root_name);
            let layers = share.layers_path(&own_name);
            rootfs::connect(&from.rootfs, &bundle_root, &rootfs, &layers, journal, progress)?;
            if !from.rootfs.is_empty() {
                hooks.show(&rootfs, &bundle_root, journal)?;
            }
            root = Some(tree::detached(&rootfs)?);
        }
        for volume in &blocks.direct {
            progress.step(format!("direct volume {}", volume.path.display()))?;
            let user = Store::default().user(&volume.path, pod)?;
            journal.push(Step::Staging(user.clone())).map_err(Error::host("the undo journal"))?;
            Store::record(&user).map_err(Error::host(user.display().to_string()))?;
        }
        let mut volumes = Volumes::default();
        let on_disks = &blocks.volumes;
        let wanted = volume::For { share, id: &from.id, shm: shm.as_ref(), guest_empty_dir, on_disks, progress };
        let connected = volume::connect(wanted, &mut guest, &mut volumes);
        shared.append(&mut volumes.names);
        connected?;
        if let Some(process) = guest.Process.as_mut() {
            inherit::streams(process, &from.stdio);
            inherit::limits(process);
        }
        Ok(CreateContainerRequest {
            container_id: from.id.as_str().into(),
            exec_id: from.id.as_str().into(),
            OCI: Some(guest).into(),
            sandbox_pidns,
            submounts: volumes.submounts,
            storages: blocks.storages.drain(..).chain(volumes.storages).collect(),
            watched: volumes.watched,
            devices: std::mem::take(&mut blocks.devices),
            ..Default::default()
        })
    })();
    match outcome {
        Ok(request) => {
            let Plan { disks, direct: volumes, names, .. } = blocks;
            let resolver_file = resolver_file(oci).map(Path::to_owned);
            let limits = Limits::own(oci);
            Ok(Prepared { request, shared, hooks, root, resolver_file, disks, volumes, limits, names })
        }
        Err(error) => {
            give_up(&hooks, share, &shared, journal);
            Err(error)
        }
    }
}

/// A pod's sandbox: a process of the agent's that holds the namespaces. Nothing of its image is needed, so nothing of it
/// reaches the guest.
fn holder(from: &ContainerSpec, oci: &Spec, policy: spec::Policy) -> Result<Prepared, Error> {
    let (mut guest, _) = spec::for_guest(oci, &from.id, String::new(), spec::Policy { keep_seccomp: false, ..policy })?;
    guest.Mounts.clear();
    let request = CreateContainerRequest {
        container_id: from.id.as_str().into(),
        exec_id: from.id.as_str().into(),
        OCI: Some(guest).into(),
        namespace_holder: true,
        ..Default::default()
    };
    let hooks = Hooks::of(&from.id, &from.bundle, oci);
    Ok(Prepared {
        request,
        shared: Vec::new(),
        hooks,
        root: None,
        resolver_file: None,
        disks: Vec::new(),
        volumes: Vec::new(),
        limits: Limits::own(oci),
        names: Vec::new(),
    })
}

/// Opens where the container's output goes.
pub(crate) async fn outputs(from: &ContainerSpec, logging: &Logging, work: &HostWork) -> Result<Outputs, Error> {
    let name = ProcessRef { container: from.id.clone(), exec: None };
    work.wait(&Outputs::name(&from.stdio), Outputs::open(&from.stdio, &name, logging)).await
}

/// The guest's part, after the hooks that come before it; `anchor` stands for the container there and later.
pub(crate) async fn create(
    agent: &AgentClient,
    mut anchor: Anchor,
    from: &ContainerSpec,
    prepared: Prepared,
    outputs: Result<Outputs, Error>,
    limit: Duration,
) -> Result<(Container, Outputs), Error> {
    let Prepared { request, shared, hooks, root, resolver_file, disks, volumes, limits, names } = prepared;
    let name = ProcessRef { container: from.id.clone(), exec: None };
    let outputs = outputs.inspect_err(|_| hooks.hide())?;
    let shown = async {
        // from here on others see it
        anchor.enter(root).await?;
        hooks.create(anchor.pid()).await
    };
    if let Err(error) = shown.await {
        hooks.hide();
        return Err(error);
    }
    let created = agent
        .call_within("creating the container", Some(limit), |client, context| async {
            client.create_container(context, &request).await
        })
        .await;
    if let Err(error) = created {
        hooks.stopped().await;
        return Err(by_hosts_names(error, &names));
    }
    let init = Arc::new(Process::new(name, from.stdio.clone(), None));
    let has = Belongings { anchor, resolver_file, shared, disks, volumes, limits };
    Ok((Container::new(from.bundle.clone(), init, has, hooks), outputs))
}

/// The guest knows its disks by their places in the VM, and the user by their names on the host.
fn by_hosts_names(error: Error, names: &[(String, String)]) -> Error {
    match error {
        Error::Agent { code, mut message } => {
            for (guest, host) in names {
                message = message.replace(&format!("{guest} "), &format!("{host} "));
            }
            Error::Agent { code, message }
        }
        other => other,
    }
}

/// How long somebody who waits for a container's end waits for its mounts; they go all the same.
const PATIENCE: Duration = Duration::from_secs(2);

/// Takes a container's parts out of the share, off the event loop: the end of a mount may be the end of its file system, which
/// may have data for a server that does not answer.
pub(crate) async fn release_later(folder: &Arc<PodFolder>, names: &[String]) {
    if names.is_empty() {
        return;
    }
    let (folder, names) = (Arc::clone(folder), names.to_vec());
    in_the_background("taking a container's files out of the share", move || release(&folder, &names)).await;
}

async fn in_the_background(what: &str, work: impl FnOnce() + Send + 'static) {
    if tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(work)).await.is_err() {
        tracing::warn!("{what} takes more than {PATIENCE:?}, and is not waited for");
    }
}

/// Takes a container's parts out of the share. Goes on past errors: the sandbox's journal has the whole folder.
///
/// Nothing is looked at that may be mounted: it may be on a file system that does not answer.
pub(crate) fn release(share: &PodFolder, names: &[String]) {
    for name in names {
        if !share.shelf().give_back(name) {
            continue;
        }
        // nothing is mounted on this folder itself
        let layers = Some(share.layers_path(name)).filter(|layers| fs::symlink_metadata(layers).is_ok());
        for path in std::iter::once(share.host_path(name)).chain(layers) {
            let gone = cleanup::unmount_tree(&path).and_then(|()| cleanup::remove_mount_points(&path));
            if let Err(error) = gone {
                tracing::warn!(path = %path.display(), %error, "taking a container's files out of the share");
            }
        }
    }
}
