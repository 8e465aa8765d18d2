//! A log program (`binary://`), in containerd's way: it reads a process's outputs as descriptors 3 and 4, closes 5 when it
//! is ready, and ends when both outputs have ended.
//!
//! It is not killed with the shim: what was written before that is still in its pipes. They end with the shim, and by
//! that it does; the journal ends one that does not.
#![allow(unsafe_code, reason = "descriptors under the numbers that the program expects")]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::destination::Program;
use crate::Error;
use crate::cleanup::{Journal, Step};

/// The first of its three descriptors.
const FIRST: RawFd = 3;
/// Until it is ready.
const READY: Duration = Duration::from_secs(20);
/// For what is still in its pipes when its outputs have ended; one that stalled before that has nothing of it.
const DRAIN: Duration = Duration::from_secs(10);
/// After a TERM. Both together are what runc's shim gives.
const TERM: Duration = Duration::from_secs(2);

/// What log programs are told, and where they are written down.
#[derive(Debug, Clone)]
pub(crate) struct Logging {
    pub(crate) namespace: String,
    pub(crate) journal: Journal,
}

/// One that runs. Dropping it lets it end by itself, within limits.
#[derive(Debug)]
pub(super) struct Logger {
    end: oneshot::Sender<Duration>,
    ended: watch::Receiver<bool>,
}

impl Logger {
    /// Starts it for the process `id` (a container's, or an exec's own) and waits until it is ready. The shim's ends of its
    /// pipes come with it, stdout's first.
    pub(super) async fn start(
        program: &Program,
        id: &str,
        of: &Logging,
    ) -> Result<(Self, pipe::Sender, pipe::Sender), Error> {
        let name = format!("starting the log program {}", program.path.display());
        let what = || name.clone();
        let new = || pipe2(OFlag::O_CLOEXEC).map_err(Error::host(what()));
        let ((out_theirs, out), (err_theirs, err), (ready, ready_theirs)) = (new()?, new()?, new()?);
        let child = spawn(program, id, of, [&out_theirs, &err_theirs, &ready_theirs]).map_err(Error::host(what()))?;
        drop((out_theirs, err_theirs, ready_theirs));
        let step = Step::logger(child.id().unwrap_or_default());
        let written = of.journal.push(step.clone()).map_err(Error::host("writing the undo journal"));
        let (end, asked) = oneshot::channel();
        let (ended_to, ended) = watch::channel(false);
        let journal = of.journal.clone();
        tokio::spawn(async move {
            see_off(child, &name, asked).await;
            // it is gone, so there is nothing to be undone, only to be struck out
            let struck = tokio::task::spawn_blocking(move || journal.take_back(&step)).await;
            if let Ok(Err(error)) = struck {
                tracing::warn!(%error, "the undo journal");
            }
            ended_to.send_replace(true);
        });
        let logger = Self { end, ended };
        written?;
        let sender = |fd| pipe::Sender::from_owned_fd(fd).map_err(Error::host(program.path.display().to_string()));
        let (out, err) = (sender(out)?, sender(err)?);
        let mut ready =
            pipe::Receiver::from_owned_fd(ready).map_err(Error::host(program.path.display().to_string()))?;
        // a byte or the end: by its death, too, of which the log tells
        if timeout(READY, ready.read(&mut [0])).await.is_err() {
            drop((out, err));
            logger.end(false).await;
            return Err(Error::WrongState(format!(
                "log program {} did not report within {READY:?} that it is ready: it must close its descriptor 5",
                program.path.display()
            )));
        }
        Ok((logger, out, err))
    }

