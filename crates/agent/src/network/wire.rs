//! The protocol's network messages ⇄ netlink's. Pure; everything from the host is checked here.

use std::net::IpAddr;

use agent_api::types::{IPAddress, IPFamily, Interface, Route};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteScope};

use crate::error::Error;

/// `IFNAMSIZ` with its zero.
const NAME: usize = 15;

pub(super) fn check_name(name: &str) -> Result<(), Error> {
    let fine = (1..=NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.bytes().any(|byte| byte == b'/' || byte == b':' || byte.is_ascii_whitespace() || byte == 0);
    if fine {
        Ok(())
    } else {
        Err(Error::Invalid(format!(
            "invalid interface name {name:.80?}: must be 1 to {NAME} bytes without / : and white space"
        )))
    }
}

pub(super) fn mac(text: &str) -> Result<Vec<u8>, Error> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|pair| u8::from_str_radix(pair, 16).ok().filter(|_| pair.len() == 2 && !pair.starts_with('+')))
        .collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| Error::Invalid(format!("invalid MAC address {text:.80?}: must be like 52:54:00:12:34:56")))
}

/// An address and its prefix's length; the mask is a length or, for version 4, a mask.
pub(super) fn address(from: &IPAddress) -> Result<(IpAddr, u8), Error> {
    let invalid = || Error::Invalid(format!("invalid address {:.80?} with mask {:.80?}", from.address, from.mask));
    let address: IpAddr = from.address.parse().map_err(|_| invalid())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let prefix = if from.mask.is_empty() {
        most
    } else if let Ok(mask) = from.mask.parse::<std::net::Ipv4Addr>() {
        let ones = mask.to_bits().leading_ones();
        if mask.to_bits().checked_shl(ones).unwrap_or_default() != 0 {
            return Err(invalid());
        }
        ones as u8
    } else {
        from.mask.parse().map_err(|_| invalid())?
    };
    if prefix > most {
        return Err(invalid());
    }
    Ok((address, prefix))
}

pub(super) fn addresses(from: &[IPAddress]) -> Result<Vec<(IpAddr, u8)>, Error> {
    if from.len() > super::MOST {
        return Err(Error::Invalid(format!("{} addresses: the limit is {}", from.len(), super::MOST)));
    }
    from.iter().map(address).collect()
}

/// The link-local address that the kernel makes from a MAC address (RFC 4291, appendix A).
pub(super) fn is_made_from(address: IpAddr, mac: &[u8]) -> bool {
    let (IpAddr::V6(address), [a, b, c, rest @ ..]) = (address, mac) else { return false };
    let made = [&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, *b, *c, 0xff, 0xfe], rest].concat();
    address.octets().as_slice() == made
}

/// What tells a route from all others. The kernel fills in what a request leaves out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    family: AddressFamily,
    destination: Option<(RouteAddress, u8)>,
    gateway: Option<RouteAddress>,
    source: Option<RouteAddress>,
    device: Option<u32>,
    metric: u32,
    mtu: u32,
    onlink: bool,
}

