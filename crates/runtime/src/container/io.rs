//! A process's streams: from the guest to containerd's named pipes and back, a chunk at a time, so that a slow reader
//! slows the writer and nothing is held in between. Output ends at the guest's end of file, never at the exit.
#![allow(unsafe_code, reason = "asking a pipe how full it is")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_api::agent::{CloseStdinRequest, ReadStreamRequest, WriteStreamRequest};
use agent_api::limits::STREAM_CHUNK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use super::output::{Deletion, Output, QUIET};
use super::{Process, Stdio};
use crate::Error;
use crate::agent_client::AgentClient;

/// The host's ends of a process's outputs, open.
#[derive(Debug)]
pub(crate) struct Outputs {
    stdout: Option<pipe::Sender>,
    stderr: Option<pipe::Sender>,
}

impl Outputs {
    /// Opens what is named, for reading too, so that a client that goes away and comes back finds its stream, and a
    /// client that is late is waited for (as runc's shim does).
    pub(crate) fn open(stdio: &Stdio) -> Result<Self, Error> {
        let out = |path: &str| match path {
            "" => Ok(None),
            path => pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(Path::new(path))
                .map(Some)
                .map_err(Error::host(format!("named pipe {path}"))),
        };
        Ok(Self { stdout: out(&stdio.stdout)?, stderr: if stdio.terminal { None } else { out(&stdio.stderr)? } })
    }

    /// Copies until both have ended, then says so in `process`.
    pub(crate) fn copy(self, agent: &AgentClient, process: &Arc<Process>) {
        let (agent, process) = (agent.clone(), Arc::clone(process));
        tokio::spawn(async move {
            let copied = async {
                tokio::join!(
                    copy_out(&agent, &process, self.stdout, Stream::Stdout),
                    copy_out(&agent, &process, self.stderr, Stream::Stderr)
                )
            };
            tokio::select! {
                _ = copied => {}
                // a child of a deleted exec may have its output for as long as the container lives
                () = process.output.deletion(Deletion::Done) => {}
            }
            process.output.is_done();
        });
    }
}

/// The host's end of a process's input, open.
#[derive(Debug)]
pub(crate) struct Input(Option<pipe::Receiver>);

impl Input {
    /// Opens it, if it is named.
    pub(crate) fn open(stdio: &Stdio) -> Result<Self, Error> {
        Ok(Self(match stdio.stdin.as_str() {
            "" => None,
            path => Some(
                pipe::OpenOptions::new()
                    .open_receiver(Path::new(path))
                    .map_err(Error::host(format!("named pipe {path}")))?,
            ),
        }))
    }

    /// Copies until it ends, or the process.
    pub(crate) fn copy(self, agent: &AgentClient, process: &Arc<Process>) {
        if let Some(stdin) = self.0 {
            tokio::spawn(copy_in(agent.clone(), Arc::clone(process), stdin));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

async fn copy_out(agent: &AgentClient, process: &Process, to: Option<pipe::Sender>, which: Stream) {
    let mut to = to.map(Outlet::Patient);
    // a terminal has one output; and without a reader the guest's pipe must be emptied all the same
    if which == Stream::Stderr && process.stdio.terminal {
        return;
    }
    let request = ReadStreamRequest {
        container_id: process.name.container.as_str().into(),
        exec_id: process.name.wire_exec(),
        len: STREAM_CHUNK as u32,
        ..Default::default()
    };
    loop {
        let answer = agent
            .call_within("reading output", None, |client, context| async {
                match which {
                    Stream::Stdout => client.read_stdout(context, &request).await,
                    Stream::Stderr => client.read_stderr(context, &request).await,
                }
            })
            .await;
        let data = match answer {
            Ok(answer) if !answer.data.is_empty() => answer.data,
            // the end, or a process that is no more
            _ => break,
        };
        process.output.hold();
        if let Some(outlet) = &mut to
            && let Err(error) = outlet.pass_on(&data, &process.output).await
        {
            tracing::debug!(%error, "output pipe");
            to = None;
        }
        process.output.let_go();
    }
    if let Some(outlet) = to {
        outlet.emptied(&process.output).await;
    }
}

/// The host's end of an output pipe.
enum Outlet {
    /// Open for reading too, so that a reader may come late or again.
    Patient(pipe::Sender),
    /// Not any more: without a reader a write fails.
    Last(pipe::Sender),
}

impl Outlet {
    async fn pass_on(&mut self, mut data: &[u8], output: &Output) -> io::Result<()> {
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
            };
            output.pass(count);
            data = data.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Until the reader has taken everything, if there is one: `ctr` of containerd 1.7 and later closes its end when it
    /// hears of the exit, and what is still in the pipe is lost then.
    async fn emptied(self, output: &Output) {
        let Ok(pipe) = (match self {
            Self::Last(pipe) => Ok(pipe),
            Self::Patient(pipe) => write_only(&pipe),
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

async fn copy_in(agent: AgentClient, process: Arc<Process>, mut from: pipe::Receiver) {
    let mut chunk = vec![0; STREAM_CHUNK / 4];
    loop {
        let count = tokio::select! {
            biased;
            read = from.read(&mut chunk) => read.unwrap_or(0),
            // containerd's CloseIO: what the client wrote before it is in the pipe already
            () = process.close_stdin.notified() => {
                while let Ok(count @ 1..) = from.try_read(&mut chunk) {
                    if write(&agent, &process, &chunk[..count]).await.is_err() {
                        return;
                    }
                }
                0
            }
            _ = process.wait() => return,
        };
        if count == 0 {
            break;
        }
        if write(&agent, &process, &chunk[..count]).await.is_err() {
            // the process closed its end; the client learns of it by its own closed pipe
            return;
        }
    }
    let request = CloseStdinRequest {
        container_id: process.name.container.as_str().into(),
        exec_id: process.name.wire_exec(),
        ..Default::default()
    };
    if let Err(error) =
        agent.call("closing stdin", |client, context| async { client.close_stdin(context, &request).await }).await
    {
        tracing::debug!(%error, "closing stdin");
    }
}

async fn write(agent: &AgentClient, process: &Process, mut data: &[u8]) -> Result<(), Error> {
    while !data.is_empty() {
        let request = WriteStreamRequest {
            container_id: process.name.container.as_str().into(),
            exec_id: process.name.wire_exec(),
            data: data.to_vec(),
            ..Default::default()
        };
        // no deadline: a process may leave its input unread for as long as it likes
        let done = agent
            .call_within("writing stdin", None, |client, context| async { client.write_stdin(context, &request).await })
            .await?;
        // the guest is hostile: it may claim more than there was
        let taken = (done.len as usize).min(data.len());
        if taken == 0 {
            return Err(Error::WrongState("the process takes no input".into()));
        }
        data = &data[taken..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Named pipe, its reader, and what the shim opens.
    fn open(folder: &Path) -> (std::fs::File, pipe::Sender) {
        let path = folder.join("stdout");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let ours = pipe::OpenOptions::new().read_write(true).open_sender(&path).expect("opened");
        (std::fs::File::open(&path).expect("opened"), ours)
    }

    fn run<F: Future>(work: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
    }

    #[test]
    fn a_stream_ends_when_its_reader_has_taken_everything() {
        let folder = tempfile::tempdir().expect("a folder");
        run(async {
            let (mut reader, ours) = open(folder.path());
            let output = Output::default();
            let mut outlet = Outlet::Patient(ours);
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
            let (reader, ours) = open(folder.path());
            drop(reader);
            let output = Output::default();
            let mut outlet = Outlet::Patient(ours);
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
}
