//! The end of a pod.

use std::sync::Arc;
use std::time::Duration;

use agent_api::agent as api;

use super::{GOODBYE, Inner};
use crate::Error;

/// The guest writes its caches back, the VM ends, the journal is undone.
pub(super) async fn stop(inner: &Arc<Inner>) -> Result<(), Error> {
    let Some(mut host) = inner.host.lock().await.take() else { return Ok(()) };
    if let Some(forwarding) = host.forwarding.take() {
        forwarding.stop().await;
    }
    let alive = host.vm.exit().borrow().is_none();
    if alive {
        let goodbye = inner
            .agent
            .call_within("saying goodbye to the guest", Some(GOODBYE), |client, context| async {
                client.destroy_sandbox(context, &api::DestroySandboxRequest::new()).await
            })
            .await;
        if let Err(error) = goodbye {
            tracing::warn!(%error, "the guest did not end by itself");
        }
    }
    // the answer says that everything is on the host: there is nothing to wait for
    host.vm.stop(Duration::ZERO).await?;
    if let Some(following) = host.following.take() {
        following.end().await;
    }
    host.share.daemon.stop(Duration::ZERO).await;
    let run = host.run;
    tokio::task::spawn_blocking(move || run.undo())
        .await
        .map_err(|error| Error::Host { what: "cleaning".into(), source: std::io::Error::other(error) })?
        .map_err(Error::host("cleaning up the sandbox"))
}
