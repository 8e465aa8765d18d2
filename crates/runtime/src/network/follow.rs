//! The VM follows its pod's network namespace for as long as both live.

use std::sync::Arc;

use hypervisor::Vm;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::attached::Attached;
use crate::agent_client::AgentClient;

/// Follows until it is ended.
#[derive(Debug)]
pub(crate) struct Following {
    end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Following {
    pub(super) fn start(attached: Attached, agent: AgentClient, vm: Arc<dyn Vm>) -> Self {
        let (end, ended) = oneshot::channel();
        Self { end, task: tokio::spawn(follow(attached, agent, vm, ended)) }
    }

    /// Ends it between two changes, so that nothing is made after what the undo journal undoes. The VM should be gone by
    /// then: no call into it is waited for any longer.
    pub(crate) async fn end(self) {
        let _ = self.end.send(());
        if let Err(error) = self.task.await {
            tracing::error!(%error, "following the pod's network");
        }
    }
}

async fn follow(mut attached: Attached, agent: AgentClient, vm: Arc<dyn Vm>, mut ended: oneshot::Receiver<()>) {
    loop {
        tokio::select! {
            biased;
            _ = &mut ended => return,
            change = attached.changes.next() => if let Err(error) = change {
                tracing::error!(%error, "changes of the pod's network are not seen any more");
                return;
            },
        }
        if let Err(error) = attached.follow(&agent, &vm).await {
            tracing::debug!(%error, "following the pod's network");
            return;
        }
    }
}
