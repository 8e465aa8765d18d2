//! A process's streams: from the guest to where containerd wants them and back, a chunk at a time, so that a slow reader
//! slows the writer and nothing is held in between. Output ends at the guest's end of file, never at the exit.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use agent_api::agent::{CloseStdinRequest, ReadStreamRequest, WriteStreamRequest};
use agent_api::limits::STREAM_CHUNK;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::destination::{self, Destination};
use super::logger::{Logger, Logging};
use super::outlet::Outlet;
use super::output::Deletion;
use super::{Process, ProcessRef, Stdio};
use crate::Error;
use crate::agent_client::AgentClient;
use crate::host_work::{HostWork, Progress};

/// The host's ends of a process's outputs, open.
#[derive(Debug)]
pub(crate) struct Outputs {
    stdout: Option<Outlet>,
    stderr: Option<Outlet>,
    /// Who gets both.
    logger: Option<Logger>,
}

impl Outputs {
    /// Refuses what cannot be, before anything is made for it.
    pub(crate) fn check(stdio: &Stdio) -> Result<(), Error> {
        destination::of(stdio).map(drop)
    }

    /// What errors call them.
    pub(crate) fn name(stdio: &Stdio) -> String {
        format!("output {} {}", stdio.stdout, stdio.stderr)
    }

    /// Opens what is named, and starts the log program.
    pub(crate) async fn open(stdio: &Stdio, of: &ProcessRef, logging: &Logging) -> Result<Self, Error> {
        let (stdout, stderr) = destination::of(stdio)?;
        if let Destination::Program(program) = stdout {
            // an exec's own id, as containerd's shim has it
            let (logger, out, err) = Logger::start(&program, &of.wire_exec(), logging).await?;
            let (stdout, stderr) = (Some(Outlet::Last(out)), Some(Outlet::Last(err)));
            return Ok(Self { stdout, stderr, logger: Some(logger) });
        }
        let open = async |to| match to {
            Destination::Path(path) => Outlet::open(&path).await.map(Some),
            Destination::File(path) => Outlet::make(&path).await.map(Some),
            Destination::Program(_) | Destination::Nowhere => Ok(None),
        };
        Ok(Self { stdout: open(stdout).await?, stderr: open(stderr).await?, logger: None })
    }

    /// Copies until both have ended, then says so in `process`.
    pub(crate) fn copy(self, agent: &AgentClient, process: &Arc<Process>) {
        let (agent, process) = (agent.clone(), Arc::clone(process));
        process.output.is_open(true);
        tokio::spawn(async move {
            let Self { stdout, stderr, logger } = self;
            let copied = async {
                tokio::join!(
                    copy_out(&agent, &process, stdout, Stream::Stdout),
                    copy_out(&agent, &process, stderr, Stream::Stderr)
                )
            };
            let is_stalled = tokio::select! {
                _ = copied => false,
                // a child of a deleted exec may have its output for as long as the container lives
                () = process.output.deletion(Deletion::Done) => process.output.is_held(),
            };
            process.output.is_done();
            if let Some(logger) = logger {
                logger.end(!is_stalled).await;
            }
            process.output.is_open(false);
        });
    }
}

/// The host's end of a process's input, open.
#[derive(Debug)]
pub(crate) struct Input(Option<pipe::Receiver>);

impl Input {
    /// Opens it, if it is named.
    pub(crate) async fn open(stdio: &Stdio, work: &HostWork) -> Result<Self, Error> {
        if stdio.stdin.is_empty() {
            return Ok(Self(None));
        }
        let (path, what) = (PathBuf::from(&stdio.stdin), format!("named pipe {}", stdio.stdin));
        let open = {
            let what = what.clone();
            move |_: &Progress| {
                File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(Error::host(what))
            }
        };
        let file = work.run(&what, open).await?;
        pipe::Receiver::from_file(file).map(Some).map(Self).map_err(Error::host(what))
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

async fn copy_out(agent: &AgentClient, process: &Process, mut to: Option<Outlet>, which: Stream) {
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
            tracing::warn!(container = %process.name.container, %error, "what comes now of an output is lost");
            to = None;
        }
        process.output.let_go();
    }
    if let Some(outlet) = to {
        outlet.emptied(&process.output).await;
    }
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
            // the process closed its end, which is no reason for its client to die of a pipe that nobody reads
            return throw_away(&process, from, chunk).await;
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

/// Reads on until the client has no more, or the process ends.
async fn throw_away(process: &Process, mut from: pipe::Receiver, mut chunk: Vec<u8>) {
    let ended = async {
        tokio::select! {
            () = process.close_stdin.notified() => {}
            _ = process.wait() => {}
        }
    };
    tokio::select! {
        () = async { while from.read(&mut chunk).await.is_ok_and(|count| count > 0) {} } => {}
        () = ended => {}
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
