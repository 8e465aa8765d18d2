//! Every orphan of the guest is a child of ours: all are reaped, those that somebody waits for are told of.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Exit codes by process id. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<HashMap<i32, watch::Sender<Option<i32>>>>>);

impl Reaper {
    /// Reaps for as long as the guest lives.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let own = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                own.reap();
            }
        });
        Ok(reaper)
    }

    /// Follows a child. Call it before anything is awaited after the clone, so that its end cannot be missed.
    pub(crate) fn follow(&self, pid: i32) -> watch::Receiver<Option<i32>> {
        let (to, from) = watch::channel(None);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, to);
        from
    }

    fn reap(&self) {
        loop {
            // 128 + signal, as shells and runc count
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(_) => return,
            };
            let waiter = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid.as_raw());
            if let Some(waiter) = waiter {
                waiter.send_replace(Some(code));
            }
        }
    }
}
