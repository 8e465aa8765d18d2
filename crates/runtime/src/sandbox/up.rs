//! From nothing to a guest whose agent answers: one of the pool, or a clone of a saved VM, where there is one, else one that
//! boots.

use std::future::Future;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::{ports, wake};
use hypervisor::{Begin, Boot, Channel, Device, Hello, Image, MemoryWay, Root, SharedDir, Size, Verity, Vm, VmSpec};

use super::Env;
use crate::agent_channel::AgentChannel;
use crate::agent_client::{AgentClient, VmWatch};
use crate::cgroup::{HostCgroup, Members};
use crate::cleanup::{RunDir, Step};
use crate::container::create::Prepared;
use crate::storage::open_files;
use crate::storage::share::Share;
use crate::trace::Trace;
use crate::{ContainerId, Error, pool, sizing, template};

/// What is wanted of the VM.
pub(super) struct Wanted<'a> {
    pub(super) env: &'a Env,
    pub(super) id: &'a ContainerId,
    pub(super) size: Size,
    pub(super) devices: Vec<Device>,
    /// Devices may come and go.
    pub(super) is_changing: bool,
    pub(super) cgroup: Option<Arc<HostCgroup>>,
}

/// A guest that answers.
pub(super) struct Up {
    pub(super) vm: Arc<dyn Vm>,
    pub(super) agent: AgentClient,
    pub(super) prepared: Prepared,
    /// It knows the time already.
    pub(super) is_clone: bool,
    /// It has the pod's folder mounted.
    pub(super) has_share: bool,
}

/// A guest that has waited answers in milliseconds; for one that does not, another is at hand.
const WAKING: Duration = Duration::from_secs(10);

/// Takes a VM from the pool, if there is one for this pod. One that does not come to life is no failure of the pod, so
/// `prepare` may be called once more for another.
pub(super) async fn from_pool(
    wanted: &Wanted<'_>,
    run: &mut RunDir,
    trace: &Trace,
    prepare: impl Fn(&Share, &dyn Vm, &mut RunDir) -> Result<Prepared, Error>,
) -> Result<Option<(Up, Share)>, Error> {
    let is_plain = wanted.devices.iter().all(|device| matches!(device, Device::Net(_)));
    if wanted.env.config.factory.vm_cache_number == 0 || !is_plain {
        return Ok(None);
    }
    if !wanted.env.hypervisor.capabilities().hand_over {
        let driver = wanted.env.hypervisor.name();
        tracing::warn!(
            "vm_cache_number is set, and hypervisor {driver} cannot hand virtual machines over: this one boots"
        );
        return Ok(None);
    }
    let Some(mut taken) = pool::take(wanted.env, wanted.size, run).await else { return Ok(None) };
    trace.step("taken");
    let config = &wanted.env.config.agent;
    let serial = taken.vm.take_channel();
    let (vm, share) = (taken.vm.as_ref(), &taken.share);
    let watch = VmWatch::new(vm);
    let wake = async {
        for device in &wanted.devices {
            let device = device.try_clone().map_err(Error::host("the pod's devices"))?;
            vm.must_hotplug()?.plug(device).await?;
        }
        let agent = AgentChannel::resume(serial, watch.clone(), config)?;
        let limit = config.dial_timeout.min(WAKING);
        tokio::try_join!(agent.wake(limit, news(wanted.devices.is_empty())?), wanted.count(vm, share, &taken.others))?;
        Ok(agent)
    };
    let prepare = async {
        // the guest has been called by then
        tokio::task::yield_now().await;
        prepare(share, vm, run)
    };
    let (woken, prepared) = tokio::join!(while_served(share, watch.clone(), wake), prepare);
    match (woken, prepared) {
        (Ok(agent), Ok(prepared)) => {
            trace.step("agent-ready");
            tracing::info!("a machine of the pool");
            let pool::Taken { vm, share, .. } = taken;
            Ok(Some((Up { vm: vm.into(), agent, prepared, is_clone: true, has_share: true }, share)))
        }
        (_, Err(error)) => Err(error),
        (Err(error), Ok(prepared)) => {
            prepared.take_back(share);
            taken.give_up(&error).await;
            Ok(None)
        }
    }
}

