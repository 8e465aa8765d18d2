//! What is waited for while a pod lives: the end of processes, of the VM, of virtiofsd, and want of memory.

use std::sync::Arc;
use std::time::Duration;

use agent_api::agent as api;

use super::{Event, Inner, Sandbox};
use crate::container::Process;
use crate::container::io::Outputs;
use crate::{ContainerId, Error};

/// Exit status of a process whose VM is gone (what containerd uses when it does not know).
const LOST: u32 = 255;
/// Exit status of a process that was killed.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// Copies its output and tells its end. For a container's first process that begins before the start, which then has
/// less to wait for.
pub(super) fn process(inner: &Arc<Inner>, process: Arc<Process>, outputs: Outputs) {
    outputs.copy(&inner.agent, &process);
    exit(inner, process);
}

/// Waits for the end of `process` and tells it. The end of the VM is the end of every process in it.
fn exit(inner: &Arc<Inner>, process: Arc<Process>) {
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        let request = api::WaitProcessRequest {
            container_id: process.name.container.as_str().into(),
            exec_id: process.name.wire_exec(),
            ..Default::default()
        };
        let answer = inner
            .agent
            .call_within("waiting for the process", None, |client, context| async {
                client.wait_process(context, &request).await
            })
            .await;
        let status = match answer {
            Ok(answer) => {
                process.output.before_the_exit(|| inner.agent.round_trip()).await;
                answer.status as u32
            }
            Err(error) => {
                if process.exit().is_none() {
                    tracing::error!(container = %process.name.container, %error, "cannot learn the exit status of a process");
                }
                lost(&inner, &process)
            }
        };
        // a quick one ends before the answer to its start has been seen
        drop(process.changing.lock().await);
        let container = inner.made(&process.name.container);
        let pid = container.as_ref().map_or(0, |container| container.anchor.pid());
        if let (None, Some(container)) = (&process.name.exec, container) {
            // nobody who hears of the end finds it alive
            container.anchor.end().await;
        }
        if let Some(exit) = process.ended(status) {
            let _ = inner.events.send(Event::Exit { process: process.name.clone(), exit, pid });
        }
        if process.name.exec.is_none() {
            end_execs(&inner, &process.name.container);
        }
    });
}

/// The status of a process whose VM is gone, after the reason was told where it is known: the host's kernel had to kill the
/// VM, which stands for all that ran in it.
fn lost(inner: &Inner, process: &Process) -> u32 {
    if !inner.memory.is_killed() {
        return LOST;
    }
    if process.exit().is_none() && process.name.exec.is_none() {
        tracing::error!(container = %process.name.container, "the host's OOM killer killed the VM: {}", inner.memory);
        let _ = inner.events.send(Event::Oom(process.name.container.clone()));
    }
    KILLED
}

/// With a container's first process its others end; each has its own waiter, except those that were never started.
fn end_execs(inner: &Arc<Inner>, id: &ContainerId) {
    let Some(container) = inner.made(id) else { return };
    for process in container.all() {
        if process.status() == crate::Status::Created {
            process.ended(LOST);
        }
    }
}

impl Sandbox {
    /// Whoever kills the process that stands for a container wants the container's end, as where they are the same.
    pub(super) fn watch_anchor(&self, id: &ContainerId) {
        let Some(container) = self.0.made(id) else { return };
        let (killed, inner, name) = (container.anchor.killed(), Arc::downgrade(&self.0), container.init.name.clone());
        drop(container);
        tokio::spawn(async move {
            if !killed.await {
                return;
            }
            let Some(inner) = inner.upgrade() else { return };
            tracing::warn!(container = %name.container, "the container's anchor process on the host was killed: killing the container");
            if let Err(error) = Sandbox(inner).signal(&name, libc::SIGKILL as u32, true).await {
                tracing::debug!(%error, "killing the container");
            }
        });
    }
}

/// A pod cannot live without its files: with virtiofsd the VM ends.
pub(super) async fn virtiofsd(inner: &Arc<Inner>) {
    let Some(ended) = inner.host.lock().await.as_ref().map(|host| host.share.ended()) else { return };
    let inner = Arc::downgrade(inner);
    tokio::spawn(async move {
        let Some(reason) = ended.await.map(|end| end.to_string()) else { return };
        let Some(inner) = inner.upgrade() else { return };
        // a normal stop has taken the host's side already
        if let Some(host) = inner.host.lock().await.as_mut() {
            tracing::error!(reason, "virtiofsd exited: stopping the VM");
            if let Err(error) = host.vm.stop(Duration::ZERO).await {
                tracing::error!(%error, "cannot stop the VM");
            }
        }
    });
}

/// Asks the agent again and again for containers that were hit by the guest's out-of-memory killer (a long poll).
pub(super) fn memory(inner: &Arc<Inner>) {
    let (agent, events, containers) = (inner.agent.clone(), inner.events.clone(), Arc::downgrade(inner));
    tokio::spawn(async move {
        loop {
            let request = api::GetOOMEventRequest::new();
            let answer = agent
                .call_within("waiting for OOM events of the guest", None, |client, context| async {
                    client.get_oom_event(context, &request).await
                })
                .await;
            match answer {
                Ok(hit) => {
                    let Ok(id) = ContainerId::try_from(hit.container_id.as_str()) else { continue };
                    // the guest tells of its own containers only
                    if !containers.upgrade().is_some_and(|inner| inner.has(&id)) {
                        continue;
                    }
                    if events.send(Event::Oom(id)).is_err() {
                        return;
                    }
                }
                // an agent without the call, or the end of the sandbox
                Err(Error::Agent { .. } | Error::VmGone { .. }) => return,
                Err(error) => {
                    tracing::debug!(%error, "out-of-memory events");
                    return;
                }
            }
        }
    });
}
