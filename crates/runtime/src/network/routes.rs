//! The pod's routes and permanent neighbours, as they are in its network namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::failed;
use super::scan::{Link, Neighbour, Route, bounded, is_link_local};
use crate::Error;

/// Both families' routes over `links`.
pub(super) async fn routes(handle: &Handle, links: &[Link]) -> Result<Vec<Route>, Error> {
    let mut routes = Vec::new();
    for of in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
        let mut stream = std::pin::pin!(handle.route().get(of).execute());
        while let Some(message) = stream.try_next().await.map_err(failed("listing the pod's routes"))? {
            bounded("routes", routes.len())?;
            routes.extend(route(&message, links));
        }
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

/// The permanent ones at `links`.
pub(super) async fn neighbours(handle: &Handle, links: &[Link]) -> Result<Vec<Neighbour>, Error> {
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
