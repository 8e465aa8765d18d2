//! What was found on the host, as the agent's messages.

use std::net::IpAddr;

use agent_api::agent as api;
use agent_api::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route as WireRoute};

use hypervisor::Address;

use super::mac_text;
use super::scan::{Link, Neighbour, Route};
use crate::Error;
use crate::agent_client::AgentClient;

/// `RTNH_F_ONLINK` of linux/rtnetlink.h.
const ONLINK: u32 = 4;
/// `NUD_PERMANENT` of linux/neighbour.h.
const PERMANENT: i32 = 0x80;
/// `NUD_FAILED` of linux/neighbour.h: nobody is there (any more).
const FAILED: i32 = 0x20;

/// Makes the guest's interface what `link` is. `address` is where the guest sees its device.
pub(super) async fn interface(agent: &AgentClient, link: &Link, address: Option<Address>) -> Result<(), Error> {
    let request = api::UpdateInterfaceRequest { interface: Some(wire(link, address)).into(), ..Default::default() };
    agent
        .call("setting up a network interface", |client, context| async {
            client.update_interface(context, &request).await
        })
        .await
        .map(drop)
}

/// Makes the guest's routes these.
pub(super) async fn routes(agent: &AgentClient, routes: &[Route]) -> Result<(), Error> {
    let routes = api::Routes { Routes: routes.iter().map(route).collect(), ..Default::default() };
    let request = api::UpdateRoutesRequest { routes: Some(routes).into(), ..Default::default() };
    agent
        .call("setting the routes", |client, context| async { client.update_routes(context, &request).await })
        .await
        .map(drop)
}

/// Adds and removes neighbours.
pub(super) async fn neighbours(agent: &AgentClient, gone: &[Neighbour], here: &[Neighbour]) -> Result<(), Error> {
    if gone.is_empty() && here.is_empty() {
        return Ok(());
    }
    let all = gone.iter().map(|one| neighbour(one, FAILED)).chain(here.iter().map(|one| neighbour(one, PERMANENT)));
    let neighbours = api::ARPNeighbors { ARPNeighbors: all.collect(), ..Default::default() };
    let request = api::AddARPNeighborsRequest { neighbors: Some(neighbours).into(), ..Default::default() };
    agent
        .call("setting neighbours", |client, context| async { client.add_arp_neighbors(context, &request).await })
        .await
        .map(drop)
}

fn address(address: IpAddr, prefix: u8) -> IPAddress {
    let family = if address.is_ipv4() { IPFamily::v4 } else { IPFamily::v6 };
    IPAddress { family: family.into(), address: address.to_string(), mask: prefix.to_string(), ..Default::default() }
}

fn wire(link: &Link, at: Option<Address>) -> Interface {
    Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        IPAddresses: link.addresses.iter().map(|(own, prefix)| address(*own, *prefix)).collect(),
        mtu: link.mtu.into(),
        hwAddr: link.mac_text(),
        // without, the guest finds it by its MAC address
        devicePath: match at {
            Some(Address::Pci(path)) => path,
            _ => String::new(),
        },
        raw_flags: if link.no_arp { libc::IFF_NOARP as u32 } else { 0 },
        ..Default::default()
    }
}

fn route(from: &Route) -> WireRoute {
    let text = |address: Option<IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    WireRoute {
        dest: from.destination.map(|(address, prefix)| format!("{address}/{prefix}")).unwrap_or_default(),
        gateway: text(from.gateway),
        device: from.device.clone(),
        source: text(from.source),
        scope: from.scope.into(),
        family: if from.v6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
        flags: if from.onlink { ONLINK } else { 0 },
        mtu: from.mtu,
        metric: from.metric,
        ..Default::default()
    }
}

fn neighbour(from: &Neighbour, state: i32) -> ARPNeighbor {
    let prefix = if from.address.is_ipv4() { 32 } else { 128 };
    ARPNeighbor {
        toIPAddress: Some(address(from.address, prefix)).into(),
        device: from.device.clone(),
        lladdr: mac_text(from.mac),
        state,
        ..Default::default()
    }
}
