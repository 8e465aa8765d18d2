//! The start of a pod, step by step: the table of contents of a create request.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::agent as api;
use async_trait::async_trait;
use hypervisor::{Size, Vm};
use oci_spec::runtime::Spec;
use tokio::sync::{Notify, mpsc};

use super::memory::HostMemory;
use super::{Event, Host, Inner, Sandbox, SandboxSpec, Slot, disks, resolver, watch};
use crate::agent_client::{AgentClient, VmWatch};
use crate::anchor::Anchor;
use crate::cgroup::HostCgroup;
use crate::cleanup::RunDir;
use crate::container::create::Prepared;
use crate::container::io::Outputs;
use crate::container::{ContainerSpec, Logging, create, spec};
use crate::host_work::{HostWork, Progress};
use crate::machine::{Env, HostPart, Machine, Request, bring_up, while_served};
use crate::pod::{Limits, Role};
use crate::storage::block::{Blocks, Placed};
use crate::storage::disks::Disks;
use crate::storage::share::Share;
use crate::storage::shm::Shm;
use crate::trace::Trace;
use crate::{ContainerId, Error, network, sizing};

impl Sandbox {
    /// Starts the VM and makes the pod's first container in it, unless `cancelled` is told before that is done.
    ///
    /// # Errors
    /// Whatever failed; nothing is left of the sandbox but its run folder, for another start.
    pub async fn start(
        env: Env,
        sandbox: SandboxSpec,
        first: ContainerSpec,
        events: mpsc::UnboundedSender<Event>,
        trace: &Trace,
        cancelled: &Notify,
    ) -> Result<Self, FailedStart> {
        let SandboxSpec { id, namespace, mut run } = sandbox;
        let logging = Logging { namespace, journal: run.journal() };
        let work = HostWork::new(env.config.runtime.create_container_timeout);
        let booted = tokio::select! {
            // large, and waited for once
            booted = Box::pin(boot(&env, &id, &first, &work, &mut run, &logging, trace)) => booted,
            () = cancelled.notified() => Err(Error::WrongState("the start was cancelled".into())),
        };
        match booted {
            Ok(Booted {
                vm,
                size,
                memory,
                share,
                agent,
                container,
                outputs,
                namespace,
                network,
                forwarding,
                shm,
                disks,
            }) => {
                let following = network.follow(&agent, &vm);
                let init = Arc::clone(&container.init);
                let containers = HashMap::from([(first.id.clone(), Slot::Made(Arc::new(container)))]);
                let inner = Arc::new(Inner {
                    env,
                    size,
                    memory,
                    agent,
                    work,
                    first: first.id.clone(),
                    namespace,
                    containers: Mutex::new(containers),
                    events,
                    logging,
                    shm,
                    disks: tokio::sync::Mutex::new(disks),
                    serving: OnceLock::new(),
                    host: tokio::sync::Mutex::new(Some(Host {
                        vm,
                        share,
                        run: Arc::new(run),
                        forwarding,
                        names: None,
                        following,
                    })),
                    ending: tokio::sync::Mutex::new(None),
                });
                watch::process(&inner, init, outputs);
                watch::virtiofsd(&inner).await;
                watch::memory(&inner);
                trace.step("created");
                let sandbox = Self(inner);
                sandbox.watch_anchor(&first.id);
                sandbox.serve_volumes().await;
                Ok(sandbox)
            }
            Err(error) => {
                // a job that hangs makes nothing more when it goes on; one that does not is waited for
                work.settled(SETTLE).await;
                let reset = tokio::task::spawn_blocking(move || run.reset()).await;
                let reset = reset.unwrap_or_else(|lost| Err(std::io::Error::other(lost)));
                let run =
                    reset.inspect_err(|left| tracing::error!(error = %left, "cleaning after a failed start")).ok();
                Err(FailedStart { error, run })
            }
        }
    }
}

/// A start that failed.
#[derive(Debug)]
pub struct FailedStart {
    /// Why.
    pub error: Error,
    /// The run folder; `None` when not all could be undone, which is written there.
    pub run: Option<RunDir>,
}

