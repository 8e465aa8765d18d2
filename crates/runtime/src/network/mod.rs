//! The pod's network: what CNI made in a namespace of the host, brought into the VM as it is.
//!
//! `scan` reads, `join` joins an interface with a device of the VM (`tcfilter`, `macvtap`, or a card of [`crate::host_network`]), `guest` tells the
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
mod names;
mod routes;
mod scan;
mod steer;
mod tap;
mod tcfilter;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use attached::Attached;
use changes::Changes;
use config::Internetworking;
pub(crate) use follow::Following;
pub(crate) use forward::Forwarding;
use hypervisor::{Device, Vm};
use join::JoinOptions;
pub(crate) use names::{Names, are_wanted as names_are_wanted, file_of as resolver_file};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::Error;
use crate::agent_client::AgentClient;
use crate::cleanup::RunDir;
use crate::host_network::{NetworkNamespace, failed};

/// The network of a pod that starts.
#[derive(Debug, Default)]
pub(crate) struct PodNetwork {
    devices: Vec<Device>,
    /// `None` for a pod that shall not have what is in its namespace.
    attached: Option<Attached>,
}

/// The pod's network namespace on the host: the one that its specification names, or a new one. The VM gets what is in it;
/// clients and hooks find it by the process that stands for a container ([`crate::anchor`]).
#[derive(Debug)]
pub(crate) struct Namespace {
    inner: NetworkNamespace,
    /// Made for the pod: nobody else is in it.
    is_made: bool,
}

impl Namespace {
    /// Opens or makes it.
    pub(crate) async fn of(config: &config::Config, spec: &Spec) -> Result<Self, Error> {
        let path = namespace_path(spec);
        if let Some(path) = path {
            let about = || Error::host(format!("network namespace {}", path.display()));
            let inner = NetworkNamespace::open(&path).map_err(about())?;
            if !inner.is_our_own().map_err(about())? {
                return Ok(Self { inner, is_made: false });
            }
            if !config.runtime.disable_new_netns {
                return Err(Error::Unsupported(format!(
                    "{} is the host's network namespace, which a VM cannot use: give the container its own network namespace",
                    path.display()
                )));
            }
        }
        let inner = NetworkNamespace::make().await.map_err(Error::host("creating a network namespace"))?;
        Ok(Self { inner, is_made: true })
    }

    /// Connects every interface of it, or refuses. What can be refused is refused before anything is made.
    pub(crate) async fn connect(&self, config: &config::Config, run: &mut RunDir) -> Result<PodNetwork, Error> {
        // with the first, whatever there is, the host's own too, is left alone
        if config.runtime.disable_new_netns || config.runtime.internetworking == Internetworking::None {
            return Ok(PodNetwork::default());
        }
        let namespace = self.inner.try_clone().map_err(Error::host("entering the pod's network namespace"))?;
        // what changes from now on is seen: the look comes after
        let (found, changes) = namespace
            .within(|handle| async move {
                let changes =
                    changes::subscribe().map_err(Error::host("subscribing to changes of the pod's network"))?;
                Ok((scan::scan(&handle).await?, changes))
            })
            .await?;
        let changes = Changes::new(changes).map_err(Error::host("subscribing to changes of the pod's network"))?;
        if let Some(refused) = found.refused.into_iter().next() {
            return Err(Error::Unsupported(refused.why));
        }
        let found = scan::Found { refused: Vec::new(), ..found };
        if !self.is_made {
            namespace.must_be_unused(found.links.iter().all(|link| link.idle))?;
        }
        let options = JoinOptions {
            model: config.runtime.internetworking,
            queues: config.hypervisor.network_queues,
            vhost: !config.hypervisor.disable_vhost_net,
        };
        let (attached, devices) = Attached::new(options, namespace, changes, found, run.journal()).await?;
        Ok(PodNetwork { devices, attached: Some(attached) })
    }
}

impl Namespace {
    /// Answers the guest's questions about names from inside, for as long as what this returns lives.
    pub(crate) async fn names(&self, agent: &AgentClient) -> Result<Names, Error> {
        let namespace = self.inner.try_clone().map_err(Error::host("entering the pod's network namespace"))?;
        names::start(namespace, agent.clone()).await
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
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
