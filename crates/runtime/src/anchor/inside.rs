//! What an anchor does: it leaves the host's root, takes the container's, drops all privilege, and waits for its end.
//!
//! Runs as a process of its own, the first of its PID namespace: the shim's program, called as [`super::NAME`].
#![allow(unsafe_code, reason = "capset and the inherited socket have no safe wrapper")]

use std::ffi::CStr;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, mkdir, pivot_root};

use super::clone::SOCKET;
use crate::storage::tree;

/// Its answer when it stands.
pub(super) const DONE: &[u8] = b"\0";

/// The folder of the empty root where the container's root file system is put before it becomes the root.
const PLACE: &CStr = c"rootfs";

/// Whether this process was called to be an anchor.
pub fn is_wanted() -> bool {
    std::env::args_os().next().is_some_and(|name| name == super::NAME)
}

/// The whole life of one. Returns when it could not begin, or the shim is gone.
pub fn run() {
    // SAFETY: the shim put its socket there for this process alone, and this is called once, first of all.
    let mut socket = unsafe { UnixStream::from_raw_fd(SOCKET) };
    if let Err(error) = stand(&socket) {
        let _ = write!(socket, "{error}");
        return;
    }
    // nothing of the host's is open any more, but the socket by which the shim's end is seen
    for fd in [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        // SAFETY: nothing of this process uses its standard streams from here on.
        unsafe { libc::close(fd) };
    }
    if socket.write_all(DONE).is_err() || socket.shutdown(std::net::Shutdown::Write).is_err() {
        return;
    }
    let mut byte = [0];
    while !matches!(io::Read::read(&mut socket, &mut byte), Ok(0) | Err(_)) {}
}

fn stand(socket: &UnixStream) -> io::Result<()> {
    // `ps -o comm`; the command line is the caller's
    nix::sys::prctl::set_name(c"kata-anchor")?;
    leave_the_host().map_err(named("leaving the host's root file system"))?;
    if let Some(root) = receive(socket)? {
        tree::attach(&root, PLACE)
            .and_then(|()| enter(PLACE))
            .map_err(named("mounting the container's root file system"))?;
    }
    give_up_privilege().map_err(named("dropping capabilities"))
}

fn named(what: &str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// The mounts of this process are a copy of the host's until here: nothing of them may go back, or stay.
fn leave_the_host() -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // any folder that every host has
    let at = "/proc";
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("empty"), at, Some("tmpfs"), plain, Some("size=4k,nr_inodes=2,mode=0755"))?;
    chdir(at)?;
    mkdir(PLACE, Mode::from_bits_truncate(0o755))?;
    mount(none, at, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | plain, none)?;
    enter(c".")
}

/// Makes a mount the root, and nothing of what was the root before stays.
fn enter(new: &CStr) -> io::Result<()> {
    chdir(new)?;
    // the old root goes on top of the new one, from where it is taken off (pivot_root(2))
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    Ok(())
}

/// The shim's word: what the root shall be, a mount that is nowhere yet, or none.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0; 1];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!(RawFd);
    let got = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    if got.bytes == 0 {
        return Err(io::Error::other("the shim has exited"));
    }
    let mut root = None;
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: the kernel has just put this descriptor here, and nobody else knows of it.
            root = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Ok(root)
}

/// Nobody needs this process to be able to do anything.
fn give_up_privilege() -> io::Result<()> {
    /// `struct __user_cap_header_struct` and `__user_cap_data_struct` of linux/capability.h, version 3.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    const VERSION_3: u32 = 0x2008_0522;
    nix::sys::prctl::set_no_new_privs()?;
    let header = Header { version: VERSION_3, pid: 0 };
    let none = [[0u32; 3]; 2];
    // SAFETY: a header of version 3 and the two sets of data that it promises.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