/// Brings it up. `prepare` is done while the guest is not there yet: the host's part of the first container.
pub(super) async fn bring_up(
    wanted: Wanted<'_>,
    share: &mut Share,
    mut shared: Option<SharedDir>,
    run: &mut RunDir,
    trace: &Trace,
    prepare: impl FnOnce(&Share, &dyn Vm, &mut RunDir) -> Result<Prepared, Error>,
) -> Result<Up, Error> {
    let mut prepare = Some(prepare);
    let mut prepared = None;
    let mut template = template(&wanted, share).await?;
    if template.is_some() {
        trace.step("template-found");
    }
    loop {
        let mut found = template.take();
        let begin = found.as_mut().map(|found| std::mem::take(&mut found.begin));
        let is_clone = begin.is_some();
        let same_devices = !share.shares_memory() && wanted.devices.is_empty();
        let (channel, spec) = wanted.spec(begin, shared, run.path())?;
        let mut vm = wanted.env.hypervisor.launch(spec).await?;
        run.push(Step::process(vm.pid())).map_err(Error::host("the undo journal"))?;
        trace.step(if is_clone { "clone-started" } else { "vmm-started" });
        if let Some(prepare) = prepare.take() {
            prepared = Some(prepare(share, vm.as_ref(), run)?);
        }
        let watch = VmWatch::new(vm.as_ref());
        let answers = async {
            let (serial, config) = (vm.take_channel(), &wanted.env.config.agent);
            let agent = async {
                if is_clone {
                    let agent = AgentChannel::resume(serial, watch.clone(), config)?;
                    agent.wake(config.dial_timeout, news(same_devices)?).await?;
                    Ok(agent)
                } else {
                    channel.connect(serial, watch.clone(), config).await
                }
            };
            // the kernel takes its time with it, and the guest needs none of it
            let (agent, ()) = tokio::try_join!(agent, wanted.count(vm.as_ref(), share, &[]))?;
            Ok(agent)
        };
        let answered = while_served(share, watch.clone(), answers).await;
        match (answered, found, prepared) {
            (Ok(agent), found, Some(prepared)) => {
                trace.step("agent-ready");
                vm.booted();
                if let Some(found) = found {
                    tracing::info!(memory = found.way.name(), "a clone of a template");
                }
                return Ok(Up { vm: vm.into(), agent, prepared, is_clone, has_share: false });
            }
            (Err(error), Some(found), kept) => {
                // what failed beside the guest, in the pod's cgroup for one, is not the template's fault
                if vm.exit().borrow().is_some() || matches!(error, Error::AgentSilent { .. }) {
                    found.discard(&error);
                } else {
                    tracing::warn!(%error, "the clone did not come up: this pod's machine boots instead");
                }
                vm.stop(Duration::ZERO).await?;
                shared = share.serve_again(&wanted.env.config.hypervisor, run).await?;
                prepared = kept;
            }
            (Err(error), None, _) => return Err(error),
            // the first round has prepared it, or ended
            (Ok(_), _, None) => return Err(Error::WrongState("the container was not prepared".into())),
        }
    }
}

/// What this VM can be a clone of.
async fn template(wanted: &Wanted<'_>, share: &Share) -> Result<Option<template::Found>, Error> {
    // a device of the host is there from the boot on
    let is_plain = !wanted.devices.iter().any(|device| matches!(device, Device::Host(_)));
    if !wanted.env.config.factory.enable_template || !is_plain {
        return Ok(None);
    }
    // what is given back must be the clone's own
    let is_own = share.shares_memory() || wanted.env.config.hypervisor.reclaim_guest_freed_memory;
    let way = if is_own { MemoryWay::Copied } else { MemoryWay::Private };
    let spec = template_spec(wanted.env, Some(wanted.size), share.in_template());
    template::find(wanted.env, &spec, way).await
}

