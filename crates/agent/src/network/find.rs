//! Finds a network interface by where its device is, or by its MAC address, and waits for one that is being plugged.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use tokio::io::unix::AsyncFd;

use super::{Network, name};
use crate::error::Error;
use crate::io::drain;
use crate::pci::{self, Slots};

/// How an interface is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known {
    Path(Slots),
    Mac(Vec<u8>),
}

impl Known {
    /// By its path, where there is one: MAC addresses may be the same.
    pub(super) fn new(path: &str, mac: &[u8]) -> Result<Self, Error> {
        if path.is_empty() { Ok(Self::Mac(mac.to_vec())) } else { Slots::parse(path).map(Self::Path) }
    }

    fn find(&self, links: &[LinkMessage]) -> Option<usize> {
        match self {
            Self::Path(slots) => {
                let there = slots.find(Path::new(pci::ROOT), "net")?;
                links.iter().position(|link| OsStr::new(name(link)) == there)
            }
            Self::Mac(mac) => links.iter().position(|link| {
                link.attributes.iter().any(|one| matches!(one, LinkAttribute::Address(bytes) if bytes == mac))
            }),
        }
    }
}

impl Network {
    /// All links, and the place of the wanted one among them.
    pub(super) async fn find(&self, known: &Known, shown: &str) -> Result<(Vec<LinkMessage>, usize), Error> {
        let links = self.links().await?;
        if let Some(place) = known.find(&links) {
            return Ok((links, place));
        }
        let plugged = async {
            // first listen, then look: nothing can come in between
            let events = link_events().map_err(Error::failed("network events"))?;
            loop {
                let links = self.links().await?;
                if let Some(place) = known.find(&links) {
                    return Ok((links, place));
                }
                let mut ready = events.readable().await.map_err(Error::failed("network events"))?;
                let _ = ready.try_io(|events| drain(events.get_ref()));
            }
        };
        tokio::time::timeout(self.patience, plugged).await.unwrap_or_else(|_| {
            Err(Error::NotFound(format!("network interface {shown} (after waiting for {:?})", self.patience)))
        })
    }
}

/// Tells of links that come and go; their names in sysfs are there before that.
fn link_events() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, libc::RTMGRP_LINK as u32))?;
    crate::io::watch(fd)
}
