//! From nothing to a guest whose agent answers: one state machine for pods and for the pool.
//!
//! ```text
//!   Pooled ──does not answer──► Clone ──does not answer──► Boot ──does not answer──► the error
//! ```
//! Each step is left out where there is none. While the guest comes, the host's part of the work is done ([`HostPart`]); what it
//! made is kept for the next step where that has the same folder.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hypervisor::{CloneMemory, Device, DeviceKind, SharedDir, Size, Vm, VmSpec};

use super::Env;
use super::guest::{Coming, answer, while_served};
use super::pool::{self, Taken};
use super::relay::Relay;
use super::spec::{plain_spec, vm_spec};
use super::template::{self, Found};
use crate::Error;
use crate::agent_channel::AgentChannel;
use crate::agent_client::{AgentClient, VmWatch};
use crate::cgroup::{HostCgroup, Members};
use crate::cleanup::{RunDir, Step};
use crate::storage::share::Share;
use crate::trace::Trace;

/// What is wanted of a machine.
pub(crate) struct Request<'a> {
    pub(crate) env: &'a Env,
    /// For process titles and messages.
    pub(crate) id: String,
    pub(crate) size: Size,
    pub(crate) devices: Vec<Device>,
    /// Devices may come and go.
    pub(crate) is_changing: bool,
    /// How the agent of one that boots is reached.
    pub(crate) channel: config::AgentChannel,
    /// Where it counts on the host.
    pub(crate) cgroup: Option<Arc<HostCgroup>>,
    /// It may be one of the pool.
    pub(crate) from_pool: bool,
    /// Its serial channel goes on to another process.
    pub(crate) keeps_channel: bool,
}

/// What is done beside the guest's coming, and as soon as it answers.
#[async_trait]
pub(crate) trait HostPart: Sync {
    /// What it makes on the host.
    type Made: Send;

    /// While the guest is not there yet. Its failure ends the bring-up.
    async fn make(&self, share: &Share, vm: &dyn Vm, run: &mut RunDir) -> Result<Self::Made, Error>;

    /// The guest for which it was made is gone, and the folder goes: it will be made again, for another.
    async fn take_back(&self, made: Self::Made, share: &Share);

    /// The guest answers. A failure is one of the bring-up.
    async fn greet(&self, _agent: &AgentClient, _share: &Share, _vm: &dyn Vm) -> Result<(), Error> {
        Ok(())
    }
}

/// Where a machine came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The pool: it has the folder mounted.
    Pool,
    /// A template.
    Template,
    /// It booted.
    Boot,
}

impl Origin {
    /// A moment of the start, for the trace.
    fn started(self) -> &'static str {
        match self {
            Self::Pool => "taken",
            Self::Template => "clone-started",
            Self::Boot => "vmm-started",
        }
    }

    /// The guest knows the time: a clone's wake and the pool's set it.
    pub(crate) fn knows_the_time(self) -> bool {
        self != Self::Boot
    }

    /// The guest has the pod's folder mounted.
    pub(crate) fn has_share(self) -> bool {
        self == Self::Pool
    }
}

/// A guest that answers.
pub(crate) struct Machine<T> {
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) share: Share,
    pub(crate) agent: AgentClient,
    pub(crate) made: T,
    pub(crate) origin: Origin,
    /// With [`Request::keeps_channel`].
    pub(crate) channel: Option<KeptChannel>,
}

/// A serial channel on which nothing is read but by its client; give it back before it goes on.
#[derive(Debug)]
pub(crate) struct KeptChannel {
    end: OwnedFd,
    relay: Relay,
}

impl KeptChannel {
    /// Returns the VM's end, on which nothing is under way: the client's last call was answered.
    pub(crate) async fn give_back(self) -> OwnedFd {
        self.relay.end().await;
        self.end
    }
}

/// Where the next try comes from. A folder is with the VMM's part of it, until a VMM has that.
enum Source {
    Pooled(Taken),
    Clone(Found, Share, Option<SharedDir>),
    Boot(Share, Option<SharedDir>),
}

/// A VM that runs.
struct Started {
    vm: Box<dyn Vm>,
    share: Share,
    coming: Coming,
    /// Devices that are plugged before it is spoken to.
    plugged: Vec<Device>,
    /// Processes that count with it and its daemon.
    others: Vec<u32>,
    fallback: Fallback,
}

/// What is done about a VM whose guest does not answer.
enum Fallback {
    Pooled(pool::Remains),
    Clone(Found),
    Boot,
}