impl Wanted<'_> {
    fn spec(
        &self,
        begin: Option<Begin>,
        shared: Option<SharedDir>,
        folder: &Path,
    ) -> Result<(AgentChannel, VmSpec), Error> {
        let driver = self.env.hypervisor.as_ref();
        let capabilities = driver.capabilities();
        self.devices.iter().try_for_each(|device| capabilities.check(driver.name(), device))?;
        let devices = self.devices.iter().map(Device::try_clone).collect::<std::io::Result<Vec<_>>>();
        let devices = devices.map_err(Error::host("the pod's devices"))?;
        let shared_dirs = shared.into_iter().collect();
        let id = self.id.as_str().to_owned();
        if let Some(begin) = begin {
            let spec = template_spec(self.env, Some(self.size), shared_dirs);
            return Ok((AgentChannel::Serial, VmSpec { id, begin, devices, ..spec }));
        }
        let (channel, device) = AgentChannel::open(driver, self.env.config.agent.channel, folder)?;
        let spec = vm_spec(self.env, self.size, device, &channel.kernel_params());
        Ok((
            channel,
            VmSpec {
                id,
                shared_dirs,
                devices,
                pluggable: self.is_changing && !capabilities.hotplug.is_empty(),
                ..spec
            },
        ))
    }

    /// Puts the VM into the pod's cgroup, with `others` that belong to it.
    async fn count(&self, vm: &dyn Vm, share: &Share, others: &[u32]) -> Result<(), Error> {
        let Some(cgroup) = self.cgroup.clone() else { return Ok(()) };
        let processes = std::iter::once(vm.pid()).chain(share.pid()).chain(others.iter().copied()).collect();
        let vcpus = if cgroup.parts_vcpus() { vm.vcpu_threads().await? } else { Vec::new() };
        tokio::task::spawn_blocking(move || cgroup.attach(&Members { processes, vcpus }))
            .await
            .unwrap_or_else(|error| Err(Error::host("the pod's cgroup")(std::io::Error::other(error))))
    }
}

/// The VM that a template is made of, of this size or the configured one: without anything of a pod, and with room for it.
/// What its clones have besides is all new to the guest, but for a folder that the VMM serves, in `shared_dirs`.
pub(crate) fn template_spec(env: &Env, size: Option<Size>, shared_dirs: Vec<SharedDir>) -> VmSpec {
    let size = size.unwrap_or_else(|| sizing::plan(&env.config.hypervisor, crate::pod::Limits::default()));
    let channel = Channel::Serial { port: ports::AGENT_SERIAL };
    let spec = vm_spec(env, size, channel, &AgentChannel::Serial.kernel_params());
    VmSpec { id: "template".into(), shared_dirs, pluggable: true, ..spec }
}

fn vm_spec(env: &Env, size: Size, channel: Channel, channel_params: &str) -> VmSpec {
    let config = &env.config.hypervisor;
    let log = if env.config.agent.enable_debug { "debug" } else { "info" };
    VmSpec {
        id: String::new(),
        begin: Begin::Boot,
        boot: Boot {
            kernel: config.kernel.clone(),
            root: root(config),
            kernel_params: kernel_params(channel_params, log, config),
            hello: Some(Hello { port: ports::AGENT_SERIAL, kernel_params: AgentChannel::Serial.kernel_params() }),
        },
        size,
        channel,
        shared_dirs: Vec::new(),
        devices: Vec::new(),
        pluggable: false,
        reclaim: config.reclaim_guest_freed_memory,
        merge: config.merge_guest_memory,
        entropy_source: config.entropy_source.clone(),
        debug: config.enable_debug || env.config.agent.enable_debug,
    }
}

/// What the guest boots from; the configuration has exactly one.
fn root(config: &config::Hypervisor) -> Root {
    let Some(path) = config.image.clone() else { return Root::Initrd(config.initrd.clone().unwrap_or_default()) };
    Root::Image(Image {
        path,
        file_system: config::Word::as_str(config.rootfs_type).to_owned(),
        is_memory: config.image_is_memory,
        verity: config.kernel_verity_params.clone().map(|verity| Verity {
            root_hash: verity.root_hash,
            salt: verity.salt,
            data_blocks: verity.data_blocks,
            data_block_size: verity.data_block_size,
            hash_block_size: verity.hash_block_size,
        }),
    })
}

