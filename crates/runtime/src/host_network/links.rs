//! Links of the host: finding them, and taking away what joined one with a VM.

use futures_util::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use super::failed;
use crate::Error;

/// The link of that name, which may be gone.
pub(crate) async fn find(handle: &Handle, name: &str) -> Result<LinkMessage, Error> {
    let found = handle.link().get().match_name(name.to_owned()).execute().try_collect::<Vec<_>>().await;
    let found = found.map_err(failed(format!("interface {name}")))?;
    let named = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(other) if other == name);
    found
        .into_iter()
        .find(|message| message.attributes.iter().any(named))
        .ok_or_else(|| Error::NotFound(format!("interface {name}")))
}

/// Takes the redirection of the link with this index away, with what hangs on it. Nothing there is success.
pub(super) async fn remove_redirection(handle: &Handle, index: u32) -> Result<(), Error> {
    let mut request = handle.qdisc().del(index as i32);
    request.message_mut().header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
    match request.execute().await {
        // no such link, no such qdisc
        Err(rtnetlink::Error::NetlinkError(error))
            if matches!(-error.raw_code(), libc::ENODEV | libc::ENOENT | libc::EINVAL) =>
        {
            Ok(())
        }
        other => other.map_err(failed(format!("the ingress queue of interface {index}"))),
    }
}

/// Removes the macvtap `name`, if it is the one on top of the interface with the index `below`.
pub(super) async fn remove_macvtap(handle: &Handle, name: &str, below: u32) -> Result<(), Error> {
    let Ok(message) = find(handle, name).await else { return Ok(()) };
    if !is_on(&message, below) {
        return Ok(());
    }
    match handle.link().del(message.header.index).execute().await {
        Err(rtnetlink::Error::NetlinkError(error)) if -error.raw_code() == libc::ENODEV => Ok(()),
        other => other.map_err(failed(format!("removing the macvtap {name}"))),
    }
}

/// Whether the link is a macvtap or macvlan on top of that interface of the same namespace.
pub(crate) fn is_on(message: &LinkMessage, below: u32) -> bool {
    let (mut is_kind, mut is_above, mut is_elsewhere) = (false, false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                let kinds = [InfoKind::MacVtap, InfoKind::MacVlan];
                is_kind = infos.iter().any(|one| matches!(one, LinkInfo::Kind(kind) if kinds.contains(kind)));
            }
            LinkAttribute::Link(index) => is_above = *index == below,
            LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
            _ => {}
        }
    }
    is_kind && is_above && !is_elsewhere
}
