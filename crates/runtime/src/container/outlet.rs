//! The host's end of an output: a named pipe, a file, or a log program's pipe.
#![allow(unsafe_code, reason = "asking a pipe how full it is")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::fs;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::time::Instant;

use super::output::{Deletion, Output, QUIET};
use crate::Error;

/// One that is open.
#[derive(Debug)]
pub(super) enum Outlet {
    /// Open for reading too, so that a reader may come late or again.
    Patient(pipe::Sender),
    /// Not any more, or a pipe whose reader was there from the beginning: without a reader a write fails.
    Last(pipe::Sender),
    /// Written at its end.
    File(fs::File),
}

impl Outlet {
    /// Opens what is there: a named pipe for reading too, so that a client that goes away and comes back finds its stream,
    /// and a client that is late is waited for (as runc's shim does).
    pub(super) async fn open(path: &Path) -> Result<Self, Error> {
        let what = || format!("output {}", path.display());
        if fs::metadata(path).await.map_err(Error::host(what()))?.file_type().is_fifo() {
            let pipe = pipe::OpenOptions::new().read_write(true).open_sender(path);
            return pipe.map(Self::Patient).map_err(Error::host(what()));
        }
        options().open(path).await.map(Self::File).map_err(Error::host(what()))
    }

    /// Opens a file, made where there is none, as containerd's shim makes it.
    pub(super) async fn make(path: &Path) -> Result<Self, Error> {
        let what = || format!("opening log file {}", path.display());
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(folder).await.map_err(Error::host(what()))?;
        }
        let file = options().create(true).mode(0o644).open(path).await.map_err(Error::host(what()))?;
        Ok(Self::File(file))
    }

    pub(super) async fn pass_on(&mut self, mut data: &[u8], output: &Output) -> io::Result<()> {
        while !data.is_empty() {
            let count = match self {
                Self::Last(pipe) => pipe.write(data).await?,
                Self::Patient(pipe) => tokio::select! {
                    biased;
                    count = pipe.write(data) => count?,
                    () = output.deletion(Deletion::Asked) => {
                        *self = Self::Last(write_only(pipe)?);
                        continue;
                    }
                },
                Self::File(file) => {
                    file.write_all(data).await?;
                    // until then it is only promised
                    file.flush().await?;
                    data.len()
                }
            };
            output.pass(count);
            data = data.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Until the reader has taken everything, if there is one: `ctr` of containerd 1.7 and later closes its end when it
    /// hears of the exit, and what is still in the pipe is lost then.
    pub(super) async fn emptied(self, output: &Output) {
        let Ok(pipe) = (match self {
            Self::Last(pipe) => Ok(pipe),
            Self::Patient(pipe) => write_only(&pipe),
            Self::File(_) => return,
        }) else {
            return;
        };
        let emptied = async {
            let (mut left, mut moved) = (unread(&pipe), Instant::now());
            while left > 0 && has_reader(&pipe) && moved.elapsed() < QUIET {
                // the kernel tells a writer that there is room, not that nothing is left
                tokio::time::sleep(Duration::from_millis(1)).await;
                let now = unread(&pipe);
                if now < left {
                    output.pass(left - now);
                    moved = Instant::now();
                }
                left = now;
            }
        };
        tokio::select! {
            () = emptied => {}
            // what is in the pipe stays there for its reader
            () = output.deletion(Deletion::Asked) => {}
        }
    }
}

/// At the end of what is there. A named pipe without a reader is refused instead of waited for.
fn options() -> fs::OpenOptions {
    let mut options = fs::OpenOptions::new();
    options.append(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

/// The same pipe once more, whatever has become of its name.
fn write_only(pipe: &pipe::Sender) -> io::Result<pipe::Sender> {
    pipe::OpenOptions::new().open_sender(format!("/proc/self/fd/{}", pipe.as_raw_fd()))
}

/// Bytes in the pipe.
fn unread(pipe: &pipe::Sender) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int, and the descriptor is open for as long as `pipe` is borrowed.
    let done = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if done == 0 { usize::try_from(count).unwrap_or_default() } else { 0 }
}

/// Whether anybody has the other end open; `pipe` must not have it itself.
fn has_reader(pipe: &pipe::Sender) -> bool {
    let mut asked = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    poll(&mut asked, PollTimeout::ZERO).is_ok()
        && !asked[0].revents().is_some_and(|told| told.contains(PollFlags::POLLERR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// The reader of a named pipe, and what the shim opens.
    fn open(folder: &Path) -> (std::fs::File, Outlet) {
        let path = folder.join("stdout");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let ours = pipe::OpenOptions::new().read_write(true).open_sender(&path).expect("opened");
        (std::fs::File::open(&path).expect("opened"), Outlet::Patient(ours))
    }

    /// On a clock that goes as fast as it can, and stands while there is something to do: a slow machine changes nothing.
    fn run<F: Future>(work: F) -> F::Output {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().start_paused(true).build().expect("a runtime").block_on(work)
    }

    #[test]
    fn a_stream_ends_when_its_reader_has_taken_everything() {
        let folder = tempfile::tempdir().expect("a folder");
        run(async {
            let (mut reader, mut outlet) = open(folder.path());
            let output = Output::default();
            outlet.pass_on(&[7; 1000], &output).await.expect("written");
            let mut emptied = std::pin::pin!(outlet.emptied(&output));
            let soon = Duration::from_millis(50);
            tokio::time::timeout(soon, &mut emptied).await.expect_err("nothing was read");
            reader.read_exact(&mut [0; 1000]).expect("read");
            tokio::time::timeout(soon, emptied).await.expect("everything was read");
        });
    }

    #[test]
    fn nobody_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        run(async {
            let (reader, mut outlet) = open(folder.path());
            drop(reader);
            let output = Output::default();
            // more than the pipe holds, so that it has to wait: for a reader to come, until the delete
            let plenty = vec![7; 1 << 20];
            let write = outlet.pass_on(&plenty, &output);
            let (written, ()) = tokio::join!(write, async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                output.before_the_delete(async || ()).await;
            });
            assert_eq!(written.expect_err("nobody reads").kind(), io::ErrorKind::BrokenPipe);
            let from = Instant::now();
            outlet.emptied(&output).await;
            assert!(from.elapsed() < QUIET);
        });
    }

    #[test]
    fn a_file_is_made_and_appended_to() {
        let folder = tempfile::tempdir().expect("a folder");
        run(async {
            let (path, output) = (folder.path().join("a/b/log"), Output::default());
            Outlet::open(&path).await.expect_err("a plain path is not made");
            for word in [&b"one\n"[..], b"two\n"] {
                let mut file = Outlet::make(&path).await.expect("opened");
                file.pass_on(word, &output).await.expect("written");
                file.emptied(&output).await;
            }
            let mut again = Outlet::open(&path).await.expect("a file that is there");
            again.pass_on(b"three\n", &output).await.expect("written");
            assert_eq!(std::fs::read_to_string(&path).expect("a log"), "one\ntwo\nthree\n");
            // neither waited for nor made a file
            let pipe = folder.path().join("pipe");
            nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("made");
            Outlet::make(&pipe).await.expect_err("a pipe that nobody reads");
        });
    }
}
