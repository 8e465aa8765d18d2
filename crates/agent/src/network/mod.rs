//! The guest's interfaces, routes and neighbours, as the host's pod has them.

mod wire;

use std::net::IpAddr;

use agent_api::agent as api;
use agent_api::types::Interface;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

use crate::error::Error;

/// Most entries of one request.
const MOST: usize = 4096;

/// A netlink connection.
#[derive(Debug, Clone)]
pub(crate) struct Network(Handle);

impl Network {
    pub(crate) fn open() -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Finds the interface by its MAC address and makes it what the request says.
    pub(crate) async fn update_interface(&self, wanted: Interface) -> Result<Interface, Error> {
        let mac = wire::mac(&wanted.hwAddr)?;
        wire::check_name(&wanted.name)?;
        let addresses = wire::addresses(&wanted.IPAddresses)?;
        let mtu = u32::try_from(wanted.mtu).map_err(|_| Error::Invalid(format!("MTU {} is too large", wanted.mtu)))?;
        let links = self.links().await?;
        let own = |link: &&LinkMessage| {
            link.attributes.iter().any(|one| matches!(one, LinkAttribute::Address(bytes) if *bytes == mac))
        };
        let link = links
            .iter()
            .find(own)
            .ok_or_else(|| Error::NotFound(format!("network interface with the MAC address {}", wanted.hwAddr)))?;
        let index = link.header.index;
        let name = name(link);
        if name != wanted.name {
            if let Some(other) = links.iter().find(|link| self::name(link) == wanted.name) {
                // its own turn will come; until then it must not be in the way
                self.rename(other.header.index, &format!("kata{}", other.header.index)).await?;
            }
            self.rename(index, &wanted.name).await?;
        }
        if mtu != 0 {
            self.set(LinkUnspec::new_with_index(index).mtu(mtu), "MTU").await?;
        }
        self.set_addresses(index, &addresses).await?;
        self.set(LinkUnspec::new_with_index(index).up(), "raising").await?;
        Ok(wanted)
    }

    async fn set(&self, change: LinkMessageBuilder<LinkUnspec>, what: &str) -> Result<(), Error> {
        self.0.link().set(change.build()).execute().await.map_err(failed(format!("{what} of a network interface")))
    }

    /// The kernel renames only what is down.
    async fn rename(&self, index: u32, to: &str) -> Result<(), Error> {
        self.set(LinkUnspec::new_with_index(index).down(), "lowering").await?;
        let change = LinkUnspec::new_with_index(index).name(to.to_owned());
        self.set(change, &format!("name {to}")).await
    }

