//! The end of a pod.

use std::sync::Arc;
use std::time::Duration;

use agent_api::agent as api;

use super::start::SETTLE;
use super::{GOODBYE, Host, Inner};
use crate::Error;

/// What still runs in the guest is ended there, so that its files are whole; the VM ends; the journal is undone.
///
/// A guest in which nothing runs has nothing to say: it writes through to virtio-fs and 9p, also memory maps when their
/// process ends (the kernel's fs/fuse, fs/9p), and a process that has ended has told so after that. File systems of the
/// guest's own are another matter.
///
/// What could not be given back is kept: another stop goes on with it. One that is called meanwhile waits.
pub(super) async fn stop(inner: &Arc<Inner>) -> Result<(), Error> {
    let mut ending = inner.ending.lock().await;
    if let Some(host) = inner.host.lock().await.take() {
        *ending = Some(host);
    }
    let Some(host) = ending.as_mut() else { return Ok(()) };
    end(inner, host).await?;
    *ending = None;
    Ok(())
}

async fn end(inner: &Arc<Inner>, host: &mut Host) -> Result<(), Error> {
    if let Some(forwarding) = host.forwarding.take() {
        forwarding.stop().await;
    }
    if let Some(names) = host.names.take() {
        names.stop().await;
    }
    let mut is_quiet = true;
    if host.vm.exit().borrow().is_none() && (inner.has_running() || inner.has_disks()) {
        // to write back what is only in the guest's memory takes as long as the host's disks do
        let limit = if inner.has_disks() { inner.env.config.agent.request_timeout } else { GOODBYE };
        let goodbye = inner
            .agent
            .call_within("saying goodbye to the guest", Some(limit), |client, context| async {
                client.destroy_sandbox(context, &api::DestroySandboxRequest::new()).await
            })
            .await;
        if let Err(error) = goodbye {
            tracing::warn!(%error, "the guest did not end by itself");
            is_quiet = false;
        }
    }
    let ended = if is_quiet {
        // everything is on the host: there is nothing to wait for
        tokio::join!(host.vm.stop(Duration::ZERO), host.share.stop()).0
    } else {
        let ended = host.vm.stop(Duration::ZERO).await;
        host.share.stop().await;
        ended
    };
    if let Some(following) = host.following.take() {
        following.end().await;
    }
    // a job that does not hang is through before its mounts are taken off; one that hangs makes nothing more
    inner.work.settled(SETTLE).await;
    let run = Arc::clone(&host.run);
    let undone = tokio::task::spawn_blocking(move || run.undo())
        .await
        .map_err(|error| Error::Host { what: "cleaning".into(), source: std::io::Error::other(error) })?
        .map_err(Error::host("cleaning up the sandbox"));
    // the journal has ended the VM all the same
    undone.and(ended.map_err(Error::from))
}
