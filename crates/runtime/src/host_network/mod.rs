//! What the host has of networks: namespaces, links and cards, and how what was done to them is undone.
//!
//! Below the undo journal, which calls `undo`; what a pod's network is made of them is the business of [`crate::network`].

mod links;
mod netns;
mod physical;
pub(crate) mod undo;

pub(crate) use self::links::{find, is_on};
pub(crate) use self::netns::NetworkNamespace;
pub(crate) use self::physical::Function;
use crate::Error;

/// Where the host's devices are.
pub(crate) const SYSFS: &str = "/sys";
/// The name of the process that stands for a container ([`crate::anchor`]), by which its namespace is known as a pod's.
pub(crate) const ANCHOR: &str = "kata-anchor";

/// For `map_err`: names what netlink refused.
pub(crate) fn failed(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    let what = what.into();
    move |error| {
        let source = match &error {
            rtnetlink::Error::NetlinkError(message) if message.code.is_some() => {
                std::io::Error::from_raw_os_error(-message.raw_code())
            }
            _ => std::io::Error::other(error),
        };
        Error::Host { what, source }
    }
}
