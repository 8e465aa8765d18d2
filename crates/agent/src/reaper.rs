//! Every orphan of the guest is a child of ours: all are reaped, those that somebody waits for are told of.
#![allow(unsafe_code, reason = "waitpid with statuses that nix cannot hold")]

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

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
            let mut status = 0;
            // not nix's: it has no word for an end by a real-time signal, and the child would be reaped and lost
            // SAFETY: a pointer to an integer that lives through the call (waitpid(2)).
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid < 0 && std::io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                continue;
            }
            if pid <= 0 {
                return;
            }
            let waiter = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
            let code = exit_code(status);
            if let Some(waiter) = waiter {
                waiter.send_replace(Some(code));
            }
        }
    }
}

/// 128 + signal, as shells and runc count.
fn exit_code(status: i32) -> i32 {
    if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::exit_code;

    #[test]
    fn ends_by_code_signal_and_real_time_signal() {
        for (script, code) in [("exit 7", 7), ("kill -TERM $$", 143), ("kill -40 $$", 168)] {
            let status = Command::new("/bin/sh").args(["-c", script]).status().expect("ran");
            assert_eq!(exit_code(status.into_raw()), code, "{script}");
        }
    }
}
