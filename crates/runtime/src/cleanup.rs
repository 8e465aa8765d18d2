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

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

pub use journal::Journal;

/// Largest journal that is read, bytes.
const JOURNAL_LIMIT: u64 = 1 << 20;

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
    /// Everything that is mounted at or below.
    Mounts(PathBuf),
    /// A folder of mount points: only empty folders and empty files in it are removed, never anybody's data.
    Staging(PathBuf),
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
}

impl Step {
    /// A step for a process that runs now.
    pub fn process(pid: u32) -> Self {
        Self::Process { pid, started: start_time(pid).unwrap_or_default() }
    }

    fn undo(&self) -> io::Result<()> {
        match self {
            Self::Process { pid, started } => kill(*pid, *started),
            Self::Mounts(path) => unmount_tree(path),
            Self::Staging(path) => remove_mount_points(path),
            Self::Redirection { namespace, identity, index, .. } => {
                crate::network::undo::redirection(namespace, *identity, *index)
            }
            Self::MacVtap { namespace, identity, name, below } => {
                crate::network::undo::macvtap(namespace, *identity, name, *below)
            }
            Self::HostDevice { address, driver } => crate::network::undo::host_device(address, driver.as_deref()),
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
        // whose name is in it is known only with the lock
        let lock = File::options().create(true).truncate(false).write(true).open(path.join("owner"))?;
        let mut lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| io::Error::from(errno))?;
        lock.set_len(0)?;
        let pid = std::process::id();
        let owner = Owner { pid, started: start_time(pid).unwrap_or_default(), bundle: bundle.to_owned() };
        lock.write_all(&serde_json::to_vec(&owner)?)?;
        let journal = Journal::open(path.join("journal"))?;
        Ok(Self { path: path.to_owned(), journal, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
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
}

/// Undoes what a dead shim left in `path`; nothing there is success.
///
/// # Errors
/// `ResourceBusy` when a living shim holds the folder; else the first step that failed, after all were tried.
pub fn clean(path: &Path) -> io::Result<()> {
    let lock = match File::options().read(true).open(path.join("owner")) {
        Ok(lock) => Some(lock),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let _lock = match lock.map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock)) {
        Some(Err((_, nix::errno::Errno::EWOULDBLOCK))) => {
            let by = owner(path).map(|owner| format!(" by shim process {}", owner.pid)).unwrap_or_default();
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is in use{by}", path.display())));
        }
        Some(Err((_, errno))) => return Err(errno.into()),
        Some(Ok(lock)) => Some(lock),
        None => None,
    };
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

/// Who holds, or held, the folder.
pub fn owner(path: &Path) -> Option<Owner> {
    serde_json::from_slice(&fs::read(path.join("owner")).ok()?).ok()
}

/// Kills the owner and waits until it is gone, then cleans.
///
/// # Errors
/// As [`clean`].
pub fn evict(path: &Path) -> io::Result<()> {
    if let Some(owner) = owner(path) {
        kill(owner.pid, owner.started)?;
    }
    clean(path)
}

fn run(path: &Path, steps: &[Step]) -> io::Result<()> {
    let mut first = Ok(());
    for step in steps.iter().rev() {
        if let Err(error) = step.undo() {
            tracing::warn!(?step, %error, "undoing");
            first = first.and(Err(error));
        }
    }
    first?;
    // mounts are gone, so what is left is ours: sockets, the journal
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| !kind.is_dir()) {
            fs::remove_file(entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Field 22 of `/proc/<pid>/stat`, in clock ticks since boot (proc_pid_stat(5)).
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name is in parentheses and may hold anything, so count from the last one
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn kill(pid: u32, started: u64) -> io::Result<()> {
    // SAFETY: pidfd_open takes a pid and flags and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) };
    }
    // SAFETY: the call above returned this descriptor, nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
    // now the descriptor names one process for good: is it the one that was written down?
    if start_time(pid) != Some(started) {
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
    let mut poll = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
    // SIGKILL takes as long as the process is in the kernel; 10 s is beyond any healthy device
    if nix::poll::poll(&mut poll, 10_000u16)? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {pid} does not end")));
    }
    Ok(())
}

/// Unmounts everything at or below `path`, the newest first.
pub(crate) fn unmount_tree(path: &Path) -> io::Result<()> {
    for point in mount_points(path)?.into_iter().rev() {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // gone already: propagation may have taken it with another
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Mount points at or below `path`, in the order in which they were mounted (proc_pid_mountinfo(5)).
fn mount_points(path: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(path))
        .collect())
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(code) = code {
            out.push(char::from(code));
            rest = &rest[at + 4..];
        } else {
            out.push('\\');
            rest = &rest[at + 1..];
        }
    }
    out + rest
}

/// Removes empty folders and empty files on one file system; anything else stays and is an error.
pub(crate) fn remove_mount_points(path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    remove_empty(path, &meta, meta.dev())
}

fn remove_empty(path: &Path, meta: &fs::Metadata, device: u64) -> io::Result<()> {
    if meta.dev() != device {
        return Err(io::Error::other(format!("{} is still mounted", path.display())));
    }
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            remove_empty(&entry.path(), &entry.metadata()?, device)?;
        }
        return fs::remove_dir(path);
    }
    if meta.is_file() && meta.len() == 0 {
        return fs::remove_file(path);
    }
    Err(io::Error::other(format!("{} is not a mount point of ours", path.display())))
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

    #[test]
    fn octal_escapes_are_read() {
        assert_eq!(unescape(r"/a\040b\134c\9"), r"/a b\c\9");
    }
}
