//! Makes an anchor's process: a child in namespaces of its own that becomes the program at once.
//!
//! Not by `std::process::Command`: the process must be the first of a PID namespace, and the shim, which makes it, must not
//! begin to make its other children there.
#![allow(unsafe_code, reason = "clone, and what comes between it and exec")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::fcntl::{FcntlArg, fcntl};

/// Where the program finds its socket to the shim.
pub(super) const SOCKET: RawFd = 3;

/// What the process does not share with the host. Its network namespace is the pod's.
const OWN: libc::c_int =
    libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;

/// Starts `program` with `args` and an empty environment in the network namespace `network`, with `socket` as [`SOCKET`].
/// It dies with the calling thread. Returns its process id and descriptor; the caller reaps it.
pub(super) fn spawn(
    program: &CStr,
    args: &[CString],
    network: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
) -> io::Result<(u32, OwnedFd)> {
    let pointers: Vec<*const libc::c_char> =
        args.iter().map(|arg| arg.as_ptr()).chain(std::iter::once(ptr::null())).collect();
    let environment = [ptr::null()];
    // out of the way of the number that it gets
    let socket = fcntl(socket, FcntlArg::F_DUPFD_CLOEXEC(SOCKET + 1))?;
    // SAFETY: the call above returned a new descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut process: libc::c_int = -1;
    let flags = OWN | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is a fork; the kernel writes the descriptor to `process`, which lives until then. The
    // arguments after it are unused, whatever their order on this architecture.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut process, 0, 0) };
    if pid < 0 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::EINVAL | libc::ENOSPC) => io::Error::other(format!(
                "cannot create its namespaces (pid, mount, ipc, uts, cgroup): {error}: check the kernel's CONFIG_*_NS options and /proc/sys/user/max_*_namespaces"
            )),
            _ => error,
        });
    }
    if pid == 0 {
        // SAFETY: the child has one thread and a copy of everything that is pointed to; it makes system calls only.
        unsafe {
            become_program(
                program.as_ptr(),
                pointers.as_ptr(),
                environment.as_ptr(),
                network.as_raw_fd(),
                socket.as_raw_fd(),
            )
        }
    }
    // SAFETY: CLONE_PIDFD has put a new descriptor there.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    Ok((u32::try_from(pid).map_err(io::Error::other)?, process))
}

/// The child. An error is the child's end: its socket is closed then, which the shim sees.
///
/// # Safety
/// The pointers are arrays of strings as execve(2) wants them; the caller is a process of one thread that may lose control.
unsafe fn become_program(
    program: *const libc::c_char,
    args: *const *const libc::c_char,
    environment: *const *const libc::c_char,
    network: RawFd,
    socket: RawFd,
) -> ! {
    // SAFETY: system calls with open descriptors and the caller's pointers; the signal set is filled before it is used.
    unsafe {
        let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
        // a shim that has died before this line has closed the socket
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0
            && libc::setns(network, libc::CLONE_NEWNET) == 0
            && libc::dup2(socket, SOCKET) == SOCKET
        {
            // all others are closed by exec; this is for what a library might have left open
            libc::syscall(libc::SYS_close_range, SOCKET + 1, u32::MAX, 0);
            libc::execve(program, args, environment);
        }
        libc::_exit(127)
    }
}
