//! A link of the pod and a tap, joined by traffic control: what comes in at one goes out at the other, both ways, before
//! the host's own network stack sees it (tc-mirred(8)). `u32` matches everything on every kernel.

use std::fs;
use std::os::fd::OwnedFd;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::tc::TcAttribute;
use rtnetlink::{Handle, LinkUnspec};

use super::scan::Link;
use super::{failed, tap};
use crate::Error;
use crate::host_network::{find, is_on};

/// `ETH_P_ALL`, in network byte order as the kernel wants it here.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// Where an ingress qdisc hangs (tc-actions: `parent ffff:`).
const INGRESS: u32 = 0xffff_0000;

/// Whether somebody takes the link's traffic already: by a redirection, or by a macvtap on top.
pub(super) async fn is_taken(handle: &Handle, link: &Link) -> Result<bool, Error> {
    let what = || failed(format!("queueing disciplines of {}", link.name));
    let all: Vec<_> =
        handle.qdisc().get().index(link.index as i32).ingress().execute().try_collect().await.map_err(what())?;
    let is_redirected = all.iter().any(|message| {
        message.header.index == link.index as i32
            && message
                .attributes
                .iter()
                .any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind == "ingress" || kind == "clsact"))
    });
    if is_redirected {
        return Ok(true);
    }
    let links: Vec<_> = handle.link().get().execute().try_collect().await.map_err(what())?;
    Ok(links.iter().any(|other| is_on(other, link.index)))
}

/// Joins; the caller has written the undo down. Returns the tap's descriptors, one a queue.
pub(super) async fn connect(handle: &Handle, link: &Link, name: &str, queues: u32) -> Result<Vec<OwnedFd>, Error> {
    let what = |step: &str| failed(format!("{step} of interface {}", link.name));
    let fds = tap::open(name, queues).map_err(Error::host(format!("tap {name}")))?;
    silence(name);
    let tap = find(handle, name).await?.header.index;
    let up = LinkUnspec::new_with_index(tap).mtu(link.mtu).up().build();
    handle.link().set(up).execute().await.map_err(what("raising the tap"))?;
    for (from, to) in [(link.index, tap), (tap, link.index)] {
        handle.qdisc().add(from as i32).ingress().execute().await.map_err(what("the ingress queue"))?;
        // parent and protocol first: redirect finishes the message
        handle
            .traffic_filter(from as i32)
            .add()
            .parent(INGRESS)
            .protocol(ALL_PROTOCOLS)
            .redirect(to)
            .map_err(what("the redirection"))?
            .execute()
            .await
            .map_err(what("the redirection"))?;
    }
    Ok(fds)
}

/// Follows a changed MTU.
pub(super) async fn set_mtu(handle: &Handle, name: &str, mtu: u32) -> Result<(), Error> {
    let tap = find(handle, name).await?.header.index;
    let change = LinkUnspec::new_with_index(tap).mtu(mtu).build();
    handle.link().set(change).execute().await.map_err(failed(format!("MTU {mtu} of {name}")))
}

/// The host's end of a wire that is the guest's shall not speak by itself.
pub(super) fn silence(name: &str) {
    // a kernel without IPv6 has no such file
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
}
