//! The VM follows its pod's network namespace for as long as both live.

use std::sync::Arc;

use hypervisor::Vm;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::attached::Attached;
use crate::agent_client::AgentClient;

/// Follows until it is ended.
#[derive(Debug)]
pub(crate) struct Following {
    end: oneshot::Sender<()>,
    settle: Settle,
    task: JoinHandle<()>,
}

/// Asks for the changes until now to be in the VM.
#[derive(Debug, Clone)]
pub(crate) struct Settle(mpsc::Sender<oneshot::Sender<()>>);

impl Settle {
    /// Returns when the VM has what has changed until now, or will not get it: that is logged.
    pub(crate) async fn settled(&self) {
        let (done, wait) = oneshot::channel();
        if self.0.send(done).await.is_ok() {
            let _ = wait.await;
        }
    }
}

impl Following {
    pub(super) fn start(attached: Attached, agent: AgentClient, vm: Arc<dyn Vm>) -> Self {
        let (end, ended) = oneshot::channel();
        let (settle, wishes) = mpsc::channel(1);
        Self { end, settle: Settle(settle), task: tokio::spawn(follow(attached, agent, vm, ended, wishes)) }
    }

    /// For those that need the network as it is now.
    pub(crate) fn settle(&self) -> Settle {
        self.settle.clone()
    }

    /// Ends it between two changes, so that nothing is made after what the undo journal undoes. The VM should be gone by
    /// then: no call into it is waited for any longer.
    pub(crate) async fn end(self) {
        let _ = self.end.send(());
        if let Err(error) = self.task.await {
            tracing::error!(%error, "cannot follow changes of the pod's network");
        }
    }
}

async fn follow(
    mut attached: Attached,
    agent: AgentClient,
    vm: Arc<dyn Vm>,
    mut ended: oneshot::Receiver<()>,
    mut wishes: mpsc::Receiver<oneshot::Sender<()>>,
) {
    loop {
        let mut wish = None;
        tokio::select! {
            biased;
            _ = &mut ended => return,
            Some(wisher) = wishes.recv() => wish = Some(wisher),
            change = attached.changes.next() => if let Err(error) = change {
                tracing::error!(%error, "changes of the pod's network are not followed any more");
                return;
            },
        }
        // who waits does not wait for more to come
        if (wish.is_none() || attached.changes.are_there())
            && let Err(error) = attached.follow(&agent, &vm).await
        {
            tracing::debug!(%error, "following changes of the pod's network ends");
            return;
        }
    }
}
