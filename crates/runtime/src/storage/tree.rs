//! Copies of the host's mounts for the share. They follow what the host mounts and unmounts, and give nothing back:
//! taking a copy off must never take the host's own off.
//!
//! A bind mount of a shared mount is the same to the kernel as that mount: what is mounted or unmounted below the one is
//! below the other (mount_namespaces(7)). So a copy is made apart from every tree, where nothing is propagated, becomes
//! a slave, and is put in its place only then. That takes Linux 5.12.
//!
//! None is private, though a volume may ask for it: the copies are in the host's own mount namespace, where a mount
//! point that only a copy keeps could not be removed by whoever made it.
#![allow(unsafe_code, reason = "open_tree, mount_setattr and move_mount have no safe wrapper")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::Error;

/// What a copy is to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct How {
    /// With the mounts below.
    pub(crate) recursive: bool,
    pub(crate) read_only: ReadOnly,
}

/// How much of a copy is read-only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) enum ReadOnly {
    /// What is so already.
    #[default]
    AsIs,
    /// The mount, not those below.
    Top,
    /// Everything.
    All,
}

impl How {
    /// From an OCI mount's options.
    pub(crate) fn of(options: &[String]) -> Self {
        let has = |wanted: &[&str]| options.iter().any(|option| wanted.contains(&option.as_str()));
        Self {
            recursive: has(&["rbind"]),
            read_only: match (has(&["rro"]), has(&["ro"])) {
                (true, _) => ReadOnly::All,
                (false, true) => ReadOnly::Top,
                (false, false) => ReadOnly::AsIs,
            },
        }
    }
}

/// On the host nobody is to run or open through a copy what a guest has made: its bits and nodes are for the guest, which
/// keeps them by its own kernel.
const TAME: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// Puts a copy of the folder or file `from` on `to`.
pub(crate) fn copy(from: &Path, to: &Path, how: How) -> Result<(), Error> {
    let made = CString::new(from.as_os_str().as_bytes())
        .map_err(io::Error::from)
        .and_then(|path| open(libc::AT_FDCWD, &path, how.recursive))
        .and_then(|tree| place(&tree, to, how));
    made.map_err(failed(from, to))
}

/// A copy of the folder `from` that is nowhere, for another mount namespace: it does not follow what the host mounts, and goes
/// with its descriptor.
pub(crate) fn detached(from: &Path) -> Result<OwnedFd, Error> {
    let made = CString::new(from.as_os_str().as_bytes()).map_err(io::Error::from).and_then(|path| {
        let tree = open(libc::AT_FDCWD, &path, true)?;
        let all = libc::mount_attr { attr_set: TAME, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
        change(&tree, &all, true)?;
        Ok(tree)
    });
    made.map_err(Error::host(format!("copying the mount {}", from.display())))
}

/// The same for one that is open. `name` is for errors.
pub(crate) fn copy_of(from: BorrowedFd<'_>, name: &Path, to: &Path, how: How) -> Result<(), Error> {
    let made = open(from.as_raw_fd(), c"", how.recursive).and_then(|tree| place(&tree, to, how));
    made.map_err(failed(name, to))
}

fn failed(from: &Path, to: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = format!("bind mount of {} on {}", from.display(), to.display());
    move |error| match error.raw_os_error() {
        Some(libc::ENOSYS) => Error::Unsupported(format!("{what}: needs Linux 5.12 or newer on the host")),
        _ => Error::host(what)(error),
    }
}

fn place(tree: &OwnedFd, to: &Path, how: How) -> io::Result<()> {
    let to = CString::new(to.as_os_str().as_bytes())?;
    let all = libc::mount_attr { attr_set: TAME, attr_clr: 0, propagation: libc::MS_SLAVE, userns_fd: 0 };
    change(tree, &all, true)?;
    if how.read_only != ReadOnly::AsIs {
        let read_only =
            libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
        change(tree, &read_only, how.read_only == ReadOnly::All)?;
    }
    attach(tree, &to)
}

/// A copy that is nowhere. What is not attached goes with the descriptor.
fn open(at: i32, from: &CStr, recursive: bool) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    let flags = if recursive { flags | libc::AT_RECURSIVE as libc::c_uint } else { flags };
    // SAFETY: a descriptor that is open or stands for the working directory, and a path that ends with zero.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, at, from.as_ptr(), flags) })?;
    // SAFETY: the call returned a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn change(tree: &OwnedFd, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = if recursive { libc::AT_EMPTY_PATH | libc::AT_RECURSIVE } else { libc::AT_EMPTY_PATH };
    // SAFETY: an open descriptor, an empty path, and a mount_attr of the size that is given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    check(done).map(drop)
}

/// Puts a tree that is nowhere on `to`.
pub(crate) fn attach(tree: &OwnedFd, to: &CStr) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
    // SAFETY: an open descriptor and paths that end with zero.
    let done = unsafe {
        libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), c"".as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags)
    };
    check(done).map(drop)
}

fn check(result: libc::c_long) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_say_how() {
        let how = |options: &[&str]| How::of(&options.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(how(&["bind"]), How::default());
        let cri = how(&["rbind", "rprivate", "ro"]);
        assert_eq!(cri, How { recursive: true, read_only: ReadOnly::Top });
        assert_eq!(how(&["rbind", "rslave", "rro"]).read_only, ReadOnly::All);
    }
}