impl Key {
    pub(super) fn of(message: &RouteMessage) -> Self {
        let header = &message.header;
        // ipv6_route(7): the metric of a route that has none
        let metric = if header.address_family == AddressFamily::Inet6 { 1024 } else { 0 };
        let mut key = Self {
            family: header.address_family,
            destination: None,
            gateway: None,
            source: None,
            device: None,
            metric,
            mtu: 0,
            onlink: header.flags.contains(RouteFlags::Onlink),
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(to) => {
                    key.destination = Some((to.clone(), header.destination_prefix_length));
                }
                RouteAttribute::Gateway(gateway) => key.gateway = Some(gateway.clone()),
                RouteAttribute::PrefSource(source) => key.source = Some(source.clone()),
                RouteAttribute::Oif(index) => key.device = Some(*index),
                RouteAttribute::Priority(metric) => key.metric = *metric,
                RouteAttribute::Metrics(metrics) => {
                    let own = metrics.iter().find_map(|one| match one {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                    key.mtu = own.unwrap_or_default();
                }
                _ => {}
            }
        }
        key
    }
}

/// A route over the interface `index`.
pub(super) fn route(from: &Route, index: u32) -> Result<RouteMessage, Error> {
    let v6 = from.family.enum_value() == Ok(IPFamily::v6);
    let family_of = |address: &IpAddr| address.is_ipv6() == v6;
    let parse = |what: &str, text: &str| -> Result<Option<IpAddr>, Error> {
        if text.is_empty() {
            return Ok(None);
        }
        let address: Option<IpAddr> = text.parse().ok().filter(family_of);
        address.map(Some).ok_or_else(|| Error::Invalid(format!("invalid {what} {text:.80?} of a route")))
    };
    let mut message = RouteMessageBuilder::<std::net::Ipv4Addr>::new().output_interface(index).build();
    message.header.address_family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let scope =
        u8::try_from(from.scope).map_err(|_| Error::Invalid(format!("invalid scope {} of a route", from.scope)))?;
    message.header.scope = RouteScope::from(scope);
    // what a dump shows and a request must not have is left out
    message.header.flags = RouteFlags::from_bits_retain(from.flags) & RouteFlags::Onlink;
    let attributes = &mut message.attributes;
    if !from.dest.is_empty() {
        let (address, prefix) = from.dest.split_once('/').unwrap_or((&from.dest, ""));
        let invalid = || Error::Invalid(format!("invalid destination {:.80?} of a route", from.dest));
        let address: IpAddr = address.parse().ok().filter(family_of).ok_or_else(invalid)?;
        let most = if v6 { 128 } else { 32 };
        let prefix: u8 = if prefix.is_empty() { most } else { prefix.parse().map_err(|_| invalid())? };
        if prefix > most {
            return Err(invalid());
        }
        message.header.destination_prefix_length = prefix;
        if prefix > 0 {
            attributes.push(RouteAttribute::Destination(RouteAddress::from(address)));
        }
    }
    if let Some(gateway) = parse("gateway", &from.gateway)? {
        attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    }
    if let Some(source) = parse("source", &from.source)? {
        attributes.push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    if from.mtu != 0 {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(from.mtu)]));
    }
    if from.metric != 0 {
        attributes.push(RouteAttribute::Priority(from.metric));
    }
    Ok(message)
}

pub(super) fn from_route<'a>(message: &RouteMessage, device: impl Fn(u32) -> &'a str) -> Route {
    let v6 = message.header.address_family == AddressFamily::Inet6;
    let mut out = Route {
        scope: u8::from(message.header.scope).into(),
        family: if v6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
        flags: message.header.flags.bits(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                out.dest = format!("{}/{}", plain(address), message.header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => out.gateway = plain(address),
            RouteAttribute::PrefSource(address) => out.source = plain(address),
            RouteAttribute::Oif(index) => device(*index).clone_into(&mut out.device),
            RouteAttribute::Priority(metric) => out.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                let mtu =
                    metrics.iter().find_map(|one| if let RouteMetric::Mtu(mtu) = one { Some(*mtu) } else { None });
                out.mtu = mtu.unwrap_or_default();
            }
            _ => {}
        }
    }
    out
}

fn plain(address: &RouteAddress) -> String {
    match address {
        RouteAddress::Inet(v4) => v4.to_string(),
        RouteAddress::Inet6(v6) => v6.to_string(),
        _ => String::new(),
    }
}

