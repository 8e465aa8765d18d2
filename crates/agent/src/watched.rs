//! Copies of small volumes of the host's, which it sends again as a whole whenever they have changed.
//!
//! They change as kubelet changes its own: what is new is written beside what is there, links are swapped by a rename, and
//! what is old goes last. So whoever follows a link sees one state or the other, and whoever waits by inotify(7) hears the
//! same of it as on the host. Containers cannot write there.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use agent_api::agent::{WatchedFile, WatchedVolume};
use agent_api::paths;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use crate::error::Error;
use crate::sandbox::check_id;

/// The copies and how new they are.
#[derive(Debug, Default)]
pub(crate) struct Watched(Mutex<HashMap<String, u64>>);

impl Watched {
    /// Brings one to a newer state, or makes it.
    pub(crate) fn refresh(&self, volume: &WatchedVolume) -> Result<(), Error> {
        check_id("volume", &volume.name)?;
        let mut revisions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if revisions.get(&volume.name).is_some_and(|known| *known >= volume.revision) {
            return Ok(());
        }
        let folder = Path::new(paths::SANDBOX_WATCHED).join(&volume.name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&folder)
            .and_then(|()| apply(&folder, &volume.files))
            .map_err(Error::failed(format!("volume {}", volume.name)))?;
        revisions.insert(volume.name.clone(), volume.revision);
        Ok(())
    }
}

fn apply(folder: &Path, files: &[WatchedFile]) -> io::Result<()> {
    let mut old = BTreeSet::new();
    list(folder, Path::new(""), &mut old)?;
    let is = |file: &WatchedFile, kind| file.mode & libc::S_IFMT == kind;
    for file in files {
        let path = place(folder, &file.path)?;
        if is(file, libc::S_IFDIR) {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        } else if is(file, libc::S_IFREG) {
            regular(&path, file, old.contains(Path::new(&file.path)))?;
        } else if !is(file, libc::S_IFLNK) {
            return Err(io::Error::other(format!("{:?} is neither a folder nor a file nor a link", file.path)));
        }
    }
    // what they lead to is there
    for file in files.iter().filter(|file| is(file, libc::S_IFLNK)) {
        link(&place(folder, &file.path)?, file, old.contains(Path::new(&file.path)))?;
    }
    for file in files {
        old.remove(Path::new(&file.path));
    }
    // what is in a folder before it
    for gone in old.iter().rev() {
        let path = folder.join(gone);
        match path.symlink_metadata() {
            Ok(meta) if meta.is_dir() => fs::remove_dir(path)?,
            Ok(_) => fs::remove_file(path)?,
            // a draft of an earlier try, which this one has used
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    // nothing is added to folders any more, which would change their times
    for file in files.iter().filter(|file| is(file, libc::S_IFDIR)) {
        own(&place(folder, &file.path)?, file)?;
    }
    Ok(())
}

/// Never above the volume.
fn place(folder: &Path, path: &str) -> io::Result<PathBuf> {
    if Path::new(path).components().all(|part| matches!(part, Component::Normal(_))) {
        Ok(folder.join(path))
    } else {
        Err(io::Error::other(format!("{path:?} must be a relative path without ..")))
    }
}

fn list(folder: &Path, below: &Path, all: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder.join(below))? {
        let entry = entry?;
        let name = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list(folder, &name, all)?;
        }
        all.insert(name);
    }
    Ok(())
}

fn regular(path: &Path, file: &WatchedFile, is_there: bool) -> io::Result<()> {
    if is_there && fs::read(path).is_ok_and(|content| content == file.content) {
        return own(path, file);
    }
    let draft = draft(path);
    let to = if is_there { draft.as_path() } else { path };
    fs::write(to, &file.content)?;
    own(to, file)?;
    if is_there { fs::rename(to, path) } else { Ok(()) }
}

fn link(path: &Path, file: &WatchedFile, is_there: bool) -> io::Result<()> {
    let target = OsStr::from_bytes(&file.content);
    if is_there && fs::read_link(path).is_ok_and(|old| old == target) {
        return Ok(());
    }
    let draft = draft(path);
    let to = if is_there { draft.as_path() } else { path };
    // one of an earlier try, which did not come to its end
    let _ = fs::remove_file(to);
    symlink(target, to)?;
    lchown(to, Some(file.uid), Some(file.gid))?;
    if is_there { fs::rename(to, path) } else { Ok(()) }
}

