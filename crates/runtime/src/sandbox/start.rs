//! The start of a pod, step by step: the table of contents of a create request.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::agent as api;
use agent_api::paths;
use hypervisor::{Boot, Channel, SharedDir, Vm, VmSpec};
use oci_spec::runtime::Spec;
use tokio::sync::{Notify, mpsc};

use super::{Env, Event, Host, Inner, Sandbox, SandboxSpec, Slot, resolver, watch};
use crate::agent_channel::AgentChannel;
use crate::agent_client::{AgentClient, VmWatch};
use crate::cgroup::{HostCgroup, Members};
use crate::cleanup::RunDir;
use crate::container::io::Outputs;
use crate::container::{ContainerSpec, create, spec};
use crate::pod::{Limits, Role};
use crate::storage::share::Share;
use crate::storage::shm::Shm;
use crate::trace::Trace;
use crate::{ContainerId, Error, network, sizing};

impl Sandbox {
    /// Starts the VM and makes the pod's first container in it, unless `cancelled` is told before that is done.
    ///
    /// # Errors
    /// Whatever failed; nothing is left of the sandbox.
    pub async fn start(
        env: Env,
        sandbox: SandboxSpec,
        first: ContainerSpec,
        events: mpsc::UnboundedSender<Event>,
        trace: &Trace,
        cancelled: &Notify,
    ) -> Result<Self, Error> {
        let SandboxSpec { id, mut run } = sandbox;
        let booted = tokio::select! {
            // large, and waited for once
            booted = Box::pin(boot(&env, &id, &first, &mut run, trace)) => booted,
            () = cancelled.notified() => Err(Error::WrongState("the start was cancelled".into())),
        };
        match booted {
            Ok(Booted { vm, share, agent, container, outputs, network, forwarding, shm }) => {
                let pid = vm.pid();
                let following = network.follow(&agent, &vm);
                let init = Arc::clone(&container.init);
                let containers = HashMap::from([(first.id.clone(), Slot::Made(Arc::new(container)))]);
                let inner = Arc::new(Inner {
                    env,
                    agent,
                    pid,
                    containers: Mutex::new(containers),
                    events,
                    shm,
                    host: tokio::sync::Mutex::new(Some(Host { vm, share, run, forwarding, following })),
                });
                watch::process(&inner, init, outputs);
                watch::virtiofsd(&inner).await;
                watch::memory(&inner);
                trace.step("created");
                Ok(Self(inner))
            }
            Err(error) => {
                if let Ok(Err(left)) = tokio::task::spawn_blocking(move || run.undo()).await {
                    tracing::error!(error = %left, "cleaning after a failed start");
                }
                Err(error)
            }
        }
    }
}

/// After virtiofsd, which ends when QEMU does, QEMU's own end is seen so much later at most.
const TOGETHER: Duration = Duration::from_millis(250);

/// A pod that runs, with its first container made.
struct Booted {
    vm: Arc<dyn Vm>,
    share: Share,
    agent: AgentClient,
    container: crate::container::Container,
    outputs: Outputs,
    network: network::PodNetwork,
    forwarding: Option<network::Forwarding>,
    shm: Option<Shm>,
}

