//! Signals as something to wait for, together with children: while `make run` has a containerd, a Ctrl-C must lead to
//! its clean-up and not end us. Owns the only unsafe code here: what runs between fork and exec.

#![allow(unsafe_code, reason = "pre_exec, to give children the signals back that we hold")]

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that ask us to end, held back and readable.
pub(crate) struct Signals {
    fd: SignalFd,
    held: SigSet,
}

/// What a wait ended with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// This one of the descriptors can be read.
    Ready(usize),
    /// Someone wants us to end.
    Asked,
    /// The time is over.
    TimedOut,
}

impl Signals {
    /// From here on they do not end the process. To be called before any thread is made.
    pub(crate) fn hold() -> Result<Self> {
        let held = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT]);
        held.thread_block().context("signals cannot be held back")?;
        let fd = SignalFd::with_flags(&held, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("no signalfd")?;
        Ok(Self { fd, held })
    }

    /// Starts a child that has its signals like any other.
    pub(crate) fn spawn(&self, command: &mut Command) -> Result<Child> {
        let held = self.held;
        // SAFETY: between fork and exec only one system call is made, on a set that was copied before.
        unsafe { command.pre_exec(move || held.thread_unblock().map_err(Into::into)) };
        let name = command.get_program().to_string_lossy().into_owned();
        command.spawn().with_context(|| format!("{name} cannot be started: run `make deps`"))
    }

    /// Until one of `fds` can be read, a signal comes, or the time is over. `None`: however long it takes.
    pub(crate) fn wait(&self, fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> Result<Woken> {
        let until = limit.map(|limit| Instant::now() + limit);
        loop {
            if self.fd.read_signal().context("the signalfd cannot be read")?.is_some() {
                return Ok(Woken::Asked);
            }
            match ready(self.fd.as_fd(), fds, until)? {
                Some(0) => {}
                Some(at) => return Ok(Woken::Ready(at - 1)),
                None => return Ok(Woken::TimedOut),
            }
        }
    }
}

/// Until one of them can be read, whatever signals come: for clean-up, which a second Ctrl-C must not cut short.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> Result<bool> {
    Ok(ready(fd, &[], Some(Instant::now() + limit))?.is_some())
}

fn ready(first: BorrowedFd<'_>, others: &[BorrowedFd<'_>], until: Option<Instant>) -> Result<Option<usize>> {
    let mut all: Vec<_> = std::iter::once(&first).chain(others).map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    loop {
        let timeout = match until {
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut all, timeout) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(all.iter().position(|fd| fd.any() == Some(true))),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("poll failed"),
        }
    }
}

/// A descriptor that becomes readable when the process ends.
pub(crate) fn pidfd(child: &Child) -> Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers; the child is ours and not yet waited for, so the number is still its.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, nix::libc::pid_t::try_from(child.id())?, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("no pidfd: Linux 5.3 or newer is needed");
    }
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}
