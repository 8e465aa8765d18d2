//! A network namespace that is attached to a VM: what the VM has of it, and how it follows.

use std::sync::Arc;

use hypervisor::{Device, Vm};

use super::changes::Changes;
use super::diff;
use super::guest;
use super::join::{self, JoinOptions, Member};
use super::scan::{self, Found, Link, Neighbour, Refused, Route};
use crate::Error;
use crate::agent_client::AgentClient;
use crate::cleanup::Journal;
use crate::host_network::NetworkNamespace;

/// The whole of it.
#[derive(Debug)]
pub(super) struct Attached {
    namespace: NetworkNamespace,
    options: JoinOptions,
    journal: Journal,
    pub(super) changes: Changes,
    pub(super) members: Vec<Member>,
    /// Device names that were used; none is used twice.
    named: u64,
    /// What was found at the start about devices that have left the namespace since: it cannot be seen there any more.
    away: Found,
    /// What the guest was told last.
    told: Told,
    /// What did not get into the VM, and was logged; tried again when it has changed, or when there is room.
    failed: Vec<Link>,
    refused: Vec<Refused>,
}

#[derive(Debug, Default)]
struct Told {
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

impl Attached {
    /// Joins everything that was found, for a VM that is not yet there.
    pub(super) async fn new(
        options: JoinOptions,
        namespace: NetworkNamespace,
        changes: Changes,
        found: Found,
        journal: Journal,
    ) -> Result<(Self, Vec<Device>), Error> {
        let mut own = Self {
            namespace,
            options,
            journal,
            changes,
            members: Vec::new(),
            named: 0,
            away: Found::default(),
            told: Told { routes: found.routes, neighbours: found.neighbours },
            failed: Vec::new(),
            refused: Vec::new(),
        };
        let links: Vec<_> = found.links.into_iter().filter(|link| !link.idle).collect();
        join::check(options, &own.namespace, &links).await?;
        let mut devices = Vec::new();
        for link in links {
            let name = own.name();
            let (member, device) = join::join(options, &own.namespace, link, name, &own.journal).await?;
            own.members.push(member);
            devices.push(device);
        }
        own.remember_away();
        own.told.routes.retain(|route| has(&own.members, &route.device));
        own.told.neighbours.retain(|one| has(&own.members, &one.device));
        Ok((own, devices))
    }

    /// Names for the next device: the VM's, and the smallest free number of a tap.
    fn name(&mut self) -> (String, usize) {
        let is_free = |number: &usize| self.members.iter().all(|member| member.number != *number);
        let number = (0..self.members.len()).find(is_free).unwrap_or(self.members.len());
        self.named += 1;
        (format!("net{}", self.named), number)
    }

    fn remember_away(&mut self) {
        let away: Vec<_> = self.members.iter().filter(|member| member.is_away()).map(|one| &one.link.name).collect();
        self.away.routes = self.told.routes.iter().filter(|one| away.contains(&&one.device)).cloned().collect();
        self.away.neighbours = self.told.neighbours.iter().filter(|one| away.contains(&&one.device)).cloned().collect();
    }

    /// Tells a guest that has just booted everything: the interfaces first, since routes need them.
    pub(super) async fn tell(&self, agent: &AgentClient, vm: &dyn Vm) -> Result<(), Error> {
        for member in &self.members {
            guest::interface(agent, &member.link, vm.address(&member.id)).await?;
        }
        guest::routes(agent, &self.told.routes).await?;
        guest::neighbours(agent, &[], &self.told.neighbours).await
    }

