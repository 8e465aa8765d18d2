//! A machine of the pool, from nothing to one that waits for a pod.

use std::os::fd::OwnedFd;
use std::time::Duration;

use agent_api::agent as api;
use async_trait::async_trait;
use hypervisor::{HotPlug, Vm};

use super::warm;
use crate::Error;
use crate::agent_client::AgentClient;
use crate::cleanup::RunDir;
use crate::machine::{Env, HostPart, Machine, Origin, Request, bring_up, plain_spec};
use crate::storage::share::Share;
use crate::trace::Trace;

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
    let request = Request {
        env,
        id: format!("pool-{}", std::process::id()),
        size: plain_spec(env, None, Vec::new()).size,
        devices: Vec::new(),
        is_changing: true,
        channel: config::AgentChannel::Serial,
        cgroup: None,
        from_pool: false,
        keeps_channel: true,
    };
    // nobody looks at the moments of a start that nobody waits for; large, and waited for once
    let Machine { vm, share, channel, origin, .. } =
        Box::pin(bring_up(&request, run, &Trace::default(), &Readying)).await?;
    let channel = channel.ok_or_else(|| Error::Unsupported("the VMM gave no serial channel to the agent".into()))?;
    Ok(Made { vm, share, channel: channel.give_back().await, is_clone: origin == Origin::Template })
}

/// Mounts the folder that will be the pod's, and has the guest do once what it will do for a pod.
struct Readying;

#[async_trait]
impl HostPart for Readying {
    type Made = ();

    async fn make(&self, share: &Share, _vm: &dyn Vm, _run: &mut RunDir) -> Result<(), Error> {
        if share.pid().is_none() {
            return Err(Error::Unsupported(
                "the pool needs virtio-fs: install virtiofsd and set shared_fs to \"virtio-fs\" or \"auto\", or set vm_cache_number to 0".into(),
            ));
        }
        Ok(())
    }

    async fn take_back(&self, (): (), _share: &Share) {}

    async fn greet(&self, agent: &AgentClient, share: &Share, vm: &dyn Vm) -> Result<(), Error> {
        let storages = share.storage().into_iter().collect();
        let request = api::CreateSandboxRequest { storages, ..Default::default() };
        agent
            .call("mounting the shared folder in the guest", |client, context| async {
                client.create_sandbox(context, &request).await
            })
            .await?;
        warm::up(agent, share).await?;
        // what is plugged for the pod is looked for once, at its wake
        agent.lull(Duration::ZERO, vm.hotplug().map(HotPlug::rescan).unwrap_or_default()).await
    }
}
