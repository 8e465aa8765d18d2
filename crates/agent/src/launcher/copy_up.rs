//! What an image has in a folder, in the new file system that is mounted over it (`tmpcopyup`).
//!
//! The image is hostile: each name is resolved in the folder that is open, and no link is followed.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstatat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

/// Copies everything in the folder `from` into the empty folder `to`, with owners and permissions, as runc does.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    for entry in fs::read_dir(format!("/proc/self/fd/{}", from.as_raw_fd()))? {
        let name = entry?.file_name();
        let name = name.as_os_str();
        copy_one(from, to, name)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", name.display())))?;
    }
    Ok(())
}

fn copy_one(from: &OwnedFd, to: &OwnedFd, name: &std::ffi::OsStr) -> io::Result<()> {
    let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let private = Mode::from_bits_truncate(0o700);
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => {
            mkdirat(to, name, private)?;
            let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            copy(&open(from, name, folder)?, &open(to, name, folder)?)?;
        }
        SFlag::S_IFREG => {
            let source = open(from, name, OFlag::O_RDONLY)?;
            let made = open(to, name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
            io::copy(&mut File::from(source), &mut File::from(made))?;
        }
        SFlag::S_IFLNK => symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?,
        other => mknodat(to, name, other, private, stat.st_rdev)?,
    }
    keep(to.as_fd(), name, &stat)
}

fn open(at: &OwnedFd, name: &std::ffi::OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
    openat(at, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::from_bits_truncate(0o600))
}

/// Owner, then permissions: a change of owner takes some of them away.
fn keep(at: BorrowedFd<'_>, name: &std::ffi::OsStr, stat: &FileStat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(at, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFLNK.bits() {
        // it was made a moment ago, in a file system that nobody else has
        fchmodat(at, name, Mode::from_bits_truncate(stat.st_mode & 0o7777), FchmodatFlags::FollowSymlink)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn everything_is_copied_and_no_link_followed() {
        let (old, new) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let at = |path: &str| old.path().join(path);
        fs::create_dir(at("sub")).expect("made");
        fs::write(at("sub/file"), "text").expect("written");
        fs::set_permissions(at("sub/file"), fs::Permissions::from_mode(0o4751)).expect("set");
        fs::set_permissions(at("sub"), fs::Permissions::from_mode(0o711)).expect("set");
        symlink("/etc", at("link")).expect("linked");
        nix::unistd::mkfifo(&at("fifo"), Mode::from_bits_truncate(0o622)).expect("made");
        let open = |path: &std::path::Path| OwnedFd::from(File::open(path).expect("opened"));
        copy(&open(old.path()), &open(new.path())).expect("copied");
        let there = |path: &str| new.path().join(path);
        assert_eq!(fs::read_to_string(there("sub/file")).expect("read"), "text");
        for name in ["sub", "sub/file", "fifo", "link"] {
            let (old, new) = (at(name).symlink_metadata(), there(name).symlink_metadata());
            assert_eq!(old.expect("there").mode(), new.expect("copied").mode(), "{name}");
        }
        assert_eq!(fs::read_link(there("link")).expect("a link"), std::path::Path::new("/etc"));
        copy(&open(old.path()), &open(new.path())).expect_err("it is not empty any more");
    }
}
