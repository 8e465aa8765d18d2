//! Every orphan of the guest is a child of ours: all are reaped, those that somebody waits for are told of.
#![allow(unsafe_code, reason = "waitpid with statuses that nix cannot hold")]

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::sync::watch;

/// Exit codes by process id. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<HashMap<i32, watch::Sender<Option<i32>>>>>);

impl Reaper {
    /// Reaps for as long as the guest lives. Call it before there are other threads: they must not take the signal.
    ///
    /// By signalfd(2): a handler's frame, its return and a pipe of the runtime's are 400 blocks more for a translator.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let ended = Self::wanted();
        ended.thread_block()?;
        let signals = SignalFd::with_flags(&ended, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let ready = crate::io::watch(signals.as_fd().try_clone_to_owned()?)?;
        let own = reaper.clone();
        tokio::spawn(async move {
            while let Ok(mut guard) = ready.readable().await {
                // one stands for all that end meanwhile (signal(7)), so it is taken before they are
                while signals.read_signal().is_ok_and(|signal| signal.is_some()) {}
                guard.clear_ready();
                own.reap();
            }
        });
        Ok(reaper)
    }

    /// What tells of an end.
    fn wanted() -> SigSet {
        SigSet::from_iter([Signal::SIGCHLD])
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
    use std::time::Duration;

    use nix::sys::signal::SigmaskHow;

    use super::{Reaper, exit_code};

    /// It reaps all children of its process, those of other tests too: only its own copy of this program may do that.
    #[test]
    #[expect(clippy::zombie_processes, reason = "the reaper waits for them")]
    fn every_end_is_told() {
        const OWN: &str = "REAPER_TEST_PROCESS";
        if std::env::var_os(OWN).is_none() {
            let own = std::env::current_exe().expect("a program");
            let test = ["--exact", "reaper::tests::every_end_is_told", "--test-threads=1"];
            // the agent has one thread; a test program has two, and a signal of the process's that the other one may take
            // is discarded. A mask is inherited by a program and by all of its threads, so that none of them may.
            let mask = Reaper::wanted().thread_swap_mask(SigmaskHow::SIG_BLOCK).expect("masked");
            let done = Command::new(own).args(test).env(OWN, "1").output();
            mask.thread_set_mask().expect("as before");
            let done = done.expect("ran");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let reaper = Reaper::start().expect("started");
            let script = |code: u8| format!("exit {code}");
            let begin = |code| {
                let child = Command::new("/bin/sh").args(["-c", &script(code)]).spawn().expect("ran");
                (code, reaper.follow(i32::try_from(child.id()).expect("small")))
            };
            for (code, mut end) in (1..=20).map(begin).collect::<Vec<_>>() {
                let seen = tokio::time::timeout(Duration::from_secs(10), end.wait_for(Option::is_some)).await;
                assert_eq!(seen.expect("in time").expect("told").expect("a code"), i32::from(code));
            }
        });
    }

    #[test]
    fn ends_by_code_signal_and_real_time_signal() {
        for (script, code) in [("exit 7", 7), ("kill -TERM $$", 143), ("kill -40 $$", 168)] {
            let status = Command::new("/bin/sh").args(["-c", script]).status().expect("ran");
            assert_eq!(exit_code(status.into_raw()), code, "{script}");
        }
    }
}
