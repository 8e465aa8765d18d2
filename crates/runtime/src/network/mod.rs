//! The pod's network: what CNI made in a namespace of the host, brought into the VM as it is.
//!
//! `scan` reads, `join` joins an interface with a device of the VM (`tcfilter`, `macvtap`, `physical`), `guest` tells the
//! agent; `attached` is the whole of it, and `follow` lets it follow what changes. Everything is netlink; no program is run.
//! A namespace without an interface costs one look, a container without a namespace path not even that.

mod attached;
mod changes;
mod diff;
mod follow;
mod forward;
mod guest;
mod join;
mod kind;
mod macvtap;
mod netns;
mod physical;
mod routes;
mod scan;
mod steer;
mod tap;
mod tcfilter;
pub(crate) mod undo;

use std::path::PathBuf;
use std::sync::Arc;

use attached::Attached;
use changes::Changes;
use config::Internetworking;
pub(crate) use follow::Following;
pub(crate) use forward::Forwarding;
use hypervisor::{Device, Vm};
use join::Plan;
use netns::NetworkNamespace;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::Error;
use crate::agent_client::AgentClient;
use crate::cleanup::RunDir;

const SYSFS: &str = "/sys";

/// The network of a pod that starts.
#[derive(Debug, Default)]
pub(crate) struct PodNetwork {
    devices: Vec<Device>,
    /// `None` for a pod without a namespace of the host, or with one that it shall not have.
    attached: Option<Attached>,
}

/// Refuses, or connects every interface of the pod's namespace. What can be refused is refused before anything is made.
pub(crate) async fn connect(config: &config::Config, spec: &Spec, run: &mut RunDir) -> Result<PodNetwork, Error> {
    if config.runtime.disable_new_netns {
        // whatever there is, the host's own too, is left alone
        return Ok(PodNetwork::default());
    }
    let Some(path) = namespace_path(spec) else { return Ok(PodNetwork::default()) };
    let namespace =
        NetworkNamespace::open(&path).map_err(Error::host(format!("network namespace {}", path.display())))?;
    let about = || Error::host(format!("network namespace {}", path.display()));
    if namespace.is_our_own().map_err(about())? {
        return Err(Error::Unsupported(format!(
            "{} is the host's network, which is not possible in a virtual machine: give the container a network namespace \
             of its own",
            path.display()
        )));
    }
    if config.runtime.internetworking == Internetworking::None {
        return Ok(PodNetwork::default());
    }
    // what changes from now on is seen: the look comes after
    let (found, changes) = namespace
        .within(|handle| async move {
            let changes = changes::subscribe().map_err(Error::host("changes of the pod's network"))?;
            Ok((scan::scan(&handle).await?, changes))
        })
        .await?;
    let changes = Changes::new(changes).map_err(Error::host("changes of the pod's network"))?;
    if let Some(refused) = found.refused.into_iter().next() {
        return Err(Error::Unsupported(refused.why));
    }
    let found = scan::Found { refused: Vec::new(), ..found };
    if found.links.iter().any(|link| !link.idle)
        && let Some(pid) = namespace.user().map_err(about())?
    {
        return Err(Error::WrongState(format!(
            "network namespace {} is used by process {pid}: its traffic would go to the virtual machine, give the pod a \
             namespace of its own",
            path.display()
        )));
    }
    let plan = Plan {
        model: config.runtime.internetworking,
        queues: config.hypervisor.network_queues,
        vhost: !config.hypervisor.disable_vhost_net,
    };
    let (attached, devices) = Attached::new(plan, namespace, changes, found, run.journal()).await?;
    Ok(PodNetwork { devices, attached: Some(attached) })
}

impl PodNetwork {
    /// What the VM boots with.
    pub(crate) fn take_devices(&mut self) -> Vec<Device> {
        std::mem::take(&mut self.devices)
    }

    /// Interfaces may come.
    pub(crate) fn may_change(&self) -> bool {
        self.attached.is_some()
    }

    /// There is nothing to tell the guest.
    pub(crate) fn is_empty(&self) -> bool {
        self.attached.as_ref().is_none_or(|attached| attached.members.is_empty())
    }

    /// Gives a guest that has just booted everything.
    pub(crate) async fn tell(&self, agent: &AgentClient, vm: &dyn Vm) -> Result<(), Error> {
        match &self.attached {
            Some(attached) if !attached.members.is_empty() => attached.tell(agent, vm).await,
            _ => Ok(()),
        }
    }

    /// Lets the VM follow its namespace from now on.
    pub(crate) fn follow(self, agent: &AgentClient, vm: &Arc<dyn Vm>) -> Option<Following> {
        Some(Following::start(self.attached?, agent.clone(), Arc::clone(vm)))
    }
}

/// Lets ports of the pod be reached from inside its namespace; `None` for a pod without one.
pub(crate) fn forward(spec: &Spec, agent: &AgentClient) -> Option<Forwarding> {
    Some(forward::start(namespace_path(spec)?, agent.clone()))
}

fn namespace_path(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|one| one.typ() == LinuxNamespaceType::Network)?.path().clone()
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// For `map_err`: names what netlink refused.
fn failed(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    let what = what.into();
    move |error| {
        let source = match &error {
            rtnetlink::Error::NetlinkError(message) if message.code.is_some() => {
                std::io::Error::from_raw_os_error(-message.raw_code())
            }
            _ => std::io::Error::other(error),
        };
        Error::Host { what, source }
    }
}
