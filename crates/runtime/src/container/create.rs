//! A container's own part of `Create`: rootfs and volumes into the share, then the agent's call.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::agent::CreateContainerRequest;
use oci_spec::runtime::Spec;

use super::io::Outputs;
use super::process::Process;
use super::{Belongings, Container, ContainerSpec, Logging, ProcessRef, inherit, spec};
use crate::Error;
use crate::agent_client::AgentClient;
use crate::anchor::Anchor;
use crate::cleanup::{self, RunDir, Step};
use crate::direct_volume::Store;
use crate::hooks::Hooks;
use crate::network::resolver_file;
use crate::pod::Role;
use crate::storage::block::{MountedVolume, Plan};
use crate::storage::rootfs;
use crate::storage::share::{Share, guest_path};
use crate::storage::shm::Shm;
use crate::storage::tree;
use crate::storage::volume::{self, Volumes};

/// What has been prepared on the host.
pub(crate) struct Prepared {
    request: CreateContainerRequest,
    /// The names in the share that are the container's.
    pub(crate) shared: Vec<String>,
    hooks: Hooks,
    /// Its root file system on the host; `None` when the guest has it from elsewhere.
    root: Option<PathBuf>,
    /// As [`Container::resolver_file`].
    resolver_file: Option<PathBuf>,
    /// Its disks in the VM.
    disks: Vec<String>,
    volumes: Vec<MountedVolume>,
    /// What the guest calls them, and what they are on the host.
    names: Vec<(String, String)>,
}

impl Prepared {
    /// The guest for which it was made is gone: it will be prepared again, for another.
    pub(crate) fn take_back(self, share: &Share) {
        self.hooks.hide();
        release(share, &self.shared);
    }
}

/// What a pod gives to each of its containers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Given<'a> {
    pub(crate) share: &'a Share,
    pub(crate) shm: Option<&'a Shm>,
    pub(crate) policy: spec::Policy,
    /// emptyDirs on disk are the VM's own.
    pub(crate) guest_empty_dir: bool,
}

/// The host's part; needs no guest, so it is done while the guest boots.
pub(crate) fn prepare(
    given: Given<'_>,
    from: &ContainerSpec,
    oci: &Spec,
    mut blocks: Plan,
    run: &mut RunDir,
) -> Result<Prepared, Error> {
    let Given { share, shm, policy, guest_empty_dir } = given;
    if Role::of_spec(oci)? == Role::Sandbox {
        return holder(from, oci, policy);
    }
    let mut shared = vec![from.id.as_str().to_owned()];
    let mut hooks = Hooks::of(&from.id, &from.bundle, oci);
    let mut root = None;
    let outcome = (|| {
        let root_name = format!("{}/rootfs", from.id);
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
            rootfs::connect(&from.rootfs, &bundle_root, &rootfs, &share.layers_path(from.id.as_str()), run)?;
            if !from.rootfs.is_empty() {
                hooks.show(&rootfs, &bundle_root, run)?;
            }
            root = Some(rootfs);
        }
        for volume in &blocks.direct {
            let user = Store::default().user(&volume.path, run.name())?;
            run.push(Step::Staging(user.clone())).map_err(Error::host("the undo journal"))?;
            Store::record(&user).map_err(Error::host(user.display().to_string()))?;
        }
        let mut volumes = Volumes::default();
        let on_disks = &blocks.volumes;
        let wanted = volume::For { share, id: &from.id, shm, guest_empty_dir, on_disks };
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
            Ok(Prepared { request, shared, hooks, root, resolver_file, disks, volumes, names })
        }
        Err(error) => {
            hooks.hide();
            release(share, &shared);
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
        names: Vec::new(),
    })
}

/// The guest's part, after the hooks that come before it; `anchor` stands for the container there and later.
pub(crate) async fn create(
    agent: &AgentClient,
    mut anchor: Anchor,
    from: &ContainerSpec,
    prepared: Prepared,
    logging: &Logging,
    limit: std::time::Duration,
) -> Result<(Container, Outputs), Error> {
    let Prepared { request, shared, hooks, root, resolver_file, disks, volumes, names } = prepared;
    let name = ProcessRef { container: from.id.clone(), exec: None };
    let outputs = Outputs::open(&from.stdio, &name, logging).await.inspect_err(|_| hooks.hide())?;
    let shown = async {
        // from here on others see it
        anchor.enter(root.map(|root| tree::detached(&root)).transpose()?).await?;
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
    Ok((
        Container::new(from.bundle.clone(), init, Belongings { anchor, resolver_file, shared, disks, volumes }, hooks),
        outputs,
    ))
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

/// Takes a container's parts out of the share. Goes on past errors: the sandbox's journal has the whole folder.
pub(crate) fn release(share: &Share, names: &[String]) {
    for name in names {
        if !share.shelf().give_back(name) {
            continue;
        }
        for path in [share.host_path(name), share.layers_path(name)] {
            if !path.exists() {
                continue;
            }
            let gone = cleanup::unmount_tree(&path).and_then(|()| cleanup::remove_mount_points(&path));
            if let Err(error) = gone {
                tracing::warn!(path = %path.display(), %error, "taking a container's files out of the share");
            }
        }
    }
}
