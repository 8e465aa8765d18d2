//! The guest's interfaces, routes and neighbours, as the host's pod has them.

mod find;
mod routes;
#[cfg(test)]
mod tests;
mod wire;

use std::net::IpAddr;
use std::time::Duration;

use agent_api::agent as api;
use agent_api::types::Interface;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec};

use self::find::Known;

use crate::error::Error;

/// Most entries of one request.
const MOST: usize = 4096;

/// A netlink connection.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    handle: Handle,
    /// How long an interface that is being plugged may take to appear.
    patience: Duration,
}

impl Network {
    pub(crate) fn open(patience: Duration) -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle, patience })
    }

    /// Makes the interface of that place, or with that MAC address, what the request says.
    pub(crate) async fn update_interface(&self, wanted: Interface) -> Result<Interface, Error> {
        let mac = wire::mac(&wanted.hwAddr)?;
        wire::check_name(&wanted.name)?;
        let addresses = wire::addresses(&wanted.IPAddresses)?;
        let mtu = u32::try_from(wanted.mtu).map_err(|_| Error::Invalid(format!("MTU {} is too large", wanted.mtu)))?;
        let known = Known::new(&wanted.devicePath, &mac)?;
        let shown = format!("{} {}", wanted.hwAddr, wanted.devicePath);
        let (links, place) = self.find(&known, shown.trim_end()).await?;
        let link = &links[place];
        let index = link.header.index;
        let name = name(link);
        if name != wanted.name {
            if let Some(other) = links.iter().find(|link| self::name(link) == wanted.name) {
                // its own turn will come; until then it must not be in the way
                self.rename(other.header.index, &format!("kata{}", other.header.index)).await?;
            }
            self.rename(index, &wanted.name).await?;
        }
        if !link.attributes.contains(&LinkAttribute::Address(mac.clone())) {
            self.set(LinkUnspec::new_with_index(index).down(), "lowering").await?;
            self.set(LinkUnspec::new_with_index(index).address(mac.clone()), "MAC address").await?;
        }
        let no_arp = wanted.raw_flags & libc::IFF_NOARP as u32 != 0;
        if no_arp != link.header.flags.contains(LinkFlags::Noarp) {
            self.set(LinkUnspec::new_with_index(index).arp(!no_arp), "ARP").await?;
        }
        if mtu != 0 {
            self.set(LinkUnspec::new_with_index(index).mtu(mtu), "MTU").await?;
        }
        self.set_addresses(index, &mac, &addresses).await?;
        // also for the address that the kernel makes from the MAC address; a kernel without IPv6 has no such file
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/accept_dad", wanted.name), "0");
        self.set(LinkUnspec::new_with_index(index).up(), "raising").await?;
        Ok(wanted)
    }

    async fn set(&self, change: LinkMessageBuilder<LinkUnspec>, what: &str) -> Result<(), Error> {
        self.handle.link().set(change.build()).execute().await.map_err(failed(format!("{what} of a network interface")))
    }

    /// The kernel renames only what is down.
    async fn rename(&self, index: u32, to: &str) -> Result<(), Error> {
        self.set(LinkUnspec::new_with_index(index).down(), "lowering").await?;
        let change = LinkUnspec::new_with_index(index).name(to.to_owned());
        self.set(change, &format!("name {to}")).await
    }

    async fn set_addresses(&self, index: u32, mac: &[u8], wanted: &[(IpAddr, u8)]) -> Result<(), Error> {
        let mut present = self.address_messages(index).await?;
        let is_unwanted = |message: &&AddressMessage| {
            address(message).is_some_and(|address| {
                !wanted.contains(&(address, message.header.prefix_len)) && !wire::is_made_from(address, mac)
            })
        };
        let unwanted: Vec<_> = present.iter().filter(is_unwanted).cloned().collect();
        if !unwanted.is_empty() {
            for message in unwanted {
                match self.handle.address().del(message).execute().await {
                    // it went with another one
                    Err(rtnetlink::Error::NetlinkError(error)) if -error.raw_code() == libc::EADDRNOTAVAIL => {}
                    other => other.map_err(failed("removing an address"))?,
                }
            }
            // with the first address of a subnet the kernel takes the others
            present = self.address_messages(index).await?;
        }
        let present: Vec<_> =
            present.iter().filter_map(|message| Some((address(message)?, message.header.prefix_len))).collect();
        for (address, prefix) in wanted.iter().filter(|one| !present.contains(one)) {
            // with the usual broadcast address, as CNI plugins give it: the protocol has no field for one
            let mut request = self.handle.address().add(index, *address, *prefix);
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

    async fn links(&self) -> Result<Vec<LinkMessage>, Error> {
        self.handle.link().get().execute().try_collect().await.map_err(failed("listing network interfaces"))
    }

    async fn address_messages(&self, index: u32) -> Result<Vec<AddressMessage>, Error> {
        let request = self.handle.address().get().set_link_index_filter(index);
        request.execute().try_collect().await.map_err(failed("listing addresses"))
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
