//! A network namespace, and work done inside it.
//!
//! A socket stays in the namespace in which it was opened (network_namespaces(7)). So work gets a thread of its own that
//! enters the namespace and ends with the work; no other thread ever leaves the host's.

use std::fs::{self, File};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::Handle;
use tokio::sync::oneshot;

use super::ANCHOR;
use crate::Error;

/// An open namespace.
#[derive(Debug)]
pub(crate) struct NetworkNamespace {
    path: PathBuf,
    file: File,
}

type Answer<T> = oneshot::Receiver<Result<T, Error>>;

/// Tells a namespace from every other of this boot: device and inode of its file.
pub(crate) type Identity = (u64, u64);

impl NetworkNamespace {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: File::open(path)? })
    }

    /// A new one, for a pod whose specification names none. It goes with the last process in it and the last descriptor
    /// of it, so a crash of the shim leaves nothing. Its path is good for as long as this lives.
    pub(crate) async fn make() -> io::Result<Self> {
        let made = tokio::task::spawn_blocking(|| {
            // not on a thread that goes on: the namespace is left with the thread
            let thread = std::thread::Builder::new().name("netns".into()).spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                File::open("/proc/thread-self/ns/net")
            })?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")))
        });
        let file = made.await.unwrap_or_else(|lost| Err(io::Error::other(lost)))?;
        Ok(Self { path: format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into(), file })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn identity(&self) -> io::Result<Identity> {
        self.file.metadata().map(|meta| (meta.dev(), meta.ino()))
    }

    /// Another handle on it.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { path: self.path.clone(), file: self.file.try_clone()? })
    }

    /// Refuses one that a process is in: its traffic would go to the VM. One that is empty carries none; another container's
    /// is refused all the same, since the two would not hear each other.
    pub(crate) fn must_be_unused(&self, is_empty: bool) -> Result<(), Error> {
        let place = self.path.display();
        let user = self.user().map_err(Error::host(format!("network namespace {place}")))?;
        let Some(pid) = user else { return Ok(()) };
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_anchor = command.split(|byte| *byte == 0).next() == Some(ANCHOR.as_bytes());
        if is_empty && !is_anchor {
            return Ok(());
        }
        let why = if is_anchor {
            format!(
                "another sandbox uses network namespace {place} (anchor process {pid}): two VMs cannot share a network namespace, so put the containers into one pod"
            )
        } else {
            format!(
                "process {pid} uses network namespace {place}, and its traffic would go to the VM: give the pod its own network namespace (no --network container:)"
            )
        };
        Err(Error::WrongState(why))
    }

    /// A process in it, if there is one.
    fn user(&self) -> io::Result<Option<u32>> {
        let own = self.identity()?;
        let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let inside = |pid: &u32| {
            // a process that has just gone is nobody
            fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|meta| (meta.dev(), meta.ino()) == own)
        };
        Ok(pids.into_iter().find(inside))
    }

    /// The namespace of this process.
    pub(crate) fn is_our_own(&self) -> io::Result<bool> {
        let meta = fs::metadata("/proc/self/ns/net")?;
        Ok(self.identity()? == (meta.dev(), meta.ino()))
    }

    /// Runs `work` inside, with a netlink connection of its own.
    pub(crate) async fn within<T, W, F>(&self, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: FnOnce(Handle) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>>,
    {
        let (_, answer) = self.spawn(work)?;
        answer.await.unwrap_or_else(|_| Err(lost()))
    }

    /// As [`NetworkNamespace::within`], for callers that may block.
    pub(crate) fn within_blocking<T, W, F>(&self, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: FnOnce(Handle) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>>,
    {
        let (thread, mut answer) = self.spawn(work)?;
        // not the channel's own blocking wait, which a thread of the async runtime must not use
        let _ = thread.join();
        answer.try_recv().unwrap_or_else(|_| Err(lost()))
    }

    /// Runs `work` inside; it gets the namespace's file.
    pub(crate) async fn within_plainly<T: Send + 'static>(
        &self,
        work: impl FnOnce(&File) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let own = self.file.try_clone().map_err(Error::host(self.path.display().to_string()))?;
        self.within(|_| async move { Ok(work(&own)) }).await
    }

    fn spawn<T, W, F>(&self, work: W) -> Result<(JoinHandle<()>, Answer<T>), Error>
    where
        T: Send + 'static,
        W: FnOnce(Handle) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>>,
    {
        let what = format!("network namespace {}", self.path.display());
        let file = self.file.try_clone().map_err(Error::host(&what))?;
        let (to, from) = oneshot::channel();
        let entered = what.clone();
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                let outcome = setns(file, CloneFlags::CLONE_NEWNET)
                    .map_err(io::Error::from)
                    .and_then(|()| tokio::runtime::Builder::new_current_thread().enable_all().build())
                    .map_err(Error::host(entered))
                    .and_then(|runtime| {
                        runtime.block_on(async {
                            let (connection, handle, _) =
                                rtnetlink::new_connection().map_err(Error::host("netlink socket"))?;
                            tokio::spawn(connection);
                            work(handle).await
                        })
                    });
                let _ = to.send(outcome);
            })
            .map_err(Error::host(what))?;
        Ok((thread, from))
    }
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn lost() -> Error {
    Error::host("working in the network namespace")(io::Error::other("its thread panicked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Undoing is done on whatever thread finds the leftovers, also one of the runtime.
    #[tokio::test]
    async fn blocking_work_is_possible_anywhere() {
        let own = NetworkNamespace::open(Path::new("/proc/self/ns/net")).expect("opened");
        assert!(own.is_our_own().expect("told"));
        let enter = own.within_blocking(|_| async { Ok(7) });
        // entering needs root; what counts is that there is an answer
        assert!(matches!(enter, Ok(7) | Err(Error::Host { .. })), "{enter:?}");
    }
}
