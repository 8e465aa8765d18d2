//! A process by a descriptor: it names one process for good, also for those that are not its parent (pidfd_open(2)).
#![allow(unsafe_code, reason = "pidfd_open and pidfd_send_signal have no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Opens one; of a child of ours, that nobody has reaped.
///
/// # Errors
/// There is no such process, or no descriptor is free.
pub fn open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes a pid and flags and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above returned this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
}

/// Kills it; one that has ended needs nothing.
///
/// # Errors
/// We may not.
pub fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a valid pidfd, a signal number, no siginfo, no flags.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), libc::SIGKILL, no_info, 0) };
    if sent < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) };
    }
    Ok(())
}

/// Whether a process that was killed does nothing but wait in the kernel: for a file system, most likely, that does not
/// answer. It ends with that, and does nothing more.
pub fn hangs(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let states = threads.filter_map(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
        // the name is in parentheses and may hold anything (proc_pid_stat(5))
        stat.rsplit_once(')')?.1.trim_start().chars().next()
    });
    let states: Vec<char> = states.collect();
    states.contains(&'D') && states.iter().all(|state| ['D', 'X', 'Z'].contains(state))
}