pub(super) fn interface(link: &LinkMessage, name: &str, addresses: impl Iterator<Item = (IpAddr, u8)>) -> Interface {
    let mut out = Interface { device: name.to_owned(), name: name.to_owned(), ..Default::default() };
    if link.header.flags.contains(LinkFlags::Noarp) {
        out.raw_flags = libc::IFF_NOARP as u32;
    }
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => out.mtu = (*mtu).into(),
            LinkAttribute::Address(bytes) => {
                out.hwAddr = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
            }
            _ => {}
        }
    }
    out.IPAddresses = addresses
        .map(|(address, prefix)| IPAddress {
            family: if address.is_ipv6() { IPFamily::v6 } else { IPFamily::v4 }.into(),
            address: address.to_string(),
            mask: prefix.to_string(),
            ..Default::default()
        })
        .collect();
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(address: &str, mask: &str) -> Result<(IpAddr, u8), Error> {
        super::address(&IPAddress { address: address.into(), mask: mask.into(), ..Default::default() })
    }

    #[test]
    fn addresses_with_lengths_and_masks() {
        let want: IpAddr = "10.0.0.5".parse().expect("an address");
        assert_eq!(ip("10.0.0.5", "24"), Ok((want, 24)));
        assert_eq!(ip("10.0.0.5", "255.255.255.0"), Ok((want, 24)));
        assert_eq!(ip("10.0.0.5", ""), Ok((want, 32)));
        assert!(ip("fd00::5", "64").is_ok());
        for (address, mask) in [("10.0.0.5", "33"), ("10.0.0.5", "255.0.255.0"), ("x", "1"), ("fd00::5", "129")] {
            ip(address, mask).expect_err(address);
        }
    }

    #[test]
    fn a_route_survives_the_way_there_and_back() {
        let route = Route {
            dest: "10.1.0.0/16".into(),
            gateway: "10.0.0.1".into(),
            device: "eth0".into(),
            source: "10.0.0.5".into(),
            flags: 4,
            mtu: 1400,
            metric: 50,
            ..Default::default()
        };
        let message = super::route(&route, 7).expect("a route");
        assert_eq!(from_route(&message, |index| if index == 7 { "eth0" } else { "" }), route);
        let default = Route { gateway: "fd00::1".into(), family: IPFamily::v6.into(), ..Default::default() };
        let message = super::route(&default, 7).expect("a route");
        assert_eq!(message.header.destination_prefix_length, 0);
        super::route(&Route { dest: "fd00::/64".into(), ..Default::default() }, 7).expect_err("the other family");
    }

    #[test]
    fn a_route_is_the_same_however_it_is_written() {
        let route = |change: fn(&mut Route)| {
            let mut route = Route { gateway: "fd00::1".into(), family: IPFamily::v6.into(), ..Default::default() };
            change(&mut route);
            Key::of(&super::route(&route, 7).expect("a route"))
        };
        let plain = route(|_| ());
        assert_eq!(route(|route| route.metric = 1024), plain);
        assert_eq!(route(|route| route.dest = "::/0".into()), plain);
        assert_eq!(route(|route| route.scope = 253), plain);
        assert_ne!(route(|route| route.metric = 10), plain);
        assert_ne!(route(|route| route.dest = "fd01::/64".into()), plain);
        assert_ne!(route(|route| route.mtu = 1400), plain);
        assert_ne!(route(|route| route.flags = 4), plain);
    }

    #[test]
    fn the_kernels_own_address_is_known() {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let made = "fe80::5054:ff:fe12:3456".parse().expect("an address");
        assert!(is_made_from(made, &mac));
        assert!(!is_made_from(made, &[0x50, 0x54, 0, 0x12, 0x34, 0x56]));
        assert!(!is_made_from("fe80::1".parse().expect("an address"), &mac));
        assert!(!is_made_from("10.0.0.1".parse().expect("an address"), &mac));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_understood(text in ".{0,40}") {
            let _ = mac(&text);
            let _ = ip(&text, &text);
            let _ = super::route(&Route { dest: text.clone(), gateway: text.clone(), ..Default::default() }, 1);
            if check_name(&text).is_ok() {
                prop_assert!(text.len() <= NAME && !text.contains('/'));
            }
        }
    }
}
