//! Routes and neighbours: each is made or taken on its own, so that one that cannot be keeps no other from its place.

use futures_util::TryStreamExt;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType};

use agent_api::agent as api;
use agent_api::types::{ARPNeighbor, Route};

use super::{MOST, Network, failed, name, wire};
use crate::error::Error;

impl Network {
    /// Replaces every route but those that the kernel makes for addresses; what stays is not touched.
    pub(crate) async fn update_routes(&self, wanted: api::Routes) -> Result<api::Routes, Error> {
        if wanted.Routes.len() > MOST {
            return Err(Error::Invalid(format!("{} routes: the limit is {MOST}", wanted.Routes.len())));
        }
        let links = self.links().await?;
        let mut refused = Refused::default();
        let mut routes = Vec::new();
        for route in &wanted.Routes {
            let message = index(&links, &route.device, "route").and_then(|index| wire::route(route, index));
            routes.extend(refused.note(message).map(|message| (wire::Key::of(&message), message, route)));
        }
        let mut present = Vec::new();
        for message in self.route_messages().await? {
            let key = wire::Key::of(&message);
            if routes.iter().any(|(wanted, ..)| *wanted == key) {
                present.push(key);
            } else {
                refused.note(self.handle.route().del(message).execute().await.map_err(failed("removing a route")));
            }
        }
        routes.retain(|(key, ..)| !present.contains(key));
        // a gateway must be reachable before a route over it can be made
        routes.sort_by_key(|(.., route)| !route.gateway.is_empty());
        for (_, message, route) in routes {
            refused.note(self.handle.route().add(message).replace().execute().await.map_err(failed(shown(route))));
        }
        refused.outcome().map(|()| wanted)
    }

    /// Entries that never expire; one with the state "failed" is taken away instead.
    pub(crate) async fn update_neighbours(&self, wanted: api::ARPNeighbors) -> Result<(), Error> {
        if wanted.ARPNeighbors.len() > MOST {
            return Err(Error::Invalid(format!("{} neighbours: the limit is {MOST}", wanted.ARPNeighbors.len())));
        }
        let links = self.links().await?;
        let mut refused = Refused::default();
        for neighbour in &wanted.ARPNeighbors {
            refused.note(self.update_neighbour(&links, neighbour).await);
        }
        refused.outcome()
    }

    async fn update_neighbour(&self, links: &[LinkMessage], neighbour: &ARPNeighbor) -> Result<(), Error> {
        let (address, _) = wire::address(neighbour.toIPAddress.as_ref().unwrap_or_default())?;
        let mac = wire::mac(&neighbour.lladdr)?;
        let state = u16::try_from(neighbour.state)
            .map(NeighbourState::from)
            .map_err(|_| Error::Invalid(format!("invalid state {} of a neighbour", neighbour.state)))?;
        let index = index(links, &neighbour.device, "neighbour")?;
        let mut entry = self.handle.neighbours().add(index, address).link_layer_address(&mac).state(state).replace();
        if state != NeighbourState::Failed {
            return entry.execute().await.map_err(failed(format!("neighbour {address}")));
        }
        match self.handle.neighbours().del(entry.message_mut().clone()).execute().await {
            Err(rtnetlink::Error::NetlinkError(error)) if -error.raw_code() == libc::ENOENT => Ok(()),
            other => other.map_err(failed(format!("removing neighbour {address}"))),
        }
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

    /// Of the main table, without those that the kernel makes by itself.
    async fn route_messages(&self) -> Result<Vec<RouteMessage>, Error> {
        let mut out = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut of = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
            of.header.address_family = family;
            let all: Vec<RouteMessage> =
                self.handle.route().get(of).execute().try_collect().await.map_err(failed("listing routes"))?;
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

fn index(links: &[LinkMessage], device: &str, what: &str) -> Result<u32, Error> {
    let found = links.iter().find(|link| name(link) == device).map(|link| link.header.index);
    found.ok_or_else(|| Error::NotFound(format!("network interface {device:.40?} of a {what}")))
}

fn shown(route: &Route) -> String {
    let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
    let over = if route.gateway.is_empty() { String::new() } else { format!(" via {}", route.gateway) };
    format!("adding the route to {}{over} dev {}", or(&route.dest, "default"), route.device)
}

/// What could not be done, while the rest was.
#[derive(Debug, Default)]
struct Refused {
    first: Option<Error>,
    more: usize,
}

impl Refused {
    fn note<T>(&mut self, outcome: Result<T, Error>) -> Option<T> {
        match outcome {
            Ok(value) => return Some(value),
            Err(error) if self.first.is_none() => self.first = Some(error),
            Err(_) => self.more += 1,
        }
        None
    }

    fn outcome(self) -> Result<(), Error> {
        match (self.first, self.more) {
            (None, _) => Ok(()),
            (Some(error), 0) => Err(error),
            (Some(error), more) => Err(Error::Failed(format!("{error} (and {more} more)"))),
        }
    }
}
