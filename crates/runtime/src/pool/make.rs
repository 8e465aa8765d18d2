//! A VM of the pool, from nothing to one that waits for a pod.

use std::os::fd::OwnedFd;
use std::time::Duration;

use agent_api::agent as api;
use hypervisor::{HotPlug, MemoryWay, Rescan, Vm, VmSpec};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::warm;
use crate::agent_channel::AgentChannel;
use crate::agent_client::VmWatch;
use crate::cleanup::{RunDir, Step};
use crate::sandbox::{Env, news, template_spec, while_served};
use crate::storage::share::Share;
use crate::{Error, template};

/// One that waits.
pub(super) struct Made {
    pub(super) vm: Box<dyn Vm>,
    pub(super) share: Share,
    /// The guest's serial channel, on which nothing is under way.
    pub(super) channel: OwnedFd,
    pub(super) is_clone: bool,
}

/// Makes it: a clone where there is a template, else by a boot.
pub(super) async fn make(env: &Env, run: &mut RunDir) -> Result<Made, Error> {
    let config = &env.config.hypervisor;
    let (mut share, mut served) = Share::start(env.hypervisor.as_ref(), config, run).await?;
    if share.pid().is_none() {
        return Err(Error::Unsupported(
            "a pool needs virtiofsd: set shared_fs to \"virtio-fs\", or vm_cache_number to 0".into(),
        ));
    }
    let mut template = None;
    if env.config.factory.enable_template {
        template = template::find(env, &template_spec(env, None, share.in_template()), MemoryWay::Copied).await?;
    }
    loop {
        let begin = template.as_mut().map(|found| std::mem::take(&mut found.begin));
        let is_clone = begin.is_some();
        let shared_dirs = served.into_iter().collect();
        let id = format!("pool-{}", std::process::id());
        let spec = VmSpec { id, begin: begin.unwrap_or_default(), ..template_spec(env, None, shared_dirs) };
        let mut vm = env.hypervisor.launch(spec).await?;
        run.push(Step::process(vm.pid())).map_err(Error::host("the undo journal"))?;
        let channel = vm.take_channel().ok_or_else(|| Error::Unsupported("the VM has no serial channel".into()))?;
        let watch = VmWatch::new(vm.as_ref());
        let rescan = vm.hotplug().map(HotPlug::rescan).unwrap_or_default();
        // large, and waited for once
        let answers = Box::pin(ready(env, &share, &channel, watch.clone(), rescan, is_clone));
        match while_served(&share, watch, answers).await {
            Ok(()) => {
                vm.booted();
                return Ok(Made { vm, share, channel, is_clone });
            }
            Err(error) => {
                let Some(found) = template.take() else { return Err(error) };
                found.discard(&error);
                vm.stop(Duration::ZERO).await?;
                served = share.serve_again(config, run).await?;
            }
        }
    }
}

/// Wakes the guest, mounts the folder that will be the pod's, and has it do once what it will do for a pod.
async fn ready(
    env: &Env,
    share: &Share,
    channel: &OwnedFd,
    watch: VmWatch,
    rescan: Rescan,
    is_clone: bool,
) -> Result<(), Error> {
    let config = &env.config.agent;
    let (relay, end) = Relay::start(channel).map_err(Error::host("the agent's channel"))?;
    let agent = if is_clone {
        let agent = AgentChannel::resume(Some(end), watch, config)?;
        agent.wake(config.dial_timeout, news(false)?).await?;
        agent
    } else {
        AgentChannel::Serial.connect(Some(end), watch, config).await?
    };
    let request = api::CreateSandboxRequest { storages: share.storage().into_iter().collect(), ..Default::default() };
    agent
        .call("mounting the folder", |client, context| async { client.create_sandbox(context, &request).await })
        .await?;
    warm::up(&agent, share).await?;
    // what is plugged for the pod is looked for once, at its wake
    agent.lull(Duration::ZERO, rescan).await?;
    relay.end().await;
    Ok(())
}

/// Between the guest's channel and a client of ours, so that nothing of that reads from the channel once it is another's.
struct Relay(JoinHandle<()>);

impl Relay {
    /// Returns the client's end.
    fn start(channel: &OwnedFd) -> std::io::Result<(Self, OwnedFd)> {
        use std::os::unix::net::UnixStream as Blocking;
        let open = |stream: Blocking| {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        };
        let (ours, theirs) = Blocking::pair()?;
        let (mut client, mut guest) = (open(ours)?, open(channel.try_clone()?.into())?);
        let copy = async move {
            let _ = tokio::io::copy_bidirectional(&mut client, &mut guest).await;
        };
        Ok((Self(tokio::spawn(copy)), theirs.into()))
    }

    async fn end(self) {
        self.0.abort();
        let _ = self.0.await;
    }
}