    /// Looks what is different by now, and makes the VM follow. What cannot be done is logged, and the rest is done.
    ///
    /// # Errors
    /// The VM is gone.
    pub(super) async fn follow(&mut self, agent: &AgentClient, vm: &Arc<dyn Vm>) -> Result<(), Error> {
        let found = self.namespace.within(|handle| async move { scan::scan(&handle).await }).await;
        let Found { links, refused, mut routes, mut neighbours } = match found {
            Ok(found) => found,
            Err(error) => return fatal("listing the interfaces of the pod's network namespace", error),
        };
        for one in &refused {
            if !self.refused.contains(one) {
                tracing::warn!(why = one.why, "a network interface is not added to the VM");
            }
        }
        self.refused = refused;

        let diff = diff::links(self.members.iter().map(|one| (!one.is_away()).then_some(&one.link)), &links);
        let mut renewed = !diff.gone.is_empty();
        for (place, link) in diff.changed {
            renewed = true;
            self.change(place, link, agent, vm).await?;
        }
        for place in diff.gone {
            self.failed.clear();
            self.remove(place, vm).await?;
        }
        self.failed.retain(|link| links.contains(link));
        for link in diff.new {
            if !self.failed.contains(&link) {
                renewed |= self.add(link, agent, vm).await?;
            }
        }

        // those of interfaces that the VM has
        routes.extend(self.away.routes.iter().cloned());
        routes.retain(|route| has(&self.members, &route.device));
        neighbours.extend(self.away.neighbours.iter().cloned());
        neighbours.retain(|one| has(&self.members, &one.device));
        // with an address, or with an interface that was down for a moment, the guest's kernel drops what needs it
        if renewed || routes != self.told.routes {
            let told = guest::routes(agent, &routes).await;
            self.told.routes = routes;
            told.or_else(|error| fatal("updating the guest's routes", error))?;
        }
        if renewed || neighbours != self.told.neighbours {
            let mut gone = diff::gone(&self.told.neighbours, &neighbours);
            gone.retain(|one| has(&self.members, &one.device));
            let told = guest::neighbours(agent, &gone, &neighbours).await;
            self.told.neighbours = neighbours;
            told.or_else(|error| fatal("updating the guest's neighbours", error))?;
        }
        self.remember_away();
        Ok(())
    }

    async fn change(&mut self, place: usize, link: Link, agent: &AgentClient, vm: &Arc<dyn Vm>) -> Result<(), Error> {
        let Some(member) = self.members.get_mut(place) else { return Ok(()) };
        if link.mtu != member.link.mtu {
            let set = join::set_mtu(&self.namespace, member, link.mtu).await;
            set.or_else(|error| fatal("changing the MTU of an interface", error))?;
        }
        let address = vm.address(&member.id);
        let told = guest::interface(agent, &link, address).await;
        tracing::info!(interface = link.name, "network interface changed in the VM");
        member.link = link;
        told.or_else(|error| fatal("changing an interface of the guest", error))
    }

    async fn remove(&mut self, place: usize, vm: &Arc<dyn Vm>) -> Result<(), Error> {
        let member = self.members.remove(place);
        let name = member.link.name.clone();
        let unplugged = async { vm.must_hotplug()?.unplug(&member.id).await }.await;
        join::part(member, &self.journal).await;
        tracing::info!(interface = name, "network interface removed from the VM");
        unplugged.map_err(Error::from).or_else(|error| fatal("unplugging an interface", error))
    }

    /// Whether it is in the VM now.
    async fn add(&mut self, link: Link, agent: &AgentClient, vm: &Arc<dyn Vm>) -> Result<bool, Error> {
        let (name, tried) = (link.name.clone(), link.clone());
        match self.plug(link, agent, vm).await {
            Ok(()) => {
                tracing::info!(interface = name, "network interface added to the VM");
                Ok(true)
            }
            Err(error) => {
                self.failed.push(tried);
                fatal(&format!("adding network interface {name} to the VM"), error).map(|()| false)
            }
        }
    }

    async fn plug(&mut self, link: Link, agent: &AgentClient, vm: &Arc<dyn Vm>) -> Result<(), Error> {
        join::check(self.options, &self.namespace, std::slice::from_ref(&link)).await?;
        let name = self.name();
        let (member, device) = join::join(self.options, &self.namespace, link, name, &self.journal).await?;
        if let Err(error) = async { vm.must_hotplug()?.plug(device).await }.await {
            join::part(member, &self.journal).await;
            return Err(error.into());
        }
        if let Err(error) = guest::interface(agent, &member.link, vm.address(&member.id)).await {
            let unplugged = async { vm.must_hotplug()?.unplug(&member.id).await }.await;
            join::part(member, &self.journal).await;
            if let Err(error) = unplugged {
                tracing::warn!(%error, "cannot unplug an interface that the guest did not configure");
            }
            return Err(error);
        }
        self.members.push(member);
        Ok(())
    }
}

fn has(members: &[Member], device: &str) -> bool {
    members.iter().any(|member| member.link.name == device)
}

/// Logs what can be lived with; with the VM everything ends.
fn fatal(what: &str, error: Error) -> Result<(), Error> {
    match error {
        Error::VmGone { .. } | Error::Vm(hypervisor::Error::Gone) => Err(error),
        error => {
            tracing::warn!(%error, "{what}");
            Ok(())
        }
    }
}