/// A pod that runs, with its first container made.
struct Booted {
    vm: Arc<dyn Vm>,
    size: Size,
    memory: HostMemory,
    share: Share,
    agent: AgentClient,
    container: crate::container::Container,
    outputs: Outputs,
    namespace: network::Namespace,
    network: network::PodNetwork,
    forwarding: Option<network::Forwarding>,
    shm: Option<Shm>,
    disks: Disks,
}

/// How long the jobs of a start that has failed are waited for; those that take longer hang.
pub(super) const SETTLE: Duration = Duration::from_millis(500);

/// What is read of the host's files before anything is made.
struct Read {
    oci: Arc<Spec>,
    role: Role,
    shm: Option<Shm>,
    blocks: Blocks,
    name_servers: Vec<String>,
}

impl Read {
    fn of(first: &ContainerSpec, in_guest: bool, progress: &Progress) -> Result<Self, Error> {
        let oci = spec::read(&first.bundle)?;
        let role = Role::of_spec(&oci)?;
        if let Role::Member(pod) = role {
            return Err(Error::NotFound(format!("sandbox {pod} of container {}", first.id)));
        }
        progress.step("/dev/shm of the pod")?;
        let shm = Shm::of(&oci);
        let blocks = disks::wanted(first, &oci, in_guest, progress)?;
        progress.step("name servers of the pod")?;
        let name_servers = resolver::lines(&oci);
        Ok(Self { oci: Arc::new(oci), role, shm, blocks, name_servers })
    }
}

async fn boot(
    env: &Env,
    id: &ContainerId,
    first: &ContainerSpec,
    work: &HostWork,
    run: &mut RunDir,
    logging: &Logging,
    trace: &Trace,
) -> Result<Booted, Error> {
    // everything that can be refused is refused before anything is made
    Outputs::check(&first.stdio)?;
    let config = &env.config.hypervisor;
    let (own, in_guest) = (first.clone(), !config.disable_block_device_use);
    let read = work.run(&spec::name(&first.bundle), move |progress| Read::of(&own, in_guest, progress)).await?;
    let Read { oci, role, shm, blocks, name_servers } = read;
    let oci = &oci;
    let namespace = network::Namespace::of(&env.config, oci).await?;
    let mut network = namespace.connect(&env.config, run).await?;
    let anchor = Anchor::start(oci, namespace.as_fd(), &run.journal())?;
    if !network.is_empty() {
        trace.step("network-connected");
    }
    let mut disks = Disks::default();
    let (ids, plugged) = disks.assign(&blocks.sources)?;
    let blocks = blocks.placed(ids);
    let cgroup = host_cgroup(&env.config, id, oci, run)?.map(Arc::new);
    let memory = HostMemory::of(env, cgroup.clone()).await?;
    let size = sizing::plan(config, Limits::of(oci, &role));
    let size = memory.room.as_ref().map_or(Ok(size), |room| sizing::fit(size, room))?;
    // disks have their places where things can come; and a pod's other containers may bring some
    let is_changing = network.may_change() || !plugged.is_empty() || role == Role::Sandbox;
    let devices = network.take_devices().into_iter().chain(plugged).collect();
    let request = Request {
        env,
        id: id.as_str().to_owned(),
        size,
        devices,
        is_changing,
        channel: env.config.agent.channel,
        cgroup,
        from_pool: true,
        keeps_channel: false,
    };
    let host = FirstContainer { env, spec: first, oci, shm: shm.as_ref(), blocks: &blocks, work, trace };
    let machine = bring_up(&request, run, trace, &host).await;
    let machine = machine.map_err(|error| memory.explain(blocks.explain(error)))?;
    let Machine { vm, share, agent, made: prepared, origin, .. } = machine;
    let vm: Arc<dyn Vm> = vm.into();

    let guest = async {
        let clock = async { if origin.knows_the_time() { Ok(()) } else { set_clock(&agent).await } };
        let storage = share.storage().filter(|_| !origin.has_share());
        tokio::try_join!(create_sandbox(&agent, id, oci, name_servers, storage, shm.as_ref()), clock)?;
        trace.step("sandbox-created");
        if !network.is_empty() {
            network.tell(&agent, vm.as_ref()).await?;
            trace.step("network-configured");
        }
        let limit = env.config.runtime.create_container_timeout;
        let outputs = create::outputs(first, logging, work).await;
        let made = create::create(&agent, anchor, first, prepared, outputs, limit).await?;
        trace.step("container-created");
        Ok::<_, Error>(made)
    };
    let (container, outputs) =
        while_served(&share, VmWatch::new(vm.as_ref()), guest).await.map_err(|error| memory.explain(error))?;
    share.folder().watcher().follow(&agent);
    let is_reachable = role == Role::Sandbox && !env.config.runtime.disable_new_netns;
    let forwarding = if is_reachable { network::forward(oci, &agent) } else { None };
    Ok(Booted { vm, size, memory, share, agent, container, outputs, namespace, network, forwarding, shm, disks })
}

