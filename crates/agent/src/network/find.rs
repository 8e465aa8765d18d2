//! Finds a network interface by where its device is, or by its MAC address, and waits for one that is being plugged.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use tokio::io::unix::AsyncFd;

use super::{Network, name};
use crate::error::Error;

/// Where the root bus is in sysfs.
const ROOT: &str = "/sys/devices/pci0000:00";
/// Most bridges on the way to a device.
const DEEPEST: usize = 8;

/// How an interface is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known {
    /// Slots from the root bus on, each with its function.
    Path(Vec<(u8, u8)>),
    Mac(Vec<u8>),
}

impl Known {
    /// By its path, where there is one: MAC addresses may be the same.
    pub(super) fn new(path: &str, mac: &[u8]) -> Result<Self, Error> {
        if path.is_empty() { Ok(Self::Mac(mac.to_vec())) } else { slots(path).map(Self::Path) }
    }

    fn find(&self, links: &[LinkMessage]) -> Option<usize> {
        match self {
            Self::Path(slots) => {
                let there = interface_at(Path::new(ROOT), slots)?;
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
            Err(Error::NotFound(format!("network interface {shown} (waited {:?} for it)", self.patience)))
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

/// What it is does not matter; a lost one is as good as any.
fn drain(events: &OwnedFd) -> io::Result<()> {
    loop {
        match recv(events.as_raw_fd(), &mut [0], MsgFlags::MSG_TRUNC) {
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// `02/1f.3`: slots in hexadecimal, each with a function where that is not 0.
fn slots(path: &str) -> Result<Vec<(u8, u8)>, Error> {
    let number = |text: &str, digits: usize, most: u8| {
        let plain = (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        u8::from_str_radix(text, 16).ok().filter(|number| plain && *number <= most)
    };
    let slot = |text: &str| {
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        Some((number(slot, 2, 0x1f)?, number(function, 1, 7)?))
    };
    let slots: Option<Vec<_>> = path.split('/').take(DEEPEST + 1).map(slot).collect();
    slots
        .filter(|slots| slots.len() <= DEEPEST)
        .ok_or_else(|| Error::Invalid(format!("PCI path {path:.80?} is not like 1e/01")))
}

/// The name of the interface of the device there.
fn interface_at(root: &Path, slots: &[(u8, u8)]) -> Option<std::ffi::OsString> {
    let mut device = root.to_owned();
    for (slot, function) in slots {
        // domain and bus are the kernel's choice
        device = entry(&device, |name| name.ends_with(&format!(":{slot:02x}.{function}")))?;
    }
    // a virtio device is one below its PCI device
    let owner = if device.join("net").is_dir() { device } else { entry(&device, |name| name.starts_with("virtio"))? };
    entry(&owner.join("net"), |_| true)?.file_name().map(OsStr::to_owned)
}

fn entry(folder: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries.into_iter().find(|entry| entry.file_name().to_str().is_some_and(&wanted)).map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_card_is_found_behind_its_bridge() {
        let root = tempfile::tempdir().expect("a folder");
        for path in
            ["0000:00:1e.0/0000:01:02.0/virtio3/net/eth1", "0000:00:03.0/virtio0/net/eth0", "0000:00:04.1/net/enp4"]
        {
            fs::create_dir_all(root.path().join(path)).expect("made");
        }
        let at = |path: &str| {
            let name = interface_at(root.path(), &slots(path).expect("a path"))?;
            Some(name.to_str().expect("a name").to_owned())
        };
        assert_eq!(at("1e/02").as_deref(), Some("eth1"));
        assert_eq!(at("03").as_deref(), Some("eth0"));
        assert_eq!(at("04.1").as_deref(), Some("enp4"));
        assert_eq!(at("04"), None);
        assert_eq!(at("1e/03"), None);
        assert_eq!(at("1e"), None);
    }

    #[test]
    fn paths_are_as_katas() {
        assert_eq!(slots("02/1f.3"), Ok(vec![(2, 0), (0x1f, 3)]));
        for path in ["/", "20", "1.8", "+1", "../..", "1e//01", "0/0/0/0/0/0/0/0/0"] {
            slots(path).expect_err(path);
        }
    }

    proptest! {
        #[test]
        fn any_path_is_refused_or_understood(path in ".{0,40}") {
            if let Ok(slots) = slots(&path) {
                prop_assert!((1..=DEEPEST).contains(&slots.len()));
            }
        }
    }
}
