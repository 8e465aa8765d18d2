//! A process that runs in a container.
#![allow(unsafe_code, reason = "real-time signals have no safe wrapper")]

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use crate::error::Error;
use crate::io::Stdio;

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) stdio: Stdio,
    exit: watch::Receiver<Option<i32>>,
    /// Somebody was told of its end.
    told: AtomicBool,
}

impl Process {
    pub(crate) fn new(pid: i32, stdio: Stdio, exit: watch::Receiver<Option<i32>>) -> Self {
        Self { pid, stdio, exit, told: AtomicBool::new(false) }
    }

    /// The exit code, now or when it comes.
    pub(crate) async fn wait(&self) -> i32 {
        // the reaper lives as long as the guest
        self.exit.clone().wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(255)
    }

    /// As [`Process::wait`], for the one who asked for the process.
    pub(crate) async fn tell(&self) -> i32 {
        let code = self.wait().await;
        self.told.store(true, Ordering::Relaxed);
        code
    }

    /// Its end was told and its last output fetched: nobody needs it any more.
    pub(crate) fn is_over(&self) -> bool {
        self.told.load(Ordering::Relaxed) && self.stdio.is_drained()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// One that has ended needs no signal.
    pub(crate) fn signal(&self, number: u32) -> Result<(), Error> {
        if self.has_ended() {
            return Ok(());
        }
        let signal = i32::try_from(number).map_err(Error::failed("signal"))?;
        // SAFETY: kill(2) takes numbers; the pid is not reused before the reaper has seen its end, checked above.
        if unsafe { libc::kill(self.pid, signal) } < 0 {
            let error = std::io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::ESRCH) {
                return Err(Error::Failed(format!("signal {number}: {error}")));
            }
        }
        Ok(())
    }
}
