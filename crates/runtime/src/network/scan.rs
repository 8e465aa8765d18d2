//! What CNI has made in the pod's network namespace: links, addresses, routes, neighbours, as they are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{failed, mac_text};
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
    pub(super) addresses: Vec<(IpAddr, u8)>,
}

/// What a link is. What is not here cannot be brought into a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Veth,
    MacVlan,
    IpVlan,
    Dummy,
    Vlan,
    /// A tap that somebody made for us to use.
    Tap,
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
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

impl Found {
    /// There is nothing to tell the guest.
    pub(crate) fn is_empty(&self) -> bool {
        self.links.is_empty()
    }
}

/// Looks around. A link without an address carries nothing and is passed over (tunnel devices that every namespace has).
pub(super) async fn scan(handle: &Handle) -> Result<Found, Error> {
    let messages: Vec<_> =
        handle.link().get().execute().try_collect().await.map_err(failed("listing the pod's network links"))?;
    bounded("links", messages.len())?;
    let mut addresses: Vec<(u32, IpAddr, u8)> = Vec::new();
    let mut stream = std::pin::pin!(handle.address().get().execute());
    while let Some(message) = stream.try_next().await.map_err(failed("listing the pod's addresses"))? {
        bounded("addresses", addresses.len())?;
        let own = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let other = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        // the guest's kernel makes the link-local address itself, the same one from the same MAC address
        let address = own.or(other).filter(|address| !matches!(address, IpAddr::V6(v6) if is_link_local(*v6)));
        if let Some(address) = address {
            addresses.push((message.header.index, address, message.header.prefix_len));
        }
    }
    let mut links = Vec::new();
    for message in messages {
        if let Some(link) = link(&message, &addresses)? {
            links.push(link);
        }
    }
    if links.is_empty() {
        return Ok(Found::default());
    }
    let mut routes = routes(handle, &RouteMessageBuilder::<Ipv4Addr>::new().build(), &links).await?;
    routes.extend(self::routes(handle, &RouteMessageBuilder::<Ipv6Addr>::new().build(), &links).await?);
    let neighbours = neighbours(handle, &links).await?;
    Ok(Found { links, routes, neighbours })
}

fn bounded(what: &str, count: usize) -> Result<(), Error> {
    if count > MOST {
        return Err(Error::Invalid(format!("the pod's network namespace has more than {MOST} {what}")));
    }
    Ok(())
}

fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

fn link(message: &LinkMessage, addresses: &[(u32, IpAddr, u8)]) -> Result<Option<Link>, Error> {
    let index = message.header.index;
    let own: Vec<_> =
        addresses.iter().filter(|(link, ..)| *link == index).map(|(_, address, prefix)| (*address, *prefix)).collect();
    if message.header.flags.contains(LinkFlags::Loopback) || own.is_empty() {
        return Ok(None);
    }
    let (mut name, mut mac, mut mtu, mut kind) = (String::new(), None, 1500, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let (LinkLayerType::Ether, Some(mac)) = (message.header.link_layer_type, mac) else {
        return Err(Error::Unsupported(format!(
            "network interface {name} is not an Ethernet one: a virtual machine can only have those"
        )));
    };
    let kind = match kind {
        Some(InfoKind::Veth) => Kind::Veth,
        Some(InfoKind::MacVlan) => Kind::MacVlan,
        Some(InfoKind::IpVlan) => Kind::IpVlan,
        Some(InfoKind::Dummy) => Kind::Dummy,
        Some(InfoKind::Vlan) => Kind::Vlan,
        Some(InfoKind::Tun) => Kind::Tap,
        None => {
            return Err(Error::Unsupported(format!(
                "network interface {name} is a physical one: passing it to the virtual machine (VFIO) is not supported \
                 yet, use a veth, macvlan or ipvlan"
            )));
        }
        Some(other) => {
            return Err(Error::Unsupported(format!(
                "network interface {name} is of the kind {other}, which cannot be brought into a virtual machine: use \
                 veth, macvlan, ipvlan or a tap"
            )));
        }
    };
    Ok(Some(Link { index, name, kind, mac, mtu, addresses: own }))
}

async fn routes(handle: &Handle, of: &RouteMessage, links: &[Link]) -> Result<Vec<Route>, Error> {
    let mut routes = Vec::new();
    let mut stream = std::pin::pin!(handle.route().get(of.clone()).execute());
    while let Some(message) = stream.try_next().await.map_err(failed("listing the pod's routes"))? {
        bounded("routes", routes.len())?;
        routes.extend(route(&message, links));
    }
    Ok(routes)
}

fn route(message: &RouteMessage, links: &[Link]) -> Option<Route> {
    let header = &message.header;
    let (mut table, mut destination, mut gateway, mut source, mut device, mut mtu, mut metric) =
        (u32::from(header.table), None, None, None, None, 0, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => destination = plain(address),
            RouteAttribute::Gateway(address) => gateway = plain(address),
            RouteAttribute::PrefSource(address) => source = plain(address),
            RouteAttribute::Oif(index) => device = links.iter().find(|link| link.index == *index),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::Metrics(metrics) => {
                let own =
                    metrics.iter().find_map(|one| if let RouteMetric::Mtu(mtu) = one { Some(*mtu) } else { None });
                mtu = own.unwrap_or_default();
            }
            _ => {}
        }
    }
    let wanted = table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && header.kind == RouteType::Unicast
        // the guest's kernel makes those itself when it gets the addresses
        && header.protocol != RouteProtocol::Kernel;
    let link_local = matches!(destination, Some(IpAddr::V6(v6)) if is_link_local(v6));
    if !wanted || link_local {
        return None;
    }
    Some(Route {
        v6: header.address_family == rtnetlink::packet_route::AddressFamily::Inet6,
        destination: destination.map(|address| (address, header.destination_prefix_length)),
        gateway,
        source,
        device: device?.name.clone(),
        scope: header.scope.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        mtu,
        metric,
    })
}

fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

async fn neighbours(handle: &Handle, links: &[Link]) -> Result<Vec<Neighbour>, Error> {
    let mut found = Vec::new();
    let mut stream = std::pin::pin!(handle.neighbours().get().execute());
    while let Some(message) = stream.try_next().await.map_err(failed("listing the pod's neighbours"))? {
        bounded("neighbours", found.len())?;
        if message.header.state != NeighbourState::Permanent {
            continue;
        }
        let device = links.iter().find(|link| link.index == message.header.ifindex);
        let (mut address, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
                _ => {}
            }
        }
        if let (Some(device), Some(address), Some(mac)) = (device, address, mac) {
            found.push(Neighbour { device: device.name.clone(), address, mac });
        }
    }
    Ok(found)
}

impl Link {
    /// As people and QEMU write it.
    pub(super) fn mac_text(&self) -> String {
        mac_text(self.mac)
    }
}