    /// After its pipes have been closed: until it has ended. One that did not read is not waited for.
    pub(super) async fn end(self, was_reading: bool) {
        let Self { end, mut ended } = self;
        let _ = end.send(if was_reading { DRAIN } else { Duration::ZERO });
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

fn spawn(program: &Program, id: &str, of: &Logging, fds: [&OwnedFd; 3]) -> std::io::Result<Child> {
    let past = FIRST + 3;
    let high = |fd: &OwnedFd| -> std::io::Result<OwnedFd> {
        let fd = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(past))?;
        // SAFETY: it was just made and belongs to nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // out of the way of the numbers that they get
    let fds = [high(fds[0])?, high(fds[1])?, high(fds[2])?];
    // and the numbers taken, so that none is the pipe by which a failed execution is told
    let mut taken = Vec::new();
    loop {
        let fd = fds[0].as_fd().try_clone_to_owned()?;
        if fd.as_raw_fd() >= past {
            break;
        }
        taken.push(fd);
    }
    let from = [fds[0].as_raw_fd(), fds[1].as_raw_fd(), fds[2].as_raw_fd()];
    let mut command = Command::new(&program.path);
    command
        .args(&program.args)
        .env_clear()
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", &of.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: dup2 is async-signal-safe; the descriptors are open until the spawn returns.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in from.iter().zip(FIRST..) {
                if libc::dup2(*from, to) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.spawn()
}

/// Until it is gone, within limits from the moment on when its outputs have ended.
async fn see_off(mut child: Child, name: &str, asked: oneshot::Receiver<Duration>) {
    let grace = tokio::select! {
        biased;
        // a drop counts as the usual end
        grace = asked => grace.unwrap_or(DRAIN),
        status = child.wait() => {
            let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
            tracing::warn!("{name} exited before its container's output ended ({status}): further output is lost");
            return;
        }
    };
    if timeout(grace, child.wait()).await.is_ok() {
        return;
    }
    tracing::warn!("{name} did not exit by itself: killing it");
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // it is not reaped yet, so the number is still its own
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if timeout(TERM, child.wait()).await.is_err() {
        let _ = child.start_kill();
        let _ = timeout(TERM, child.wait()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use tokio::io::AsyncWriteExt;

    use crate::cleanup::RunDir;

    fn script(folder: &Path, text: &str) -> Program {
        let path = folder.join("logger");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        Program { path, args: vec!["log".into(), folder.join("log").display().to_string()] }
    }

    fn run_dir(folder: &Path) -> RunDir {
        RunDir::create(&folder.join("run"), Path::new("/bundle")).expect("made")
    }

    fn logging(run: &RunDir) -> Logging {
        Logging { namespace: "ns".into(), journal: run.journal() }
    }

    fn steps(run: &RunDir) -> String {
        fs::read_to_string(run.path().join("journal")).expect("a journal")
    }

    #[tokio::test]
    async fn it_gets_everything_and_ends() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = run_dir(folder.path());
        let text = "exec >$2; echo $1 $CONTAINER_ID $CONTAINER_NAMESPACE ${HOME-none}; exec 5>&-; cat <&3; cat <&4";
        let program = script(folder.path(), text);
        let (logger, mut out, mut err) = Logger::start(&program, "c1", &logging(&run)).await.expect("started");
        assert!(steps(&run).contains("Logger"), "{}", steps(&run));
        out.write_all(b"one\n").await.expect("written");
        err.write_all(b"two\n").await.expect("written");
        drop((out, err));
        logger.end(true).await;
        let log = fs::read_to_string(folder.path().join("log")).expect("a log");
        assert_eq!(log, "log c1 ns none\none\ntwo\n");
        assert_eq!(steps(&run), "");
    }

    /// One that dies, one that never gets ready, one that does not end: nobody waits for ever.
    #[tokio::test]
    async fn a_bad_one_is_ended() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = run_dir(folder.path());
        let of = logging(&run);
        let died = script(folder.path(), "exit 3");
        let (logger, mut out, _err) = Logger::start(&died, "c1", &of).await.expect("started");
        logger.end(true).await;
        let failed = out.write_all(b"x").await.expect_err("nobody reads");
        assert_eq!(failed.kind(), std::io::ErrorKind::BrokenPipe);
        let stalls = script(folder.path(), "trap '' TERM; exec 5>&-; read x <&5; while :; do sleep 1000; done");
        let (logger, ..) = Logger::start(&stalls, "c1", &of).await.expect("started");
        logger.end(false).await;
        assert_eq!(steps(&run), "");
        let missing = Program { path: "/does/not/exist".into(), args: Vec::new() };
        let said = Logger::start(&missing, "c1", &of).await.expect_err("no program").to_string();
        assert!(said.contains("log program /does/not/exist: No such file"), "{said}");
    }

    /// What the shim leaves when it is killed: the program has what is in its pipes, then it is ended.
    #[tokio::test]
    async fn the_journal_lets_it_drain() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = run_dir(folder.path());
        let program = script(folder.path(), "exec >$2 5>&-; cat <&3; cat <&4; sleep 0.1; echo end");
        let (logger, mut out, err) = Logger::start(&program, "c1", &logging(&run)).await.expect("started");
        out.write_all(b"last words\n").await.expect("written");
        drop((out, err));
        tokio::task::spawn_blocking(move || run.undo()).await.expect("ran").expect("undone");
        let log = fs::read_to_string(folder.path().join("log")).expect("a log");
        assert_eq!(log, "last words\nend\n");
        logger.end(true).await;
    }
}
