//! A file system whose server has stopped: it is mounted and answers nothing, as a hard mount of a dead NFS server does.
//!
//! The requests are read and kept, so whoever waits for one cannot be killed (fs/fuse/dev.c): the hardest case there is.

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::OpenOptionsExt as _,
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

// include/uapi/linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const READDIR: u32 = 28;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const IN_HEADER: usize = 40;
/// The kernel gives a reader of a smaller buffer nothing.
const BUFFER: usize = 1 << 20;

/// How long a request may take to come.
const LIMIT: Duration = Duration::from_secs(60);

/// The mount and its server. Dropping it ends both, and every request with an error.
#[derive(Debug)]
pub struct DeadFs {
    point: PathBuf,
    server: Arc<Server>,
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Server {
    device: File,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_alive: bool,
    waiting: Vec<Request>,
}

#[derive(Debug, Clone, Copy)]
struct Request {
    unique: u64,
    opcode: u32,
}

impl DeadFs {
    /// Mounts one on a new folder.
    pub fn mount(point: &Path) -> Result<Self> {
        fs::create_dir_all(point)?;
        let device = File::options().read(true).write(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/fuse");
        let device = device.context("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("dead"), point, Some("fuse"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))
            .context("mounting a FUSE file system")?;
        let server = Arc::new(Server { device, state: Mutex::default(), changed: Condvar::new() });
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::spawn({
            let server = Arc::clone(&server);
            move || server.serve(&stopped)
        });
        Ok(Self { point: point.to_owned(), server, stop, thread: Some(thread) })
    }

    /// Waits until somebody waits for an answer.
    pub fn wait_for_a_victim(&self) -> Result<()> {
        self.wait_for_another_victim(0)
    }

    /// Waits until more than `before` wait.
    pub fn wait_for_another_victim(&self, before: usize) -> Result<()> {
        let state = self.server.state();
        let waited = self.server.changed.wait_timeout_while(state, LIMIT, |state| state.waiting.len() <= before);
        let (_state, timeout) = waited.map_err(|_| anyhow!("the server's thread has failed"))?;
        ensure!(!timeout.timed_out(), "nobody asked anything of the dead file system within {} s", LIMIT.as_secs());
        Ok(())
    }

    /// From now on it answers, also what was asked before: it is an empty folder.
    pub fn revive(&self) {
        let mut state = self.server.state();
        state.is_alive = true;
        for request in std::mem::take(&mut state.waiting) {
            self.server.answer(request);
        }
    }
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, stopped: &UnixStream) {
        let mut buffer = vec![0; BUFFER];
        loop {
            let wanted = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut both = [wanted(self.device.as_fd()), wanted(stopped.as_fd())];
            let polled = poll(&mut both, PollTimeout::NONE);
            if both[1].any() == Some(true) {
                return;
            }
            if polled.is_err() {
                continue;
            }
            match (&self.device).read(&mut buffer) {
                Ok(count) => self.take(&buffer[..count]),
                Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EAGAIN | nix::libc::EINTR)) => {}
                // taken off
                Err(_) => return,
            }
        }
    }

    fn take(&self, request: &[u8]) {
        let number = |at: usize| request.get(at..at + 4).and_then(|four| four.try_into().ok()).map(u32::from_ne_bytes);
        let unique = request.get(8..16).and_then(|eight| eight.try_into().ok()).map(u64::from_ne_bytes);
        let (Some(opcode), Some(unique)) = (number(4), unique) else { return };
        let asked = Request { unique, opcode };
        match opcode {
            INIT => self.send(unique, 0, &init(number(IN_HEADER + 4).unwrap_or_default())),
            // that has no answer
            FORGET | BATCH_FORGET | INTERRUPT => {}
            _ => {
                let mut state = self.state();
                if state.is_alive {
                    self.answer(asked);
                } else {
                    state.waiting.push(asked);
                    self.changed.notify_all();
                }
            }
        }
    }

    fn answer(&self, Request { unique, opcode }: Request) {
        match opcode {
            GETATTR => self.send(unique, 0, &attributes()),
            STATFS => self.send(unique, 0, &[0; 80]),
            READDIR => self.send(unique, 0, &[]),
            LOOKUP => self.send(unique, -nix::libc::ENOENT, &[]),
            _ => self.send(unique, -nix::libc::ENOSYS, &[]),
        }
    }

    fn send(&self, unique: u64, error: i32, body: &[u8]) {
        let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
        let mut answer = length.to_ne_bytes().to_vec();
        answer.extend(error.to_ne_bytes());
        answer.extend(unique.to_ne_bytes());
        answer.extend(body);
        // one that was interrupted is asked for no more
        let _ = (&self.device).write(&answer);
    }
}

/// `struct fuse_init_out` without any feature.
fn init(minor: u32) -> Vec<u8> {
    const READ_AHEAD: u32 = 1 << 16;
    const WRITE: u32 = 1 << 16;
    let mut body =
        [7, minor.min(31), READ_AHEAD, 0, 0, WRITE].iter().flat_map(|one| one.to_ne_bytes()).collect::<Vec<_>>();
    body.resize(64, 0);
    body
}

/// `struct fuse_attr_out` of a folder, which are not to be kept.
fn attributes() -> Vec<u8> {
    let mut body = vec![0; 16];
    body.extend(1u64.to_ne_bytes());
    body.extend([0; 5 * 8 + 3 * 4]);
    for number in [0o40_755u32, 2, 0, 0, 0, 4096, 0] {
        body.extend(number.to_ne_bytes());
    }
    body
}

impl Drop for DeadFs {
    fn drop(&mut self) {
        let _ = umount2(&self.point, MntFlags::MNT_DETACH);
        let _ = self.stop.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // the last descriptor of the device goes with the server: every request ends then
    }
}
