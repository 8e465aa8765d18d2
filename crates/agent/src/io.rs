//! The agent's ends of a process's streams: pipes or a terminal.
#![allow(unsafe_code, reason = "registering descriptors with the runtime")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use crate::error::Error;
use crate::launcher::Streams;

/// Asked for the buffer of a pipe that is often full, bytes.
const WIDE_PIPE: i32 = 256 << 10;
/// The kernel's default (pipe(7)).
const PIPE: usize = 64 << 10;
/// The input of who has none.
const NULL: &str = "/dev/null";

nix::ioctl_read_bad!(
    /// How much can be read (`FIONREAD` of ioctl_tty(2), which pipes know too).
    waiting,
    libc::FIONREAD,
    libc::c_int
);

/// Makes a descriptor wait for readiness in the runtime.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives, which is what is asked for.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Reads away what a netlink socket tells, until it has no more. What it is does not matter; a lost one is as good as any.
pub(crate) fn drain(events: &OwnedFd) -> io::Result<()> {
    loop {
        match recv(events.as_raw_fd(), &mut [0], MsgFlags::MSG_TRUNC) {
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Makes a file of the kernel's wait for its exceptional condition.
pub(crate) fn watch_changes(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: as above, of a File.
    unsafe { AsyncFd::register_with_interest(file, tokio::io::Interest::PRIORITY) }.map_err(io::Error::from)
}

/// What is there, up to `most`; empty is the end. A buffer is made when it is known for how much, not while nothing comes.
fn read_some(fd: &OwnedFd, most: usize) -> io::Result<Vec<u8>> {
    let mut count = 0;
    // SAFETY: an open descriptor and a number that lives through the call.
    unsafe { waiting(fd.as_raw_fd(), &raw mut count) }?;
    let count = usize::try_from(count).unwrap_or_default();
    // not only a full one: what does not fill its pages fills their number
    if count >= PIPE / 2 {
        widen(fd);
    }
    let mut data = vec![0; count.clamp(1, most)];
    let count = nix::unistd::read(fd, &mut data)?;
    data.truncate(count);
    Ok(data)
}

/// One who has filled a pipe may have more. A refusal leaves it as it is, which works too, and so does what is no pipe.
fn widen(fd: &OwnedFd) {
    if fcntl(fd, FcntlArg::F_GETPIPE_SZ).is_ok_and(|size| size < WIDE_PIPE) {
        let _ = fcntl(fd, FcntlArg::F_SETPIPE_SZ(WIDE_PIPE));
    }
}

/// One open end, read or written by one call at a time.
#[derive(Debug)]
struct End(Mutex<Option<AsyncFd<OwnedFd>>>);

impl End {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(Mutex::new(Some(watch(fd)?))))
    }
}

/// All streams of a process.
#[derive(Debug)]
pub(crate) struct Stdio {
    stdin: Option<End>,
    stdout: End,
    stderr: Option<End>,
    terminal: Option<OwnedFd>,
}

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Stdout,
    Stderr,
}

impl Stdio {
    /// Three pipes and the child's ends of them; without an input two, and `/dev/null`.
    pub(crate) fn pipes(has_stdin: bool) -> Result<(Self, Streams), Error> {
        let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(Error::failed("pipe"));
        let end = |fd| End::new(fd).map_err(Error::failed("pipe"));
        let (stdin_child, stdin) = if has_stdin {
            let (child, ours) = pipe()?;
            (child, Some(end(ours)?))
        } else {
            let null = File::options().read(true).write(true).open(NULL).map_err(Error::failed(NULL))?;
            (null.into(), None)
        };
        let (stdout, stdout_child) = pipe()?;
        let (stderr, stderr_child) = pipe()?;
        let ours = Self { stdin, stdout: end(stdout)?, stderr: Some(end(stderr)?), terminal: None };
        Ok((ours, Streams { stdin: stdin_child, stdout: stdout_child, stderr: stderr_child }))
    }

    /// A terminal: one stream both ways.
    pub(crate) fn terminal(master: OwnedFd) -> Result<Self, Error> {
        let copy = || master.try_clone().map_err(Error::failed("terminal"));
        let end = |fd| End::new(fd).map_err(Error::failed("terminal"));
        Ok(Self { stdin: Some(end(copy()?)?), stdout: end(copy()?)?, stderr: None, terminal: Some(master) })
    }

    /// Waits for output; empty is the end.
    pub(crate) async fn read(&self, which: Output, most: usize) -> Result<Vec<u8>, Error> {
        let end = match which {
            Output::Stdout => &self.stdout,
            Output::Stderr => match &self.stderr {
                Some(end) => end,
                None => return Ok(Vec::new()),
            },
        };
        let mut slot = end.0.lock().await;
        let Some(fd) = slot.as_ref() else { return Ok(Vec::new()) };
        loop {
            let mut ready = fd.readable().await.map_err(Error::failed("output"))?;
            match ready.try_io(|fd| read_some(fd.get_ref(), most)) {
                Ok(Ok(data)) if data.is_empty() => break,
                Ok(Ok(data)) => return Ok(data),
                // a terminal's way to say that nobody has it open any more
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => break,
                Ok(Err(error)) => return Err(Error::Failed(format!("output: {error}"))),
                Err(_) => {}
            }
        }
        *slot = None;
        Ok(Vec::new())
    }

    /// Waits until the process takes it, all or a part.
    pub(crate) async fn write(&self, data: &[u8]) -> Result<usize, Error> {
        let closed = || Error::State("stdin is closed".into());
        let slot = self.stdin.as_ref().ok_or_else(closed)?.0.lock().await;
        let fd = slot.as_ref().ok_or_else(closed)?;
        let mut written = 0;
        while written < data.len() {
            let mut ready = fd.writable().await.map_err(Error::failed("stdin"))?;
            match ready.try_io(|fd| nix::unistd::write(fd.get_ref(), &data[written..]).map_err(io::Error::from)) {
                Ok(Ok(count)) => written += count,
                Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Err(closed()),
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => return Err(closed()),
                Ok(Err(error)) => return Err(Error::Failed(format!("stdin: {error}"))),
                Err(_) => widen(fd.get_ref()),
            }
        }
        Ok(written)
    }

    /// The end of input. On a terminal that is a key, which only a person presses.
    pub(crate) async fn close_stdin(&self) {
        if self.terminal.is_none()
            && let Some(stdin) = &self.stdin
        {
            *stdin.0.lock().await = None;
        }
    }

    /// Every output has been read to its end.
    pub(crate) fn is_drained(&self) -> bool {
        // one that is being read is not at its end
        let ended = |end: &End| end.0.try_lock().is_ok_and(|slot| slot.is_none());
        ended(&self.stdout) && self.stderr.as_ref().is_none_or(ended)
    }

    pub(crate) fn resize(&self, rows: u32, columns: u32) -> Result<(), Error> {
        let terminal = self.terminal.as_ref().ok_or_else(|| Error::State("the process has no terminal".into()))?;
        crate::launcher::set_size(std::os::fd::AsFd::as_fd(terminal), rows, columns)
            .map_err(Error::failed(format!("setting the size of terminal {}", terminal.as_raw_fd())))
    }
}
