//! The anchor: a small process a container, whose id is what clients get as the container's process id.
//!
//! containerd's clients and OCI hooks look at `/proc/<pid>/ns/net` and `/proc/<pid>/root` of a task. The container's own
//! processes are in the guest, so this one stands for them on the host: it lives in the pod's network namespace, sees the
//! container's root file system as its root, shows nothing of the host, has no privilege, and does nothing
//! (docs/design/013-anchor.md). It dies with the container, and the container with it when somebody kills it.
//!
//! This file is the shim's handle; `clone` makes the process, and `inside` is what runs in it.
#![allow(unsafe_code, reason = "AsyncFd wants a promise, waitid by descriptor has no safe wrapper for it")]

mod clone;
pub mod inside;

use std::ffi::CString;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as Socket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hypervisor::pidfd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use oci_spec::runtime::Spec;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::Error;
use crate::cleanup::{Journal, Step};

/// The first argument of an anchor's command line: by this the shim's program knows that it is one.
pub const NAME: &str = crate::host_network::ANCHOR;
/// Shown of a container's command line, bytes.
const SHOWN: usize = 1024;
/// For what an anchor does: some dozen system calls.
const LIMIT: Duration = Duration::from_secs(10);
/// After so long a killed one is looked at, whether it can end.
const HANGS_AFTER: Duration = Duration::from_secs(1);
/// Most that it says of a failure, bytes.
const WORDS: u64 = 512;

/// Which program becomes an anchor when it is called with [`NAME`] as its first argument. A test's is no such program.
const PROGRAM: &std::ffi::CStr = if cfg!(test) { c"/bin/sh" } else { c"/proc/self/exe" };

/// A running anchor. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Anchor {
    pid: u32,
    process: Arc<OwnedFd>,
    step: Step,
    journal: Journal,
    /// It ends when this is closed, too.
    socket: UnixStream,
    ended: watch::Receiver<bool>,
    /// We have killed it.
    is_ours: Arc<AtomicBool>,
}

impl Anchor {
    /// Starts one in the network namespace `network` for the container of `spec`, and writes it down in `journal`.
    ///
    /// Its root is an empty folder until [`Anchor::enter`]. Must be called on the shim's main thread, with which it dies.
    ///
    /// # Errors
    /// The host refuses the process or one of its namespaces.
    pub(crate) fn start(spec: &Spec, network: BorrowedFd<'_>, journal: &Journal) -> Result<Self, Error> {
        let failed = |error| Error::host("starting the anchor process of the container")(error);
        let (ours, its) = Socket::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let (pid, process) = clone::spawn(PROGRAM, &arguments(spec), network, its.as_fd()).map_err(failed)?;
        drop(its);
        let process = Arc::new(process);
        let (tell, ended) = watch::channel(false);
        let anchor = Self {
            pid,
            process: Arc::clone(&process),
            step: Step::process(pid),
            journal: journal.clone(),
            socket: UnixStream::from_std(ours).map_err(failed)?,
            ended,
            is_ours: Arc::default(),
        };
        // SAFETY: an OwnedFd in an Arc gives the same open descriptor for as long as it lives, which is what is asked for.
        let watched = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
        let watched = watched.map_err(|error| failed(error.into()))?;
        tokio::spawn(async move {
            let _ = watched.readable().await;
            if let Err(error) = waitid(Id::PIDFd(watched.get_ref().as_fd()), WaitPidFlag::WEXITED) {
                tracing::warn!(%error, "cannot reap the anchor process of a container");
            }
            let _ = tell.send(true);
        });
        journal.push(anchor.step.clone()).map_err(Error::host("writing the undo journal"))?;
        Ok(anchor)
    }

