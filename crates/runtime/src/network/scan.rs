//! What CNI has made in the pod's network namespace: links, addresses, routes, neighbours, as they are.

use std::net::{IpAddr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};

use super::kind::Kind;
use super::{failed, mac_text, routes};
use crate::Error;

/// Most links, addresses, routes or neighbours of one pod; CNI plugins make a handful.
const MOST: usize = 4096;

/// A link that carries the pod's traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
    /// Nobody answers ARP there.
    pub(super) no_arp: bool,
    /// It carries nothing, being down and without an address: it gets no place in the VM, but keeps one that it has.
    pub(super) idle: bool,
    /// The link of the same namespace that it is on top of, or whose other end it is.
    pub(super) below: Option<u32>,
    pub(super) addresses: Vec<(IpAddr, u8)>,
}

/// An interface that carries the pod's traffic and cannot be brought into a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(super) index: u32,
    /// Which, and why not.
    pub(super) why: String,
}

/// A route of the main table that is not a consequence of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub(super) v6: bool,
    /// `None` is the default route.
    pub(super) destination: Option<(IpAddr, u8)>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    pub(super) device: String,
    pub(super) scope: u8,
    pub(super) onlink: bool,
    pub(super) mtu: u32,
    pub(super) metric: u32,
}

/// A permanent neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(super) device: String,
    pub(super) address: IpAddr,
    pub(super) mac: [u8; 6],
}

/// Everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(super) links: Vec<Link>,
    pub(super) refused: Vec<Refused>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

/// Looks around. Idle are, for example, the tunnel devices that every namespace has, and the host's end of a pair that is
/// about to be moved to the host.
pub(super) async fn scan(handle: &Handle) -> Result<Found, Error> {
    let messages: Vec<_> =
        handle.link().get().execute().try_collect().await.map_err(failed("listing the pod's network links"))?;
    bounded("links", messages.len())?;
    let addresses = addresses(handle).await?;
    let mut found = Found::default();
    for message in messages {
        match link(&message, &addresses) {
            Ok(Some(link)) => found.links.push(link),
            Ok(None) => {}
            Err(refused) => found.refused.push(refused),
        }
    }
    refuse_stacked(&mut found);
    if !found.links.is_empty() {
        found.routes = routes::routes(handle, &found.links).await?;
        found.neighbours = routes::neighbours(handle, &found.links).await?;
    }
    Ok(found)
}

/// All frames of an interface that the VM has go there, so nothing comes to another one on top of it.
fn refuse_stacked(found: &mut Found) {
    let below = |link: &Link| {
        let is_stacked = !link.idle && matches!(link.kind, Kind::Vlan | Kind::MacVlan | Kind::IpVlan);
        let index = link.below.filter(|_| is_stacked)?;
        found.links.iter().find(|other| other.index == index && !other.idle).map(|other| other.name.clone())
    };
    let refused: Vec<_> =
        found.links.iter().filter_map(|link| Some((link.index, link.name.clone(), below(link)?))).collect();
    for (index, name, below) in refused {
        found.links.retain(|link| link.index != index);
        let why = format!(
            "network interface {name} is on top of {below}, whose frames all go to the VM: create it on an interface outside the pod's network namespace, or inside a container"
        );
        found.refused.push(Refused { index, why });
    }
}

/// Of all links, by index.
async fn addresses(handle: &Handle) -> Result<Vec<(u32, IpAddr, u8)>, Error> {
    let mut found = Vec::new();
    let mut stream = std::pin::pin!(handle.address().get().execute());
    while let Some(message) = stream.try_next().await.map_err(failed("listing the pod's addresses"))? {
        bounded("addresses", found.len())?;
        let (mut own, mut other, mut flags) = (None, None, AddressFlags::empty());
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(address) => own = Some(*address),
                AddressAttribute::Address(address) => other = Some(*address),
                AddressAttribute::Flags(all) => flags = *all,
                _ => {}
            }
        }
        // somebody else has it
        if flags.contains(AddressFlags::Dadfailed) {
            continue;
        }
        found.extend(own.or(other).map(|address| (message.header.index, address, message.header.prefix_len)));
    }
    Ok(found)
}