impl Fallback {
    fn origin(&self) -> Origin {
        match self {
            Self::Pooled(_) => Origin::Pool,
            Self::Clone(_) => Origin::Template,
            Self::Boot => Origin::Boot,
        }
    }
}

/// A guest that has waited answers in milliseconds; for one that does not, another is at hand.
const WAKING: Duration = Duration::from_secs(10);

/// Brings a machine up.
///
/// # Errors
/// The last source's, or the host's part's.
pub(crate) async fn bring_up<H: HostPart>(
    request: &Request<'_>,
    run: &mut RunDir,
    trace: &Trace,
    host: &H,
) -> Result<Machine<H::Made>, Error> {
    let mut source = match request.pooled(run).await {
        Some(taken) => Source::Pooled(taken),
        None => request.fresh(run, trace).await?,
    };
    let mut made = None;
    loop {
        let Started { mut vm, share, coming, plugged, others, fallback } = request.start(source, run).await?;
        let origin = fallback.origin();
        trace.step(origin.started());
        let (serial, channel) = request.serial(vm.as_mut())?;
        let watch = VmWatch::new(vm.as_ref());
        let answers = async {
            for device in plugged {
                vm.must_hotplug()?.plug(device).await?;
            }
            let agent = answer(coming, serial, watch.clone(), &request.env.config.agent);
            // the kernel takes its time with the counting, and the guest needs none of it
            let (agent, ()) = tokio::try_join!(agent, request.count(vm.as_ref(), &share, &others))?;
            host.greet(&agent, &share, vm.as_ref()).await?;
            Ok(agent)
        };
        // both come to their end, but a host's part that fails
        let answers = async { Ok(while_served(&share, watch.clone(), answers).await) };
        let host_part = async {
            if let Some(made) = made.take() {
                return Ok(made);
            }
            // the guest has been called by then
            tokio::task::yield_now().await;
            host.make(&share, vm.as_ref(), run).await
        };
        let (answered, done) = tokio::try_join!(answers, host_part)?;
        match (answered, fallback) {
            (Ok(agent), fallback) => {
                trace.step("agent-ready");
                vm.booted();
                match fallback {
                    Fallback::Pooled(_) => tracing::info!("a machine of the pool"),
                    Fallback::Clone(found) => tracing::info!(memory = found.memory.name(), "a clone of a template"),
                    Fallback::Boot => {}
                }
                return Ok(Machine { vm, share, agent, made: done, origin, channel });
            }
            (Err(error), Fallback::Pooled(remains)) => {
                host.take_back(done, &share).await;
                drop((vm, share));
                remains.give_up(&error).await;
                source = request.fresh(run, trace).await?;
            }
            (Err(error), Fallback::Clone(found)) => {
                // what failed beside the guest, in the pod's cgroup for one, is not the template's fault
                if vm.exit().borrow().is_some() || is_the_guests(&error) {
                    found.discard(&error);
                } else {
                    tracing::warn!(%error, "the clone did not start: booting a VM instead");
                }
                vm.stop(Duration::ZERO).await?;
                source = request.again(share, run).await?;
                made = Some(done);
            }
            (Err(error), Fallback::Boot) => return Err(error),
        }
    }
}

/// The guest, or what was done with it once it answered, is at fault.
fn is_the_guests(error: &Error) -> bool {
    matches!(error, Error::AgentSilent { .. } | Error::Agent { .. } | Error::VmGone { .. } | Error::WrongState(_))
}

