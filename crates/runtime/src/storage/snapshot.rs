//! What is in a small volume that kubelet swaps as a whole, read at once. Its layout: files in a folder named after the
//! time, a link `..data` to that folder, and a link through `..data` for each name that a container is to see.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use agent_api::agent::WatchedFile;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use super::source::Source;

/// The link that is swapped.
const DATA: &str = "..data";
/// No deeper; kubelet's own check of such paths ends at their length.
const DEPTH: usize = 16;
/// A volume may be swapped while it is read; it is read again so often.
const TRIES: usize = 16;

/// How much is copied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) files: usize,
    pub(crate) bytes: u64,
}

/// Kata's, for what is worth a copy.
pub(crate) const SMALL: Limit = Limit { files: 16, bytes: 1 << 20 };
/// To which a volume may grow that is copied already; a message to the guest ends at 4 MiB.
pub(crate) const GROWN: Limit = Limit { files: 512, bytes: 3 << 20 };

/// The folder, for reading it.
pub(crate) fn open(source: &Source) -> io::Result<OwnedFd> {
    Ok(reopened(source.as_fd(), OFlag::O_DIRECTORY)?)
}

/// All of the volume in `folder`; `None` for one that is larger than the limit or not laid out like that.
///
/// No link is followed and no path used: what is looked at is what is read, whoever writes there.
pub(crate) fn read(folder: &OwnedFd, limit: Limit) -> io::Result<Option<Vec<WatchedFile>>> {
    let mut tries = 0;
    loop {
        let before = match readlinkat(folder, DATA) {
            Ok(target) => PathBuf::from(target),
            // no link, or none at all: somebody else's folder
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let entries = limit.files.saturating_mul(4).saturating_add(16);
        let mut reading = Reading { left: limit, entries, files: Vec::new(), current: before.clone() };
        let outcome = reading.folder(folder, Path::new(""), 0);
        let is_whole = readlinkat(folder, DATA).is_ok_and(|after| Path::new(&after) == before);
        tries += 1;
        match outcome {
            Ok(fits) if is_whole => return Ok(fits.then_some(reading.files)),
            Err(error) if is_whole && error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ if tries == TRIES => return Err(io::Error::other("it changed during each attempt to read it")),
            _ => {}
        }
    }
}

/// Another descriptor of the same file or folder, for reading.
fn reopened(fd: BorrowedFd<'_>, more: OFlag) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | more;
    nix::fcntl::open(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str(), flags, Mode::empty())
}

struct Reading {
    left: Limit,
    /// Most names that are looked at, of whatever kind.
    entries: usize,
    files: Vec<WatchedFile>,
    /// The folder that counts now.
    current: PathBuf,
}

impl Reading {
    /// Whether it fits, as far as it was read.
    fn folder(&mut self, folder: &OwnedFd, name: &Path, depth: usize) -> io::Result<bool> {
        self.add(&File::from(folder.try_clone()?).metadata()?, name, Vec::new());
        let mut entries = Vec::new();
        for entry in fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))? {
            let Some(left) = self.entries.checked_sub(1) else { return Ok(false) };
            self.entries = left;
            entries.push(entry?.file_name());
        }
        entries.sort();
        for entry in entries {
            let name = name.join(&entry);
            if depth == 0 && self.is_passing(&name) {
                continue;
            }
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let opened = File::from(openat(folder, entry.as_os_str(), flags, Mode::empty())?);
            let meta = opened.metadata()?;
            let fits = if meta.is_dir() {
                let below = reopened(opened.as_fd(), OFlag::O_DIRECTORY)?;
                depth < DEPTH && self.folder(&below, &name, depth + 1)?
            } else if meta.is_symlink() {
                let target = readlinkat(&opened, "")?.into_vec();
                self.add(&meta, &name, target)
            } else if meta.is_file() {
                self.file(&opened, &name, &meta)?
            } else {
                false
            };
            if !fits {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What is being written for the next swap, or left from the last one.
    fn is_passing(&self, name: &Path) -> bool {
        let is_own = name.to_str().is_some_and(|name| name.starts_with(".."));
        is_own && name != Path::new(DATA) && name != self.current
    }

    fn file(&mut self, opened: &File, name: &Path, meta: &fs::Metadata) -> io::Result<bool> {
        if self.left.files == 0 || meta.len() > self.left.bytes {
            return Ok(false);
        }
        let mut content = Vec::new();
        let file = File::from(reopened(opened.as_fd(), OFlag::empty())?);
        file.take(self.left.bytes + 1).read_to_end(&mut content)?;
        let Some(left) = self.left.bytes.checked_sub(content.len() as u64) else { return Ok(false) };
        self.left = Limit { files: self.left.files - 1, bytes: left };
        Ok(self.add(meta, name, content))
    }

    fn add(&mut self, meta: &fs::Metadata, name: &Path, content: Vec<u8>) -> bool {
        let Some(path) = name.to_str() else { return false };
        self.files.push(WatchedFile {
            path: path.to_owned(),
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: meta.mtime(),
            content,
            ..Default::default()
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn volume(folder: &Path, time: &str, files: &[(&str, &str)]) {
        fs::create_dir_all(folder.join(time).join("sub")).expect("made");
        for (name, content) in files {
            fs::write(folder.join(time).join(name), content).expect("written");
            let _ = symlink(format!("..data/{name}"), folder.join(name));
        }
        let _ = fs::remove_file(folder.join(DATA));
        symlink(time, folder.join(DATA)).expect("linked");
    }

    fn opened(folder: &Path) -> OwnedFd {
        File::open(folder).expect("a folder").into()
    }

    fn names(files: &[WatchedFile]) -> Vec<&str> {
        files.iter().map(|file| file.path.as_str()).collect()
    }

    #[test]
    fn what_counts_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(read(&opened(folder.path()), SMALL).expect("empty").is_none());
        volume(folder.path(), "..1", &[("key", "old")]);
        volume(folder.path(), "..2", &[("key", "new")]);
        let files = read(&opened(folder.path()), SMALL).expect("read").expect("fits");
        assert_eq!(names(&files), ["", "..2", "..2/key", "..2/sub", "..data", "key"]);
        assert_eq!((files[2].content.as_slice(), files[4].content.as_slice()), (&b"new"[..], &b"..2"[..]));
        assert_eq!(files[5].mode & libc::S_IFMT, libc::S_IFLNK);
    }

    #[test]
    fn what_is_large_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        volume(folder.path(), "..1", &[("a", "12345"), ("b", "6")]);
        let limit = |files, bytes| read(&opened(folder.path()), Limit { files, bytes }).expect("read").is_some();
        assert!(limit(2, 6) && !limit(1, 6) && !limit(2, 5));
        let _fifo = nix::unistd::mkfifo(&folder.path().join("..1/fifo"), nix::sys::stat::Mode::S_IRUSR);
        assert!(!limit(9, 9));
    }

    #[test]
    fn links_are_not_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let other = tempfile::tempdir().expect("a folder");
        fs::write(other.path().join("key"), "secret").expect("written");
        volume(folder.path(), "..1", &[]);
        symlink(other.path(), folder.path().join("..1/out")).expect("linked");
        let files = read(&opened(folder.path()), SMALL).expect("read").expect("fits");
        assert!(files.iter().all(|file| file.content != b"secret"), "{files:?}");
        fs::remove_dir_all(folder.path().join("..1")).expect("removed");
        symlink(other.path(), folder.path().join("..1")).expect("linked");
        let files = read(&opened(folder.path()), SMALL).expect("read").expect("fits");
        assert!(files.iter().all(|file| file.content != b"secret"), "{files:?}");
        (0..100).for_each(|number| symlink("x", folder.path().join(number.to_string())).expect("linked"));
        assert!(read(&opened(folder.path()), SMALL).expect("read").is_none(), "too many links");
    }
}