async fn boot(
    env: &Env,
    id: &ContainerId,
    first: &ContainerSpec,
    run: &mut RunDir,
    trace: &Trace,
) -> Result<Booted, Error> {
    // everything that can be refused is refused before anything is made
    let oci = &spec::read(&first.bundle)?;
    let role = Role::of_spec(oci)?;
    if let Role::Member(pod) = role {
        return Err(Error::NotFound(format!("sandbox {pod} of container {}", first.id)));
    }
    let shm = Shm::of(oci);
    let config = &env.config.hypervisor;
    let (channel, device) = AgentChannel::open(env.config.agent.channel)?;
    let params = channel.kernel_params();
    let mut network = network::connect(&env.config, oci, run).await?;
    if !network.is_empty() {
        trace.step("network-connected");
    }
    let cgroup = host_cgroup(&env.config, id, oci, run)?;
    let (share, socket) = Share::start(config, run)?;
    trace.step("virtiofsd-started");
    let spec = vm_spec(env, id, Limits::of(oci, &role), (device, &params), socket, &mut network);
    let mut vm = env.hypervisor.launch(spec).await?;
    run.push(crate::cleanup::Step::process(vm.pid())).map_err(Error::host("the undo journal"))?;
    trace.step("vmm-started");

    // while the guest boots
    let policy = spec::Policy::of(&env.config.runtime);
    let given = create::Given { share: &share, shm: shm.as_ref(), policy };
    let prepared = create::prepare(given, first, oci, run)?;
    trace.step("rootfs-ready");

    let pid = vm.pid();
    let vm_watch = VmWatch::new(vm.as_ref());
    let serial = vm.take_channel();
    let processes = vec![pid, share.daemon.pid()];
    // the kernel takes its time, and the guest needs none of it
    let counted = async {
        let Some(cgroup) = cgroup else { return Ok(()) };
        let vcpus = if cgroup.parts_vcpus() { vm.vcpu_threads().await? } else { Vec::new() };
        tokio::task::spawn_blocking(move || cgroup.attach(&Members { processes, vcpus }))
            .await
            .unwrap_or_else(|error| Err(Error::host("the pod's cgroup")(std::io::Error::other(error))))
    };
    let guest = async {
        let agent = channel.connect(serial, vm_watch, &env.config.agent).await?;
        trace.step("agent-ready");
        vm.booted();
        tokio::try_join!(create_sandbox(&agent, id, oci, shm.as_ref()), set_clock(&agent))?;
        trace.step("sandbox-created");
        if !network.is_empty() {
            network.tell(&agent, vm.as_ref()).await?;
            trace.step("network-configured");
        }
        let limit = env.config.runtime.create_container_timeout;
        let (container, outputs) = create::create(&agent, pid, first, prepared, limit).await?;
        trace.step("container-created");
        Ok::<_, Error>((agent, container, outputs))
    };
    let mut daemon = share.daemon.exit();
    let ended = VmWatch::new(vm.as_ref());
    let outcome = tokio::select! {
        biased;
        made = async { tokio::try_join!(guest, counted) } => Ok(made?),
        end = daemon.wait_for(Option::is_some) => {
            Err(end.ok().and_then(|end| end.clone()))
        }
    };
    let ((agent, container, outputs), ()) = match outcome {
        Ok(made) => made,
        Err(end) => {
            // it ends in peace when QEMU does, and QEMU with an error when it was killed
            let limit = if end.as_ref().is_some_and(|end| end.is_success) { TOGETHER } else { Duration::ZERO };
            let reason = end.map(|end| end.to_string()).unwrap_or_default();
            return ended.broken_within("starting the guest", &reason, limit).await;
        }
    };
    let is_reachable = role == Role::Sandbox && !env.config.runtime.disable_new_netns;
    let forwarding = if is_reachable { network::forward(oci, &agent) } else { None };
    Ok(Booted { vm: vm.into(), share, agent, container, outputs, network, forwarding, shm })
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

fn vm_spec(
    env: &Env,
    id: &ContainerId,
    limits: Limits,
    (channel, channel_params): (Channel, &str),
    socket: OwnedFd,
    network: &mut network::PodNetwork,
) -> VmSpec {
    let config = &env.config.hypervisor;
    let log = if env.config.agent.enable_debug { "debug" } else { "info" };
    let kernel_params = kernel_params(channel_params, log, &config.kernel_params);
    VmSpec {
        id: id.as_str().into(),
        boot: Boot { kernel: config.kernel.clone(), initrd: config.initrd.clone().unwrap_or_default(), kernel_params },
        size: sizing::plan(config, limits),
        channel,
        shared_dirs: vec![SharedDir { tag: paths::SHARE_TAG, socket, queue_size: config.virtio_fs_queue_size }],
        devices: network.take_devices(),
        pluggable: network.may_change(),
        entropy_source: config.entropy_source.clone(),
        debug: config.enable_debug || env.config.agent.enable_debug,
    }
}

/// What this side asks of the guest's kernel, and what the configuration does.
///
/// `cgroup.memory=nosocket`: to count the buffers of sockets into a container's memory costs a tenth of what passes through
/// one, and the VM is the limit for all of it anyway. Whoever sets `cgroup.memory` decides himself.
fn kernel_params(channel: &str, log: &str, configured: &str) -> String {
    let counted = if configured.contains("cgroup.memory=") { "" } else { " cgroup.memory=nosocket" };
    format!("{channel} agent.log={log} cgroup_no_v1=all{counted} {configured}").trim_end().into()
}

async fn create_sandbox(agent: &AgentClient, id: &ContainerId, oci: &Spec, shm: Option<&Shm>) -> Result<(), Error> {
    let share = api::Storage {
        driver: "virtio-fs".into(),
        source: paths::SHARE_TAG.into(),
        fstype: "virtiofs".into(),
        mount_point: paths::SHARED.into(),
        ..Default::default()
    };
    let request = api::CreateSandboxRequest {
        // a container without a name of its own has its host's, as with runc
        hostname: match oci.hostname() {
            Some(name) if !name.is_empty() => name.clone(),
            _ => nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
        },
        sandbox_id: id.as_str().into(),
        dns: resolver::lines(oci),
        storages: std::iter::once(share).chain(shm.map(Shm::storage)).collect(),
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

#[cfg(test)]
mod tests {
    use super::kernel_params;

    #[test]
    fn the_configuration_decides_what_is_counted() {
        assert_eq!(kernel_params("c=1", "info", ""), "c=1 agent.log=info cgroup_no_v1=all cgroup.memory=nosocket");
        let counted = kernel_params("c=1", "info", "a cgroup.memory=nobpf");
        assert_eq!(counted, "c=1 agent.log=info cgroup_no_v1=all a cgroup.memory=nobpf");
    }
}
