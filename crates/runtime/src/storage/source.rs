//! A volume's source on the host: opened once, so that what was looked at is what is shared.
//!
//! The path comes from whoever made the pod, and most of it is the host's own. But it may lead through a folder that a
//! virtual machine can write to, as a part of another volume does; links there are the guest's, which can turn them at
//! any moment. So the path is walked part by part, and from the first such folder on it is resolved inside that folder
//! (openat2(2), `RESOLVE_IN_ROOT`).
#![allow(unsafe_code, reason = "statx has no safe wrapper")]

use std::collections::{HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileType};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::statfs::{FsType, fstatfs};

use crate::cleanup::{MountTable, MountedPath};

/// As many links as the kernel follows.
const LINKS: usize = 40;

/// An opened source.
#[derive(Debug)]
pub(crate) struct Source {
    fd: OwnedFd,
    meta: fs::Metadata,
    mount: u64,
    is_guests: bool,
}

/// What tells one source from another, for as long as one of them is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    mount: u64,
}

/// Folders that virtual machines of this host can write to.
#[derive(Debug, Default)]
pub(crate) struct GuestWritable {
    /// By file system and path in it: nothing has to be asked of a file system that another pod has.
    folders: HashSet<MountedPath>,
    mounts: MountTable,
}

impl GuestWritable {
    /// What is mounted read-write below the run folders of all sandboxes, `sandboxes`, is what their daemons serve.
    pub(crate) fn of(sandboxes: &Path) -> io::Result<Self> {
        let mounts = MountTable::read()?;
        let folders = mounts.written_below(sandboxes).collect();
        Ok(Self { folders, mounts })
    }

    fn has(&self, folder: &OwnedFd) -> io::Result<bool> {
        if self.folders.is_empty() {
            return Ok(false);
        }
        // a mount that is newer than the list is nobody's word to trust
        let Some((device, path)) = self.mounts.place(mount_id(folder.as_fd())?, &shown(folder)?) else {
            return Ok(true);
        };
        // a part of one may be mounted elsewhere
        Ok(path.ancestors().any(|above| self.folders.contains(&(device.clone(), above.to_owned()))))
    }
}

impl Source {
    /// Opens the folder or file at `path`.
    pub(crate) fn open(path: &Path, writable: &GuestWritable) -> io::Result<Self> {
        let (fd, is_inside) = walk(path, writable)?;
        let meta = File::from(fd.try_clone()?).metadata()?;
        let mount = mount_id(fd.as_fd())?;
        let is_guests = is_inside || (meta.is_dir() && writable.has(&fd)?);
        Ok(Self { fd, meta, mount, is_guests })
    }

    /// It is in a folder that a virtual machine can write to.
    pub(crate) fn is_guests(&self) -> bool {
        self.is_guests
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity { device: self.meta.dev(), inode: self.meta.ino(), mount: self.mount }
    }

    pub(crate) fn device_and_inode(&self) -> (u64, u64) {
        (self.meta.dev(), self.meta.ino())
    }

    pub(crate) fn kind(&self) -> FileType {
        self.meta.file_type()
    }

    pub(crate) fn meta(&self) -> &fs::Metadata {
        &self.meta
    }

    /// Type of its file system, and the size that one has, bytes; zero is none.
    pub(crate) fn file_system(&self) -> io::Result<(FsType, u64)> {
        let stat = fstatfs(&self.fd)?;
        let size = stat.blocks().saturating_mul(u64::try_from(stat.block_size()).unwrap_or_default());
        Ok((stat.filesystem_type(), size))
    }

    /// Its file system's unit: the size of a page where it is made of huge ones.
    pub(crate) fn block_size(&self) -> io::Result<u64> {
        u64::try_from(fstatfs(&self.fd)?.block_size()).map_err(io::Error::other)
    }

    /// The kernel's name for it.
    pub(crate) fn shown(&self) -> io::Result<PathBuf> {
        shown(&self.fd)
    }

    /// Where it is in its file system, whatever is mounted where.
    pub(crate) fn path_in_file_system(&self) -> io::Result<PathBuf> {
        let (_, path) = MountTable::read()?
            .place(self.mount, &self.shown()?)
            .ok_or_else(|| io::Error::other(format!("mount {} is not in mountinfo", self.mount)))?;
        Ok(path)
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The kernel's name for it.
fn shown(fd: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Also tells whether it went through a folder that a guest can write to.
fn walk(path: &Path, writable: &GuestWritable) -> io::Result<(OwnedFd, bool)> {
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is not absolute"));
    }
    let mut left = parts(path);
    let mut links = 0;
    let mut at = top()?;
    loop {
        if left.is_empty() {
            return Ok((at, false));
        }
        if writable.has(&at)? {
            return Ok((inside(&at, &left.iter().collect::<PathBuf>())?, true));
        }
        let Some(part) = left.pop_front() else { return Ok((at, false)) };
        let next = step(&at, &part)?;
        if !is_link(&next)? {
            at = next;
            continue;
        }
        links += 1;
        if links > LINKS {
            return Err(Errno::ELOOP.into());
        }
        let target = PathBuf::from(readlinkat(&next, "")?);
        if target.is_absolute() {
            at = top()?;
        }
        for part in parts(&target).into_iter().rev() {
            left.push_front(part);
        }
    }
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let named = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    };
    path.components().filter_map(named).collect()
}

fn top() -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?)
}