impl Request<'_> {
    /// One of the pool, if there is one for this request.
    async fn pooled(&self, run: &mut RunDir) -> Option<Taken> {
        let is_plain = self.devices.iter().all(|device| device.kind() == DeviceKind::Net);
        if !self.from_pool || self.env.config.factory.vm_cache_number == 0 || !is_plain {
            return None;
        }
        if !self.env.hypervisor.capabilities().hand_over {
            let driver = self.env.hypervisor.name();
            tracing::warn!(
                "vm_cache_number is set, but hypervisor {driver} cannot hand over VMs: booting a VM instead"
            );
            return None;
        }
        pool::take(self.env, self.size, run).await
    }

    /// A folder, for a clone where there is a template.
    async fn fresh(&self, run: &mut RunDir, trace: &Trace) -> Result<Source, Error> {
        let (share, served) = Share::start(self.env.hypervisor.as_ref(), &self.env.config.hypervisor, run).await?;
        trace.step("virtiofsd-started");
        Ok(match self.template(&share).await? {
            Some(found) => {
                trace.step("template-found");
                Source::Clone(found, share, served)
            }
            None => Source::Boot(share, served),
        })
    }

    /// The folder of a VM that is gone, for one that boots.
    async fn again(&self, mut share: Share, run: &mut RunDir) -> Result<Source, Error> {
        let served = share.serve_again(&self.env.config.hypervisor, run).await?;
        Ok(Source::Boot(share, served))
    }

    /// What this machine can be a clone of.
    async fn template(&self, share: &Share) -> Result<Option<Found>, Error> {
        // a device of the host is there from the boot on
        let is_plain = self.devices.iter().all(|device| device.kind() != DeviceKind::Host);
        if !self.env.config.factory.enable_template || !is_plain {
            return Ok(None);
        }
        // what is given back must be the clone's own
        let is_own = share.shares_memory() || self.env.config.hypervisor.reclaim_guest_freed_memory;
        let memory = if is_own { CloneMemory::Copied } else { CloneMemory::Private };
        template::find(self.env, &plain_spec(self.env, Some(self.size), share.in_template()), memory).await
    }

    /// From a source to a VM that runs.
    async fn start(&self, source: Source, run: &mut RunDir) -> Result<Started, Error> {
        let driver = self.env.hypervisor.as_ref();
        self.devices.iter().try_for_each(|device| driver.capabilities().check(driver.name(), device))?;
        let devices = self.devices.iter().map(Device::try_clone).collect::<std::io::Result<Vec<_>>>();
        let devices = devices.map_err(Error::host("the pod's devices"))?;
        let id = self.id.clone();
        let (spec, share, coming, fallback) = match source {
            Source::Pooled(taken) => {
                let Taken { vm, share, others, remains } = taken;
                let coming = Coming::GoesOn { same_devices: devices.is_empty(), limit: WAKING };
                return Ok(Started {
                    vm,
                    share,
                    coming,
                    plugged: devices,
                    others,
                    fallback: Fallback::Pooled(remains),
                });
            }
            Source::Clone(mut found, share, served) => {
                let spec = plain_spec(self.env, Some(self.size), served.into_iter().collect());
                let same_devices = !share.shares_memory() && devices.is_empty();
                let begin = std::mem::take(&mut found.begin);
                let coming = Coming::GoesOn { same_devices, limit: Duration::MAX };
                (VmSpec { id, begin, devices, ..spec }, share, coming, Fallback::Clone(found))
            }
            Source::Boot(share, served) => {
                let (channel, end) = AgentChannel::open(driver, self.channel, run.path())?;
                let spec = vm_spec(self.env, self.size, end, &channel.kernel_params());
                let shared_dirs = served.into_iter().collect();
                let pluggable = self.is_changing && !driver.capabilities().hotplug.is_empty();
                let spec = VmSpec { id, shared_dirs, devices, pluggable, ..spec };
                (spec, share, Coming::Boots(channel), Fallback::Boot)
            }
        };
        let vm = driver.launch(spec).await?;
        run.push(Step::process(vm.pid())).map_err(Error::host("writing the undo journal"))?;
        Ok(Started { vm, share, coming, plugged: Vec::new(), others: Vec::new(), fallback })
    }

    /// The end of its serial channel that is spoken to, and what is kept.
    fn serial(&self, vm: &mut dyn Vm) -> Result<(Option<OwnedFd>, Option<KeptChannel>), Error> {
        let serial = vm.take_channel();
        if !self.keeps_channel {
            return Ok((serial, None));
        }
        let end = serial.ok_or_else(|| Error::Unsupported("the VMM gave no serial channel to the agent".into()))?;
        let (relay, client) = Relay::start(&end).map_err(Error::host("opening the agent's channel"))?;
        Ok((Some(client), Some(KeptChannel { end, relay })))
    }

    /// Puts the VM into the pod's cgroup, with `others` that belong to it.
    async fn count(&self, vm: &dyn Vm, share: &Share, others: &[u32]) -> Result<(), Error> {
        let Some(cgroup) = self.cgroup.clone() else { return Ok(()) };
        let processes = std::iter::once(vm.pid()).chain(share.pid()).chain(others.iter().copied()).collect();
        let vcpus = if cgroup.parts_vcpus() { vm.vcpu_threads().await? } else { Vec::new() };
        tokio::task::spawn_blocking(move || cgroup.attach(&Members { processes, vcpus })).await.unwrap_or_else(
            |error| Err(Error::host("moving processes into the pod's cgroup")(std::io::Error::other(error))),
        )
    }
}
