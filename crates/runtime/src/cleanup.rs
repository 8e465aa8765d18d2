//! The undo journal: what a sandbox makes on the host is written down before it is made.
//!
//! A failed start, a normal stop and `delete` after the shim was killed run the same list, newest first. Every step can
//! run again and again, and the list goes on past a step that fails.
//!
//! The journal lives in the sandbox's run folder, beside a lock that the living shim holds.
#![allow(unsafe_code, reason = "pidfd_open and pidfd_send_signal have no safe wrapper")]

mod journal;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

mod mountinfo;
mod mounts;

pub use journal::Journal;
pub(crate) use mountinfo::{MountTable, MountedPath};
pub(crate) use mounts::{mount_points, remove_mount_points, unmount_tree};

/// Largest journal that is read, bytes.
const JOURNAL_LIMIT: u64 = 1 << 20;

/// How long a log program may take for what is left in its pipes; containerd waits for a `delete` 5 s.
const LOGGER_LIMIT: Duration = Duration::from_secs(2);

/// After so many milliseconds a killed process that does nothing but wait in the kernel will do nothing else. containerd
/// waits for a `delete` 5 s.
const HANGS_AFTER: u16 = 1000;

/// How long an ended process may stay in its cgroup: the kernel's own time for freeing it, on a machine with no time left.
const CGROUP_LIMIT: Duration = Duration::from_secs(5);

/// One thing on the host, and thereby how it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// A helper process: killed, when it still is the one that was started then.
    Process {
        /// Its id.
        pid: u32,
        /// Field 22 of `/proc/<pid>/stat`, so that a reused id is never hit.
        started: u64,
    },
    /// A log program, whose pipes have ended by now: killed like that, when it does not end by itself.
    Logger {
        /// As in [`Step::Process`].
        pid: u32,
        /// As in [`Step::Process`].
        started: u64,
    },
    /// Everything that is mounted at or below.
    Mounts(PathBuf),
    /// A folder of mount points: only empty folders and empty files in it are removed, never anybody's data.
    Staging(PathBuf),
    /// A cgroup of the host: what is in it is killed, then it is removed.
    Cgroup(PathBuf),
    /// A folder above one, for as long as there are others in it.
    CgroupParent(PathBuf),
    /// An interface of the pod whose traffic goes to the VM.
    Redirection {
        /// The network namespace's file.
        namespace: PathBuf,
        /// Device and inode of that file then.
        identity: (u64, u64),
        /// The interface's name then.
        interface: String,
        /// Its index, which stays when it is renamed.
        index: u32,
    },
    /// A macvtap of ours on top of an interface of the pod.
    MacVtap {
        /// As in [`Step::Redirection`].
        namespace: PathBuf,
        /// As in [`Step::Redirection`].
        identity: (u64, u64),
        /// The macvtap's name.
        name: String,
        /// The index of the interface below it.
        below: u32,
    },
    /// A PCI device of the host that the VM has: goes back to its driver.
    HostDevice {
        /// Where it is, as `0000:3b:02.1`.
        address: String,
        /// The driver that had it; `None` when there was none.
        driver: Option<String>,
    },
    /// The run folder of a VM that was the pool's: its keeper is killed, then what its own journal says is undone.
    Keeper(PathBuf),
}

impl Step {
    /// A step for a process that runs now.
    pub fn process(pid: u32) -> Self {
        Self::Process { pid, started: start_time(pid).unwrap_or_default() }
    }

    /// A step for a log program that runs now.
    pub(crate) fn logger(pid: u32) -> Self {
        Self::Logger { pid, started: start_time(pid).unwrap_or_default() }
    }

    fn undo(&self) -> io::Result<()> {
        match self {
            Self::Process { pid, started } => kill(*pid, *started),
            Self::Logger { pid, started } => end(*pid, *started, LOGGER_LIMIT),
            Self::Mounts(path) => unmount_tree(path),
            Self::Staging(path) => remove_mount_points(path),
            Self::Cgroup(path) => remove_cgroup(path),
            Self::CgroupParent(path) => match fs::remove_dir(path) {
                Err(error)
                    if ![libc::ENOTEMPTY, libc::EBUSY, libc::ENOENT].contains(&error.raw_os_error().unwrap_or(0)) =>
                {
                    Err(error)
                }
                _ => Ok(()),
            },
            Self::Redirection { namespace, identity, index, .. } => {
                crate::host_network::undo::redirection(namespace, *identity, *index)
            }
            Self::MacVtap { namespace, identity, name, below } => {
                crate::host_network::undo::macvtap(namespace, *identity, name, *below)
            }
            Self::HostDevice { address, driver } => crate::host_network::undo::host_device(address, driver.as_deref()),
            Self::Keeper(folder) => evict(folder),
        }
    }
}