/// Kubelet's name for it.
fn draft(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("_tmp");
    name.into()
}

fn own(path: &Path, file: &WatchedFile) -> io::Result<()> {
    chown(path, Some(file.uid), Some(file.gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(file.mode & 0o7777))?;
    let time = TimeSpec::new(file.mtime, 0);
    Ok(utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::FollowSymlink)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, kind: libc::mode_t, content: &str) -> WatchedFile {
        let mode = kind | if kind == libc::S_IFDIR { 0o755 } else { 0o640 };
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let content = content.as_bytes().to_vec();
        WatchedFile { path: path.into(), mode, uid, gid, mtime: 1_000_000_000, content, ..Default::default() }
    }

    fn state(time: &str, key: &str) -> Vec<WatchedFile> {
        vec![
            file("", libc::S_IFDIR, ""),
            file(time, libc::S_IFDIR, ""),
            file(&format!("{time}/key"), libc::S_IFREG, key),
            file("..data", libc::S_IFLNK, time),
            file("key", libc::S_IFLNK, "..data/key"),
            file("plain", libc::S_IFREG, key),
        ]
    }

    #[test]
    fn one_state_follows_the_other() {
        let folder = tempfile::tempdir().expect("a folder");
        apply(folder.path(), &state("..1", "old")).expect("made");
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).expect("read");
        assert_eq!((read("key"), read("plain")), ("old".into(), "old".into()));
        let held = fs::File::open(folder.path().join("key")).expect("opened");
        apply(folder.path(), &state("..2", "new")).expect("changed");
        assert_eq!((read("key"), read("plain")), ("new".into(), "new".into()));
        assert_eq!(io::read_to_string(held).expect("read"), "old");
        let mut names = BTreeSet::new();
        list(folder.path(), Path::new(""), &mut names).expect("listed");
        let names: Vec<_> = names.iter().filter_map(|name| name.to_str()).collect();
        assert_eq!(names, ["..2", "..2/key", "..data", "key", "plain"]);
        let meta = fs::metadata(folder.path().join("key")).expect("there");
        assert_eq!((meta.permissions().mode() & 0o777, meta.modified().is_ok()), (0o640, true));
        // the same again changes nothing
        apply(folder.path(), &state("..2", "new")).expect("changed");
        assert_eq!(read("key"), "new");
    }

    #[test]
    fn what_a_failed_try_has_left_is_no_hindrance() {
        let folder = tempfile::tempdir().expect("a folder");
        apply(folder.path(), &state("..1", "old")).expect("made");
        symlink("..0", folder.path().join("..data_tmp")).expect("made");
        for draft in ["plain_tmp", "..1/key_tmp"] {
            fs::write(folder.path().join(draft), "half").expect("written");
        }
        let broken = [state("..2", "new"), vec![file("node", libc::S_IFCHR, "")]].concat();
        apply(folder.path(), &broken).expect_err("a device, after most of it");
        apply(folder.path(), &state("..2", "new")).expect("changed");
        let mut names = BTreeSet::new();
        list(folder.path(), Path::new(""), &mut names).expect("listed");
        let names: Vec<_> = names.iter().filter_map(|name| name.to_str()).collect();
        assert_eq!(names, ["..2", "..2/key", "..data", "key", "plain"]);
        assert_eq!(fs::read_to_string(folder.path().join("key")).expect("read"), "new");
    }

    #[test]
    fn nothing_is_made_outside() {
        let folder = tempfile::tempdir().expect("a folder");
        for path in ["../out", "/out", "a/../../out"] {
            let bad = [file("a", libc::S_IFDIR, ""), file(path, libc::S_IFREG, "x")];
            apply(folder.path(), &bad).expect_err(path);
        }
        apply(folder.path(), &[file("node", libc::S_IFCHR, "")]).expect_err("a device");
    }
}