    /// What clients get.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Gives it the root that it keeps: `root`, a detached mount, or the empty folder. It is without privilege from then on,
    /// and may be shown to others.
    ///
    /// # Errors
    /// It could not do so, or has ended.
    pub(crate) async fn enter(&mut self, root: Option<OwnedFd>) -> Result<(), Error> {
        let answer = async {
            self.socket.writable().await?;
            self.socket.try_io(Interest::WRITABLE, || send(self.socket.as_fd(), root.as_ref()))?;
            let mut words = Vec::new();
            // it closes its side when it is done
            (&mut self.socket).take(WORDS).read_to_end(&mut words).await?;
            match words.as_slice() {
                [] => Err(io::Error::other("it has exited")),
                inside::DONE => Ok(()),
                words => Err(io::Error::other(String::from_utf8_lossy(words).into_owned())),
            }
        };
        tokio::time::timeout(LIMIT, answer)
            .await
            .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
            .map_err(Error::host(format!("setting the root of the container's anchor process {}", self.pid)))
    }

    /// Waits until it has ended; whether somebody else ended it. Does not keep it alive.
    pub(crate) fn killed(&self) -> impl Future<Output = bool> + Send + 'static {
        let (mut ended, is_ours) = (self.ended.clone(), Arc::clone(&self.is_ours));
        async move {
            let _ = ended.wait_for(|ended| *ended).await;
            !is_ours.load(Ordering::Relaxed)
        }
    }

    /// Ends it, and waits for that, unless it waits for a file system of the host's that does not answer. Idempotent.
    pub(crate) async fn end(&self) {
        self.kill();
        let mut ended = self.ended.clone();
        while tokio::time::timeout(HANGS_AFTER, ended.wait_for(|ended| *ended)).await.is_err() {
            if pidfd::hangs(self.pid) {
                break;
            }
        }
        let (journal, step) = (self.journal.clone(), self.step.clone());
        let struck = tokio::task::spawn_blocking(move || journal.take_back(&step)).await;
        if let Ok(Err(error)) = struck {
            tracing::warn!(%error, "cannot write the undo journal");
        }
    }

    fn kill(&self) {
        self.is_ours.store(true, Ordering::Relaxed);
        if let Err(error) = pidfd::kill(self.process.as_fd()) {
            tracing::warn!(pid = self.pid, %error, "cannot kill the anchor process of a container");
        }
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One byte, and the root's descriptor where there is one.
fn send(to: BorrowedFd<'_>, root: Option<&OwnedFd>) -> io::Result<()> {
    let root = root.map(AsRawFd::as_raw_fd);
    let control: Vec<_> = root.iter().map(|fd| ControlMessage::ScmRights(std::slice::from_ref(fd))).collect();
    sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(b"r")], &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn arguments(spec: &Spec) -> Vec<CString> {
    if cfg!(test) {
        // reads the shim's word, says that it stands, and waits for the shim's end
        let stand = c"head -c1 <&3 >/dev/null; printf '\\0' >&3; exec sleep 1000 3<&-";
        return [c"kata-anchor", c"-c", stand].map(CString::from).into();
    }
    command_line(spec)
}

/// What `ps`, `docker top` and their like show: the container's own command, behind [`NAME`].
fn command_line(spec: &Spec) -> Vec<CString> {
    let args = spec.process().as_ref().and_then(|process| process.args().as_deref()).unwrap_or_default();
    let mut left = SHOWN;
    let shown = args.iter().map_while(|arg| {
        let bytes = arg.as_bytes();
        let kept = bytes.get(..bytes.len().min(left)).filter(|kept| !kept.is_empty())?;
        left -= kept.len();
        // one with a zero in it is refused elsewhere
        CString::new(kept).ok()
    });
    CString::new(NAME).into_iter().chain(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(args: &[&str]) -> Vec<String> {
        let spec = serde_json::json!({"ociVersion": "1.0.2", "process":
            {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": args}});
        let spec: Spec = serde_json::from_value(spec).expect("a specification");
        command_line(&spec).into_iter().map(|arg| arg.into_string().expect("text")).collect()
    }

    #[test]
    fn shows_the_containers_command_within_bounds() {
        assert_eq!(shown(&["sleep", "9"]), [NAME, "sleep", "9"]);
        assert_eq!(shown(&[]), [NAME]);
        let long = "x".repeat(SHOWN * 2);
        assert_eq!(shown(&["a", &long, "b"]), [NAME, "a", &long[..SHOWN - 1]]);
    }
}