pub(super) fn bounded(what: &str, count: usize) -> Result<(), Error> {
    if count > MOST {
        return Err(Error::Invalid(format!("the pod's network namespace has more than {MOST} {what}")));
    }
    Ok(())
}

pub(super) fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// The link-local address that the kernel makes from a MAC address (RFC 4291, appendix A).
pub(super) fn is_made_from(address: IpAddr, mac: [u8; 6]) -> bool {
    let mut own = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 0];
    own[8..11].copy_from_slice(&mac[..3]);
    own[13..].copy_from_slice(&mac[3..]);
    // the bit for "somebody chose it" is turned round
    own[8] ^= 2;
    address == IpAddr::V6(own.into())
}

fn link(message: &LinkMessage, addresses: &[(u32, IpAddr, u8)]) -> Result<Option<Link>, Refused> {
    let index = message.header.index;
    let flags = message.header.flags;
    if flags.contains(LinkFlags::Loopback) {
        return Ok(None);
    }
    let own = addresses.iter().filter(|(link, ..)| *link == index).map(|(_, address, prefix)| (*address, *prefix));
    let own: Vec<_> = own.collect();
    let (mut name, mut mac, mut mtu, mut is_port) = (String::new(), None, 1500, false);
    let (mut below, mut is_elsewhere) = (None, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::Controller(_) => is_port = true,
            LinkAttribute::Link(index) => below = Some(*index),
            LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
            _ => {}
        }
    }
    let has_own = own.iter().any(|(address, _)| !matches!(address, IpAddr::V6(v6) if is_link_local(*v6)));
    let kind = Kind::of(message);
    // in use without an address: by somebody who speaks Ethernet, or gets one later
    let is_bare_in_use = flags.contains(LinkFlags::Up) && !is_port && kind.as_ref().is_ok_and(Kind::may_be_bare);
    let idle = !has_own && !is_bare_in_use;
    let refused = |why: &str| {
        let why = format!("network interface {name} {why}");
        if idle { Ok(None) } else { Err(Refused { index, why }) }
    };
    let (LinkLayerType::Ether, Some(mac)) = (message.header.link_layer_type, mac) else {
        return refused("is not an Ethernet interface, the only kind that a VM can have");
    };
    let kind = match kind {
        Ok(kind) => kind,
        Err(why) => return refused(&why),
    };
    // the guest's kernel makes that one itself
    let addresses = own.into_iter().filter(|(address, _)| !is_made_from(*address, mac)).collect();
    let no_arp = flags.contains(LinkFlags::Noarp);
    let below = below.filter(|_| !is_elsewhere);
    Ok(Some(Link { index, name, kind, mac, mtu, no_arp, idle, below, addresses }))
}

impl Link {
    /// As people write it.
    pub(super) fn mac_text(&self) -> String {
        mac_text(self.mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_top_of_another_is_refused() {
        let link = |index: u32, kind: Kind, below: Option<u32>| Link {
            index,
            name: format!("link{index}"),
            kind,
            mac: [2; 6],
            mtu: 1500,
            no_arp: false,
            idle: false,
            below,
            addresses: Vec::new(),
        };
        // a pair of veths, a VLAN on one of them, a VLAN on nothing that the VM has
        let links = vec![
            link(2, Kind::Veth, Some(3)),
            link(3, Kind::Veth, Some(2)),
            link(4, Kind::Vlan, Some(2)),
            link(5, Kind::Vlan, Some(9)),
            Link { idle: true, ..link(6, Kind::MacVlan, Some(2)) },
        ];
        let mut found = Found { links, ..Found::default() };
        refuse_stacked(&mut found);
        let left: Vec<_> = found.links.iter().map(|link| link.index).collect();
        assert_eq!(left, [2, 3, 5, 6]);
        assert_eq!(found.refused.len(), 1);
        assert!(found.refused[0].why.contains("link4 is on top of link2"), "{}", found.refused[0].why);
    }

    #[test]
    fn the_kernels_own_address_is_known() {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        assert!(is_made_from("fe80::5054:ff:fe12:3456".parse().expect("an address"), mac));
        assert!(!is_made_from("fe80::1".parse().expect("an address"), mac));
    }
}