    async fn set_addresses(&self, index: u32, wanted: &[(IpAddr, u8)]) -> Result<(), Error> {
        let mut present = Vec::new();
        for message in self.address_messages(index).await? {
            let Some(address) = address(&message) else { continue };
            let keep = wanted.contains(&(address, message.header.prefix_len)) || wire::is_link_local(address);
            if keep {
                present.push((address, message.header.prefix_len));
            } else {
                self.0.address().del(message).execute().await.map_err(failed(format!("removing address {address}")))?;
            }
        }
        for (address, prefix) in wanted.iter().filter(|one| !present.contains(one)) {
            // with the usual broadcast address, as CNI plugins give it: the protocol has no field for one
            let mut request = self.0.address().add(index, *address, *prefix);
            if address.is_ipv6() {
                // the host has found out that it is unique, and nothing can be sent while the guest finds out again
                let message = request.message_mut();
                message.header.flags |= AddressHeaderFlags::Nodad;
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            request.execute().await.map_err(failed(format!("address {address}/{prefix}")))?;
        }
        Ok(())
    }

    /// Replaces every route but those that the kernel makes for addresses.
    pub(crate) async fn update_routes(&self, wanted: api::Routes) -> Result<api::Routes, Error> {
        if wanted.Routes.len() > MOST {
            return Err(Error::Invalid(format!("{} routes are more than {MOST}", wanted.Routes.len())));
        }
        let links = self.links().await?;
        let index = |device: &str| {
            let found = links.iter().find(|link| name(link) == device).map(|link| link.header.index);
            found.ok_or_else(|| Error::NotFound(format!("network interface {device:?} of a route")))
        };
        // all are understood before one is changed
        let mut routes = Vec::new();
        for route in &wanted.Routes {
            routes.push((wire::route(route, index(&route.device)?)?, route));
        }
        for message in self.route_messages().await? {
            self.0.route().del(message).execute().await.map_err(failed("removing a route"))?;
        }
        // a gateway must be reachable before a route over it can be made
        routes.sort_by_key(|(_, route)| !route.gateway.is_empty());
        for (message, route) in routes {
            let what = format!("route to {:?} over {:?} at {}", route.dest, route.gateway, route.device);
            self.0.route().add(message).replace().execute().await.map_err(failed(what))?;
        }
        Ok(wanted)
    }

    /// Entries that never expire.
    pub(crate) async fn add_neighbours(&self, wanted: api::ARPNeighbors) -> Result<(), Error> {
        if wanted.ARPNeighbors.len() > MOST {
            return Err(Error::Invalid(format!("{} neighbours are more than {MOST}", wanted.ARPNeighbors.len())));
        }
        let links = self.links().await?;
        for neighbour in &wanted.ARPNeighbors {
            let (address, _) = wire::address(neighbour.toIPAddress.as_ref().unwrap_or_default())?;
            let mac = wire::mac(&neighbour.lladdr)?;
            let link = links.iter().find(|link| name(link) == neighbour.device);
            let link = link
                .ok_or_else(|| Error::NotFound(format!("network interface {:?} of a neighbour", neighbour.device)))?;
            self.0
                .neighbours()
                .add(link.header.index, address)
                .link_layer_address(&mac)
                .state(NeighbourState::from(neighbour.state as u16))
                .replace()
                .execute()
                .await
                .map_err(failed(format!("neighbour {address}")))?;
        }
        Ok(())
    }

    pub(crate) async fn interfaces(&self) -> Result<api::Interfaces, Error> {
        let mut out = api::Interfaces::new();
        for link in self.links().await? {
            if link.header.flags.contains(LinkFlags::Loopback) {
                continue;
            }
            let addresses = self.address_messages(link.header.index).await?;
            let addresses = addresses.iter().filter_map(|one| Some((address(one)?, one.header.prefix_len)));
            out.Interfaces.push(wire::interface(&link, name(&link), addresses));
        }
        Ok(out)
    }

    pub(crate) async fn routes(&self) -> Result<api::Routes, Error> {
        let links = self.links().await?;
        let device = |index: u32| links.iter().find(|link| link.header.index == index).map(name).unwrap_or_default();
        let routes = self.route_messages().await?;
        Ok(api::Routes {
            Routes: routes.iter().map(|route| wire::from_route(route, device)).collect(),
            ..Default::default()
        })
    }

    async fn links(&self) -> Result<Vec<LinkMessage>, Error> {
        self.0.link().get().execute().try_collect().await.map_err(failed("listing network interfaces"))
    }

    async fn address_messages(&self, index: u32) -> Result<Vec<AddressMessage>, Error> {
        let request = self.0.address().get().set_link_index_filter(index);
        request.execute().try_collect().await.map_err(failed("listing addresses"))
    }

    /// Of the main table, without those that the kernel makes by itself.
    async fn route_messages(&self) -> Result<Vec<RouteMessage>, Error> {
        let mut out = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut of = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
            of.header.address_family = family;
            let all: Vec<RouteMessage> =
                self.0.route().get(of).execute().try_collect().await.map_err(failed("listing routes"))?;
            out.extend(all.into_iter().filter(|message| {
                let header = &message.header;
                let table = message.attributes.iter().find_map(|one| match one {
                    RouteAttribute::Table(number) => Some(*number),
                    _ => None,
                });
                table.unwrap_or_else(|| header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
                    && header.kind == RouteType::Unicast
                    && !matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra)
            }));
        }
        Ok(out)
    }
}

fn name(link: &LinkMessage) -> &str {
    link.attributes
        .iter()
        .find_map(|one| if let LinkAttribute::IfName(name) = one { Some(name.as_str()) } else { None })
        .unwrap_or_default()
}

fn address(message: &AddressMessage) -> Option<IpAddr> {
    let of = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    of(|one| if let AddressAttribute::Local(address) = one { Some(*address) } else { None })
        .or_else(|| of(|one| if let AddressAttribute::Address(address) = one { Some(*address) } else { None }))
}

/// For `map_err`: names what was tried, in the kernel's words.
fn failed(what: impl std::fmt::Display) -> impl FnOnce(rtnetlink::Error) -> Error {
    move |error| match &error {
        rtnetlink::Error::NetlinkError(message) if message.code.is_some() => {
            Error::failed(what)(std::io::Error::from_raw_os_error(-message.raw_code()))
        }
        _ => Error::failed(what)(error.to_string()),
    }
}
