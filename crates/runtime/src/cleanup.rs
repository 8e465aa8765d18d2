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

    /// Undoes everything and removes the folder.
    ///
    /// # Errors
    /// The first of what failed; the rest was undone all the same.
    pub fn undo(self) -> io::Result<()> {
        run(&self.path, &self.journal.close())
    }

    /// Undoes everything for another start. The folder stays this process's all the time: by that it is found and ended
    /// when the one who asked for the start is gone.
    ///
    /// # Errors
    /// As [`RunDir::undo`].
    pub fn reset(self) -> io::Result<Self> {
        undo_all(&self.journal.close())?;
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

fn clean_after(path: &Path, dead: Option<&Owner>) -> io::Result<()> {
    let lock = hold(path, dead)?;
    // between the opening and the lock, another one may have cleaned, and a new shim have come: that is not ours
    if let Some(lock) = &lock
        && fs::metadata(path.join(OWNER)).ok().map(identity) != Some(identity(lock.metadata()?))
    {
        return Ok(());
    }
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

/// The lock of a folder, if there is one. `dead` is an owner that is known to be gone: who holds the lock in its stead
/// is cleaning up after it, and is waited for. containerd 1.6 calls `delete` twice at once when it is restarted in a
/// start, and forgets the next container of that name when the second call fails before the first is through.
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
        return Flock::lock(file, FlockArg::LockExclusive).map(Some).map_err(|(_, errno)| errno.into());
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
    undo_all(steps)?;
    sweep(path, None)?;
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The newest first, but those that may have to be waited for at the end; what fails keeps nothing else from being undone.
fn undo_all(steps: &[Step]) -> io::Result<()> {
    let mut first = Ok(());
    let (loggers, others): (Vec<_>, Vec<_>) = steps.iter().rev().partition(|step| matches!(step, Step::Logger { .. }));
    for step in others.into_iter().chain(loggers) {
        if let Err(error) = step.undo() {
            tracing::warn!(?step, %error, "a cleanup step failed");
            first = first.and(Err(error));
        }
    }
    first
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
    if nix::poll::poll(&mut poll, 10_000u16)? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {pid} does not exit after SIGKILL")));
    }
    Ok(())
}

/// The helpers of a helper have no step of their own, so whatever is in it is killed.
fn remove_cgroup(path: &Path) -> io::Result<()> {
    let end = Instant::now() + CGROUP_LIMIT;
    loop {
        for pid in fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines().flat_map(str::parse) {
            if let Some(started) = start_time(pid) {
                kill(pid, started)?;
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
mod tests {
    use super::*;

    fn run_dir(root: &Path) -> RunDir {
        RunDir::create(&root.join("ns@c1"), Path::new("/bundle")).expect("made")
    }

    #[test]
    fn a_dead_shims_folder_is_cleaned_and_a_living_ones_is_not() {
        let root = tempfile::tempdir().expect("a folder");
        let mut dir = run_dir(root.path());
        let staging = dir.path().join("mounts");
        dir.push(Step::Staging(staging.clone())).expect("written");
        fs::create_dir_all(staging.join("c1/rootfs")).expect("made");
        fs::write(dir.path().join("journal-not"), "x").expect("written");
        let path = dir.path().to_owned();
        let error = clean(&path).expect_err("held");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        assert!(staging.exists());
        drop(dir);
        clean(&path).expect("cleaned");
        assert!(!path.exists() && root.path().exists());
        clean(&path).expect("again");
    }

    /// Two cleaners at once; while the second waits, the first is through and a new shim has taken the place.
    #[test]
    fn the_second_cleaner_waits_and_leaves_a_new_owner_alone() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("ns@c1");
        fs::create_dir(&path).expect("made");
        // no process has such an id
        let dead = Owner { pid: u32::try_from(i32::MAX).expect("fits"), started: 1, bundle: "/bundle".into() };
        fs::write(path.join(OWNER), serde_json::to_vec(&dead).expect("written")).expect("written");
        let first = File::open(path.join(OWNER)).expect("opened");
        let inode = first.metadata().expect("seen").ino();
        let first = Flock::lock(first, FlockArg::LockExclusiveNonblock).expect("locked");
        clean(&path).expect_err("who does not know that the owner is dead is told");
        let second = std::thread::spawn({
            let path = path.clone();
            move || evict(&path)
        });
        // the kernel shows who waits here and nowhere else
        let waits = |line: &str| line.contains("->") && line.contains(&format!(":{inode} "));
        while !fs::read_to_string("/proc/locks").expect("read").lines().any(waits) {
            assert!(!second.is_finished(), "{:?}", second.join());
            std::thread::yield_now();
        }
        fs::remove_dir_all(&path).expect("cleaned");
        let mut new = run_dir(root.path());
        let staging = new.path().join("mounts");
        fs::create_dir(&staging).expect("made");
        new.push(Step::Staging(staging.clone())).expect("written");
        drop(first);
        second.join().expect("joined").expect("nothing left to do");
        assert!(staging.exists(), "the new shim's");
    }

    /// Kernels differ in what they say of a number that is no process any more.
    #[test]
    fn a_process_that_is_gone_is_no_error() {
        let mut child = std::process::Command::new("true").spawn().expect("started");
        let (pid, started) = (child.id(), start_time(child.id()).unwrap_or_default());
        child.wait().expect("ended");
        kill(pid, started).expect("it is gone");
        // the number may be a thread's by now
        let (told, (stop, stopped)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
        let thread = std::thread::spawn(move || {
            let _ = told.0.send(nix::unistd::gettid());
            let _ = stopped.recv();
        });
        let thread_id = told.1.recv().expect("its number");
        kill(thread_id.as_raw() as u32, 1).expect("a thread is not the process that it was");
        drop(stop);
        thread.join().expect("ended");
    }

    #[test]
    fn a_folder_that_is_reset_has_its_owner_all_the_time() {
        let root = tempfile::tempdir().expect("a folder");
        let mut dir = run_dir(root.path());
        let (path, staging) = (dir.path().to_owned(), dir.path().join("mounts"));
        dir.push(Step::Staging(staging.clone())).expect("written");
        fs::create_dir(&staging).expect("made");
        fs::write(path.join("socket"), "").expect("made");
        let held = (owner(&path), identity(fs::metadata(path.join(OWNER)).expect("there")));
        let mut dir = dir.reset().expect("undone");
        assert_eq!((owner(&path), identity(fs::metadata(path.join(OWNER)).expect("there"))), held);
        assert_eq!(held.0.expect("an owner").pid, std::process::id());
        assert_eq!(clean(&path).expect_err("held").kind(), io::ErrorKind::ResourceBusy);
        assert!(!staging.exists() && !path.join("socket").exists());
        dir.push(Step::Staging(staging)).expect("written again");
        dir.undo().expect("undone");
        assert!(!path.exists());
    }

    #[test]
    fn data_below_staging_is_never_removed() {
        let root = tempfile::tempdir().expect("a folder");
        let mut dir = run_dir(root.path());
        let staging = dir.path().join("mounts");
        dir.push(Step::Staging(staging.clone())).expect("written");
        fs::create_dir_all(staging.join("c1")).expect("made");
        fs::write(staging.join("c1/data"), "precious").expect("written");
        dir.undo().expect_err("refused");
        assert_eq!(fs::read(staging.join("c1/data")).expect("still there"), b"precious");
    }

    #[test]
    fn processes_are_killed_unless_the_id_was_reused() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().expect("spawned");
        let pid = child.id();
        kill(pid, start_time(pid).expect("runs") + 1).expect("passed over");
        assert!(child.try_wait().expect("waited").is_none(), "another process's start time");
        let step = Step::process(pid);
        let killer = std::thread::spawn(move || step.undo());
        child.wait().expect("waited");
        killer.join().expect("joined").expect("killed");
        Step::process(pid).undo().expect("again");
    }

    #[test]
    fn a_cut_line_is_passed_over() {
        let root = tempfile::tempdir().expect("a folder");
        let mut dir = run_dir(root.path());
        let staging = dir.path().join("mounts");
        dir.push(Step::Staging(staging.clone())).expect("written");
        fs::create_dir_all(&staging).expect("made");
        let mut file = File::options().append(true).open(dir.path().join("journal")).expect("opened");
        file.write_all(b"{\"Mounts\": \"/et").expect("written");
        let path = dir.path().to_owned();
        drop(dir);
        clean(&path).expect("cleaned");
        assert!(!path.exists());
    }
}