fn step(at: &OwnedFd, part: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(at, part, flags, nix::sys::stat::Mode::empty())?)
}

/// What a guest may have put there leads nowhere else.
fn inside(folder: &OwnedFd, rest: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
    // EAGAIN: a folder of that path was moved meanwhile (openat2(2)); whoever does so for ever is refused
    for _ in 0..LINKS {
        match openat2(folder, rest, how) {
            Err(Errno::EAGAIN) => {}
            other => return Ok(other?),
        }
    }
    Err(Errno::EAGAIN.into())
}

fn is_link(fd: &OwnedFd) -> io::Result<bool> {
    let stat = nix::sys::stat::fstat(fd)?;
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFLNK)
}

/// The kernel's number of the mount that it was opened through.
fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an open descriptor, an empty path, and room for a statx.
    let done = unsafe {
        libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_MNT_ID, stat.as_mut_ptr())
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain data, zeroed, and filled in by the call.
    Ok(unsafe { stat.assume_init() }.stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn at(path: &Path, writable: &GuestWritable) -> io::Result<PathBuf> {
        shown(&Source::open(path, writable)?.fd)
    }

    #[test]
    fn the_hosts_own_links_are_followed() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path().canonicalize().expect("resolved");
        fs::create_dir_all(root.join("a/b")).expect("made");
        symlink("a", root.join("relative")).expect("linked");
        symlink(root.join("relative/b"), root.join("absolute")).expect("linked");
        symlink("loop", root.join("loop")).expect("linked");
        let nobody = GuestWritable::default();
        assert_eq!(at(&root.join("relative/b"), &nobody).expect("opened"), root.join("a/b"));
        assert_eq!(at(&root.join("absolute"), &nobody).expect("opened"), root.join("a/b"));
        assert_eq!(at(&root.join("absolute/../b"), &nobody).expect("opened"), root.join("a/b"));
        assert_eq!(at(&root.join("loop"), &nobody).expect_err("endless").raw_os_error(), Some(libc::ELOOP));
        assert_eq!(at(&root.join("none"), &nobody).expect_err("missing").raw_os_error(), Some(libc::ENOENT));
        at(Path::new("relative"), &nobody).expect_err("from nowhere");
    }

    #[test]
    fn a_guests_links_stay_in_its_folder() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path().canonicalize().expect("resolved");
        let volume = root.join("volume");
        fs::create_dir_all(volume.join("etc")).expect("made");
        fs::create_dir(root.join("secret")).expect("made");
        symlink(root.join("secret"), volume.join("out")).expect("linked");
        symlink("../secret", volume.join("up")).expect("linked");
        symlink("/etc", volume.join("top")).expect("linked");
        symlink("volume", root.join("way")).expect("linked");
        let mounts = MountTable::read().expect("read");
        let opened = Source::open(&volume, &GuestWritable::default()).expect("opened");
        let place = mounts.place(opened.mount, &volume).expect("found");
        let guests = GuestWritable { folders: HashSet::from([place]), mounts };
        for way in ["volume", "way"] {
            let folder = root.join(way);
            assert_eq!(at(&folder, &guests).expect("opened"), volume);
            assert_eq!(at(&folder.join("top"), &guests).expect("opened"), volume.join("etc"));
            at(&folder.join("out"), &guests).expect_err("outside");
            at(&folder.join("up"), &guests).expect_err("outside");
            at(&folder.join("../secret"), &guests).expect_err("outside");
        }
        // a part of it, by whatever way, is the guest's as well
        assert!(Source::open(&volume.join("etc"), &guests).expect("opened").is_guests());
        assert!(Source::open(&volume, &guests).expect("opened").is_guests());
        assert!(!Source::open(&root.join("secret"), &guests).expect("opened").is_guests());
        // a file that guests write to is one by itself
        let file = volume.join("etc/file");
        fs::write(&file, "").expect("written");
        let mounts = MountTable::read().expect("read");
        let opened = Source::open(&file, &GuestWritable::default()).expect("opened");
        let folders = HashSet::from([mounts.place(opened.mount, &file).expect("found")]);
        assert_eq!(at(&file, &GuestWritable { folders, mounts }).expect("opened"), file);
        assert_eq!(at(&volume.join("out"), &GuestWritable::default()).expect("the host's"), root.join("secret"));
    }

    #[test]
    fn equal_sources_are_the_same() {
        let root = tempfile::tempdir().expect("a folder");
        let open = |path: &Path| Source::open(path, &GuestWritable::default()).expect("opened");
        let (first, again) = (open(root.path()), open(root.path()));
        assert_eq!(first.identity(), again.identity());
        fs::create_dir(root.path().join("sub")).expect("made");
        let below = open(&root.path().join("sub"));
        assert_ne!(first.identity(), below.identity());
        assert_eq!(below.path_in_file_system().expect("found").file_name(), Some(OsStr::new("sub")));
    }
}