/// What this side asks of the guest's kernel, and what the configuration does.
///
/// `cgroup.memory=nosocket`: to count the buffers of sockets into a container's memory costs a tenth of what passes through
/// one, and the VM is the limit for all of it anyway. `cgroup_disable=pressure`: the stall times of a single container
/// (`cpu.pressure` and its like) are kept at every change of tasks, and the agent's protocol has no word for them;
/// `/proc/pressure` is there. Whoever sets one of them decides himself (`cgroup_disable=none` is nothing).
fn kernel_params(channel: &str, log: &str, config: &config::Hypervisor) -> String {
    let configured = &config.kernel_params;
    let ours = ["cgroup.memory=nosocket".to_owned(), "cgroup_disable=pressure".to_owned()]
        .into_iter()
        .chain(open_files::kernel_parameter(config))
        .filter(|ours| ours.split_inclusive('=').next().is_some_and(|key| !configured.contains(key)))
        .fold(String::new(), |all, ours| all + " " + &ours);
    format!("{channel} agent.log={log} cgroup_no_v1=all{ours} {configured}").trim_end().into()
}

/// What makes this clone another than all the others: random numbers of the host, and its time. `same_devices`: it has none
/// that the saved VM had not.
pub(crate) fn news(same_devices: bool) -> Result<wake::UpRequest, Error> {
    let mut random = vec![0; 256];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(Error::host("/dev/urandom"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(wake::UpRequest {
        random,
        sec: now.as_secs() as i64,
        usec: i64::from(now.subsec_micros()),
        same_devices,
        ..Default::default()
    })
}

/// After virtiofsd, which ends when the VMM does, the VMM's own end is seen so much later at most.
const TOGETHER: Duration = Duration::from_millis(250);

/// Does `work` unless virtiofsd ends.
pub(crate) async fn while_served<T>(
    share: &Share,
    vm: VmWatch,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let end = tokio::select! {
        biased;
        done = work => return done,
        end = share.ended() => end,
    };
    // it ends in peace when the VMM does, and the VMM with an error when it was killed
    let limit = if end.as_ref().is_some_and(|end| end.is_success) { TOGETHER } else { Duration::ZERO };
    let reason = end.map(|end| end.to_string()).unwrap_or_default();
    vm.broken_within("starting the guest", &reason, limit).await
}

#[cfg(test)]
mod tests {
    use super::kernel_params;

    #[test]
    fn the_configuration_decides_what_is_counted() {
        let params = |configured: &str| {
            let text = format!("[hypervisor.qemu]\nshared_fs = \"none\"\nkernel_params = {configured:?}");
            let config = config::Config::parse(&text, std::path::Path::new("/c")).expect("right");
            kernel_params("c=1", "info", &config.hypervisor)
        };
        let plain = params("");
        assert_eq!(plain, "c=1 agent.log=info cgroup_no_v1=all cgroup.memory=nosocket cgroup_disable=pressure");
        let counted = params("a cgroup.memory=nobpf");
        assert_eq!(counted, "c=1 agent.log=info cgroup_no_v1=all cgroup_disable=pressure a cgroup.memory=nobpf");
        let both = params("cgroup.memory=nobpf cgroup_disable=none");
        assert_eq!(both, "c=1 agent.log=info cgroup_no_v1=all cgroup.memory=nobpf cgroup_disable=none");
    }

    #[test]
    fn the_guest_is_told_how_many_files_it_may_know() {
        let params = |configured: &str| {
            let text = format!(
                "[hypervisor.qemu]\nkernel_params = {configured:?}\nvirtio_fs_extra_args = [\"--rlimit-nofile=100\"]"
            );
            let config = config::Config::parse(&text, std::path::Path::new("/c")).expect("right");
            kernel_params("c=1", "info", &config.hypervisor)
        };
        assert!(params("").ends_with(" fuse.max_inodes=50"));
        assert!(params("fuse.max_inodes=7").ends_with(" cgroup_disable=pressure fuse.max_inodes=7"));
    }
}