/// The run folder of one sandbox. Its parent stays, so that one sandbox's end never meets another's start.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    journal: Journal,
    _lock: Flock<File>,
}

/// The file that says who.
const OWNER: &str = "owner";

/// Who holds a run folder.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Owner {
    /// The shim's process id.
    pub pid: u32,
    /// Its start time, as in [`Step::Process`].
    pub started: u64,
    /// The bundle it was started for.
    pub bundle: PathBuf,
}

impl RunDir {
    /// Makes and locks the folder. What a dead shim left there is cleaned first.
    ///
    /// # Errors
    /// A living shim holds it, or the host refuses.
    pub fn create(path: &Path, bundle: &Path) -> io::Result<Self> {
        if path.exists() {
            clean(path)?;
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let lock = claim(path, bundle)?;
        let journal = Journal::open(path.join("journal"))?;
        Ok(Self { path: path.to_owned(), journal, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name: what tells the sandbox from all others of the host.
    pub(crate) fn name(&self) -> &str {
        self.path.file_name().and_then(std::ffi::OsStr::to_str).unwrap_or_default()
    }

    /// Writes a step down. Call it before the thing is made; for a process, right after it was spawned (until then it
    /// ends with the shim by `PR_SET_PDEATHSIG`).
    ///
    /// # Errors
    /// The journal cannot be written; then the thing must not be made.
    pub fn push(&mut self, step: Step) -> io::Result<()> {
        self.journal.push(step)
    }

    /// For those that make things while the sandbox runs.
    pub(crate) fn journal(&self) -> Journal {
        self.journal.clone()
    }

    /// Undoes everything and removes the folder. Nothing can be written down any more.
    ///
    /// # Errors
    /// The first of what failed; the rest was undone all the same, and another call goes on with what was not.
    pub fn undo(&self) -> io::Result<()> {
        self.journal.undo()?;
        remove(&self.path)
    }

    /// Undoes everything for another start. The folder stays this process's all the time: by that it is found and ended
    /// when the one who asked for the start is gone.
    ///
    /// # Errors
    /// As [`RunDir::undo`].
    pub fn reset(self) -> io::Result<Self> {
        self.journal.undo()?;
        sweep(&self.path, Some(OWNER))?;
        let journal = Journal::open(self.path.join("journal"))?;
        Ok(Self { journal, ..self })
    }
}

/// Writes down and locks whose folder it is, in one step for everybody else: who finds the file knows whom to end.
fn claim(path: &Path, bundle: &Path) -> io::Result<Flock<File>> {
    let pid = std::process::id();
    let owner = Owner { pid, started: start_time(pid).unwrap_or_default(), bundle: bundle.to_owned() };
    let draft = path.join(format!("owner.{pid}"));
    let file = File::create(&draft)?;
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| io::Error::from(errno))?;
    lock.write_all(&serde_json::to_vec(&owner)?)?;
    // not a rename, which would take another's place
    let claimed = fs::hard_link(&draft, path.join(OWNER));
    fs::remove_file(&draft)?;
    claimed.map(|()| lock)
}

/// Undoes what a dead shim left in `path`; nothing there is success.
///
/// # Errors
/// `ResourceBusy` when a living shim holds the folder; else the first step that failed, after all were tried.
pub fn clean(path: &Path) -> io::Result<()> {
    clean_after(path, None)
}

/// `dead` is an owner that was killed.
fn clean_after(path: &Path, dead: Option<&Owner>) -> io::Result<()> {
    let folder = match File::open(path) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // Who cleans has the folder, and is waited for by who cleans after the same dead owner. containerd 1.6 calls `delete`
    // twice at once when it is restarted in a start, and forgets the next container of that name when the second call fails
    // before the first is through.
    let how = if dead.is_some() { FlockArg::LockExclusive } else { FlockArg::LockExclusiveNonblock };
    let folder = Flock::lock(folder, how).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => {
            io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is being cleaned", path.display()))
        }
        other => other.into(),
    })?;
    // meanwhile another one may have cleaned, and a new shim have come: that is not ours
    if fs::metadata(path).ok().map(identity) != Some(identity(folder.metadata()?)) {
        return Ok(());
    }
    let _owner = hold(path, dead)?;
    let steps = match File::open(path.join("journal")) {
        Ok(file) => io::read_to_string(io::Read::take(file, JOURNAL_LIMIT))?
            .lines()
            // a line that was cut off by a crash belongs to a thing that was not made
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect::<Vec<_>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    run(path, &steps)
}

/// The lock of a folder's owner, if there is one. `dead` was killed: it may have the lock for as long as one of its threads
/// waits for a file system that does not answer, and does nothing more.
fn hold(path: &Path, dead: Option<&Owner>) -> io::Result<Option<Flock<File>>> {
    let file = match File::options().read(true).open(path.join(OWNER)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(Some(lock)),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(errno.into()),
    };
    let holder: Option<Owner> = serde_json::from_reader(io::Read::take(&file, JOURNAL_LIMIT)).ok();
    if dead.is_some() && dead == holder.as_ref() {
        return Ok(None);
    }
    let by = holder.map(|owner| format!(" by shim process {}", owner.pid)).unwrap_or_default();
    Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is in use{by}", path.display())))
}

/// What tells two files of the same name apart.
#[allow(clippy::needless_pass_by_value, reason = "the shape that map wants")]
fn identity(meta: fs::Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// Who holds, or held, the folder.
pub fn owner(path: &Path) -> Option<Owner> {
    serde_json::from_slice(&fs::read(path.join(OWNER)).ok()?).ok()
}

/// Kills the owner and waits until it is gone, then cleans.
///
/// # Errors
/// As [`clean`].
pub fn evict(path: &Path) -> io::Result<()> {
    let Some(owner) = owner(path) else { return clean(path) };
    kill(owner.pid, owner.started)?;
    clean_after(path, Some(&owner))
}

fn run(path: &Path, steps: &[Step]) -> io::Result<()> {
    undo_all(steps).map_err(|(error, _)| error)?;
    remove(path)
}

fn remove(path: &Path) -> io::Result<()> {
    sweep(path, None)?;
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The newest first, but those that may have to be waited for at the end; what fails keeps nothing else from being undone.
/// An error is the first, with the steps that are left.
fn undo_all(steps: &[Step]) -> Result<(), (io::Error, Vec<Step>)> {
    let mut first = None;
    let mut left = Vec::new();
    let (loggers, others): (Vec<_>, Vec<_>) = steps.iter().rev().partition(|step| matches!(step, Step::Logger { .. }));
    for step in others.into_iter().chain(loggers) {
        if let Err(error) = step.undo() {
            tracing::warn!(?step, %error, "a cleanup step failed");
            left.push(step.clone());
            first = first.or(Some(error));
        }
    }
    left.reverse();
    first.map_or(Ok(()), |error| Err((error, left)))
}

/// Mounts are gone, so what is left is ours: sockets, the journal.
fn sweep(path: &Path, but: Option<&str>) -> io::Result<()> {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| !kind.is_dir()) && but.is_none_or(|name| entry.file_name() != name) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Field 22 of `/proc/<pid>/stat`, in clock ticks since boot (proc_pid_stat(5)).
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name is in parentheses and may hold anything, so count from the last one
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn kill(pid: u32, started: u64) -> io::Result<()> {
    end(pid, started, Duration::ZERO)
}

/// Waits for its end, then kills it.
fn end(pid: u32, started: u64, grace: Duration) -> io::Result<()> {
    // SAFETY: pidfd_open takes a pid and flags and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        // nobody; somebody who is being taken away, or a thread (EINVAL, ENOENT on kernels from 2025 on)
        let gone = [libc::ESRCH, libc::EINVAL, libc::ENOENT];
        return if gone.contains(&error.raw_os_error().unwrap_or(0)) { Ok(()) } else { Err(error) };
    }
    // SAFETY: the call above returned this descriptor, nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
    // now the descriptor names one process for good: is it the one that was written down?
    if start_time(pid) != Some(started) {
        return Ok(());
    }
    let mut poll = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
    let grace = nix::poll::PollTimeout::try_from(grace).map_err(io::Error::other)?;
    if nix::poll::poll(&mut poll, grace)? != 0 {
        return Ok(());
    }
    // SAFETY: a valid pidfd, a signal number, no siginfo, no flags.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if sent < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) };
    }
    // SIGKILL takes as long as the process is in the kernel; 10 s is beyond any healthy device
    for limit in [HANGS_AFTER, 10_000] {
        if nix::poll::poll(&mut poll, limit)? != 0 {
            return Ok(());
        }
        if hypervisor::pidfd::hangs(pid) {
            tracing::warn!(pid, "a killed process ends when the file system that it waits for answers");
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {pid} does not exit after SIGKILL")))
}

/// The helpers of a helper have no step of their own, so whatever is in it is killed.
fn remove_cgroup(path: &Path) -> io::Result<()> {
    let end = Instant::now() + CGROUP_LIMIT;
    loop {
        for pid in fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines().flat_map(str::parse) {
            if let Some(started) = start_time(pid) {
                kill(pid, started)?;
            }
            // one that was killed and waits for a file system must not keep the pod's cgroup: it does nothing any more
            if hypervisor::pidfd::hangs(pid)
                && let Some(above) = path.parent()
            {
                let _ = fs::write(above.join("cgroup.procs"), pid.to_string());
            }
        }
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                // a process that has ended leaves its cgroup a moment later, of which version 1 tells nobody
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