/// The host's part of the pod's first container, made while the guest is not there yet.
struct FirstContainer<'a> {
    env: &'a Env,
    spec: &'a ContainerSpec,
    oci: &'a Arc<Spec>,
    shm: Option<&'a Shm>,
    blocks: &'a Placed,
    work: &'a HostWork,
    trace: &'a Trace,
}

#[async_trait]
impl HostPart for FirstContainer<'_> {
    type Made = Prepared;

    async fn make(&self, share: &Share, vm: &dyn Vm, run: &mut RunDir) -> Result<Prepared, Error> {
        let runtime = &self.env.config.runtime;
        let given = create::Given {
            folder: Arc::clone(share.folder()),
            shm: self.shm.cloned(),
            policy: spec::Policy::of(runtime),
            guest_empty_dir: !runtime.disable_guest_empty_dir,
            journal: run.journal(),
            pod: run.name().to_owned(),
        };
        let plan = self.blocks.plan(vm, self.spec.id.as_str())?;
        let prepared = create::prepare(self.work, given, self.spec, self.oci, plan).await;
        self.trace.step("rootfs-ready");
        prepared
    }

    async fn take_back(&self, made: Prepared, share: &Share) {
        made.take_back(share.folder()).await;
    }
}

/// Where the pod counts on the host; `None` for one that names no place.
fn host_cgroup(
    config: &config::Config,
    id: &ContainerId,
    oci: &Spec,
    run: &mut RunDir,
) -> Result<Option<HostCgroup>, Error> {
    let path = oci.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    match path.and_then(|path| path.to_str()).filter(|path| !path.is_empty()) {
        Some(path) => HostCgroup::create(path, id.as_str(), config.runtime.sandbox_cgroup_only, run),
        None => Ok(None),
    }
}

async fn create_sandbox(
    agent: &AgentClient,
    id: &ContainerId,
    oci: &Spec,
    dns: Vec<String>,
    share: Option<api::Storage>,
    shm: Option<&Shm>,
) -> Result<(), Error> {
    let request = api::CreateSandboxRequest {
        // a container without a name of its own has its host's, as with runc
        hostname: match oci.hostname() {
            Some(name) if !name.is_empty() => name.clone(),
            _ => nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
        },
        sandbox_id: id.as_str().into(),
        dns,
        storages: share.into_iter().chain(shm.map(Shm::storage)).collect(),
        ..Default::default()
    };
    agent
        .call("creating the sandbox", |client, context| async { client.create_sandbox(context, &request).await })
        .await
        .map(drop)
}

/// The guest's clock starts from a clock chip that counts whole seconds.
async fn set_clock(agent: &AgentClient) -> Result<(), Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let request = api::SetGuestDateTimeRequest {
        Sec: now.as_secs() as i64,
        Usec: i64::from(now.subsec_micros()),
        ..Default::default()
    };
    agent
        .call("setting the guest's clock", |client, context| async {
            client.set_guest_date_time(context, &request).await
        })
        .await
        .map(drop)
}
