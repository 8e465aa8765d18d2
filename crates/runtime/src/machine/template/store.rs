//! Where templates are kept: a folder each, complete or not there.
//!
//! `<template_path>/<fingerprint>/{memory,state,about.json}`, made under another name and renamed.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::zeros;
use crate::Error;

/// Longest device state that is read, bytes; a real one has some 200 KB.
const LONGEST_STATE: u64 = 16 << 20;
/// Longest description, bytes.
const LONGEST_ABOUT: u64 = 64 << 10;
/// Most templates that are kept: each is some 40 MiB, and sizes that no pod has any more are never asked for.
const KEPT: usize = 8;
/// Length of a fingerprint, hexadecimal digits.
const KEY: usize = 32;
/// Before the name of one that is being made.
const DRAFT: &str = ".making-";

/// The folder of all.
#[derive(Debug, Clone)]
pub struct Store(PathBuf);

/// What is written beside a template.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct About {
    /// Processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Kernel and initrd, for people.
    pub boots: String,
    /// SHA-256 of `state`.
    pub state: String,
    /// When `memory` was last written, nanoseconds since 1970.
    pub memory_written: i128,
}

/// A template as people are shown it.
#[derive(Debug, Clone)]
pub struct Info {
    /// Its fingerprint.
    pub key: String,
    /// What it is.
    pub about: About,
    /// Bytes that it takes.
    pub used: u64,
    /// When it was made.
    pub made: SystemTime,
}

/// What was found when all were to go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Templates that are gone.
    pub templates: usize,
    /// Those that somebody makes just now.
    pub being_made: usize,
}

impl Store {
    /// Looks at nothing yet.
    pub fn new(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// Memory and checked device state; `None` when there is no such template.
    pub(super) fn open(&self, key: &str, memory_mib: u64) -> Result<Option<(OwnedFd, OwnedFd)>, Error> {
        let folder = self.0.join(key);
        let failed = |error| Error::host(format!("template {}", folder.display()))(error);
        let about = match about(&folder) {
            Ok(about) => about,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let checked = || -> io::Result<_> {
            let state = read_all(&folder.join("state"), LONGEST_STATE)?;
            if digest(&state) != about.state {
                return Err(io::Error::other("its `state` file was changed after it was saved"));
            }
            let memory = File::open(folder.join("memory"))?;
            let meta = memory.metadata()?;
            if meta.len() != memory_mib << 20 || written(&meta) != about.memory_written {
                return Err(io::Error::other("its `memory` file was changed after it was saved"));
            }
            // those very bytes, whatever becomes of the file
            let mut checked = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
            checked.write_all(&state)?;
            io::Seek::rewind(&mut checked)?;
            Ok((memory.into(), checked.into()))
        };
        checked().map(Some).map_err(failed)
    }

    /// Takes a template away, in one step for those who look for it.
    pub(crate) fn discard(&self, key: &str) {
        let away = self.0.join(format!("{DRAFT}{key}.{}", std::process::id()));
        let gone = fs::rename(self.0.join(key), &away).and_then(|()| fs::remove_dir_all(&away));
        if let Err(error) = gone
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, template = key, "cannot remove a template");
        }
    }

    /// All that are complete, newest first.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> Result<Vec<Info>, Error> {
        let mut all = Vec::new();
        for name in self.names()?.into_iter().filter(|name| !name.starts_with('.')) {
            let folder = self.0.join(&name);
            let Ok(about) = about(&folder) else { continue };
            let used = ["memory", "state"].iter().filter_map(|file| fs::metadata(folder.join(file)).ok());
            let used = used.map(|meta| meta.blocks() * 512).sum();
            let made = fs::metadata(folder.join("about.json")).and_then(|meta| meta.modified());
            all.push(Info { key: name, about, used, made: made.unwrap_or(SystemTime::UNIX_EPOCH) });
        }
        all.sort_by_key(|info| std::cmp::Reverse(info.made));
        Ok(all)
    }

    /// Takes all templates away, and what makers that died have left.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn destroy(&self) -> Result<Taken, Error> {
        let mut taken = Taken::default();
        // whatever else is in that folder is not ours
        for name in self.names()?.into_iter().filter(|name| is_ours(name)) {
            let path = self.0.join(&name);
            if let Some(key) = name.strip_prefix(".lock-") {
                // held by one who makes it now: that one removes what it made itself
                if self.lock(key)?.is_some() {
                    remove(&path)?;
                }
            } else if !name.starts_with(DRAFT) || self.is_abandoned(&name)? {
                taken.templates += usize::from(!name.starts_with('.'));
                remove(&path)?;
            } else {
                taken.being_made += 1;
            }
        }
        Ok(taken)
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        match fs::read_dir(&self.0) {
            Ok(entries) => Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::host(self.0.display().to_string())(error)),
        }
    }

    fn is_abandoned(&self, draft: &str) -> Result<bool, Error> {
        let key = draft.strip_prefix(DRAFT).and_then(|rest| rest.split('.').next()).unwrap_or_default();
        Ok(self.lock(key)?.is_some())
    }

    /// `None` when another process makes this template. The lock goes with its holder, however that ends.
    fn lock(&self, key: &str) -> Result<Option<Flock<File>>, Error> {
        let path = self.0.join(format!(".lock-{key}"));
        let shown = path.display().to_string();
        let opened = File::options().create(true).truncate(false).write(true).open(&path);
        let file = opened.map_err(Error::host(shown.clone()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(Error::host(shown)(errno)),
        }
    }

    /// A place to make a template in; `None` when somebody does, or when it is there.
    pub(super) fn draft(&self, key: &str, memory_mib: u64) -> Result<Option<Draft>, Error> {
        let failed = |path: &Path| Error::host(path.display().to_string());
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(failed(&self.0))?;
        let Some(lock) = self.lock(key)? else { return Ok(None) };
        if matches!(self.open(key, memory_mib), Ok(Some(_))) {
            return Ok(None);
        }
        // of makers that were killed
        for name in self.names()?.iter().filter(|name| name.starts_with(DRAFT)) {
            if name[DRAFT.len()..].starts_with(key) || self.is_abandoned(name)? {
                remove(&self.0.join(name))?;
            }
        }
        self.discard(key);
        let folder = self.0.join(format!("{DRAFT}{key}.{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&folder).map_err(failed(&folder))?;
        let draft = Draft { store: self.clone(), key: key.to_owned(), folder, lock };
        let memory = draft.file("memory")?;
        memory.set_len(memory_mib << 20).map_err(failed(&draft.folder.join("memory")))?;
        Ok(Some(draft))
    }
}

/// A template that is being made; goes when dropped.
#[derive(Debug)]
pub(super) struct Draft {
    store: Store,
    key: String,
    folder: PathBuf,
    #[expect(dead_code, reason = "held")]
    lock: Flock<File>,
}

impl Draft {
    /// One of its two files, for reading and writing.
    pub(super) fn file(&self, name: &str) -> Result<File, Error> {
        let path = self.folder.join(name);
        let options = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        options.map_err(Error::host(path.display().to_string()))
    }

    /// Both files are written: from now on it can be found.
    pub(super) fn publish(self, vcpus: u32, memory_mib: u64, boots: String) -> Result<(), Error> {
        let publish = || -> io::Result<()> {
            let state = read_all(&self.folder.join("state"), LONGEST_STATE)?;
            let memory = File::options().read(true).write(true).open(self.folder.join("memory"))?;
            zeros::punch(&memory)?;
            let memory = memory.metadata()?;
            let about = About { vcpus, memory_mib, boots, state: digest(&state), memory_written: written(&memory) };
            let text = serde_json::to_vec_pretty(&about).map_err(io::Error::other)?;
            fs::write(self.folder.join("about.json"), text)?;
            fs::rename(&self.folder, self.store.0.join(&self.key))
        };
        publish().map_err(Error::host(format!("template {}", self.folder.display())))?;
        for old in self.store.list()?.iter().skip(KEPT) {
            self.store.discard(&old.key);
        }
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // nothing is there when it was published
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A template, the draft of one, or a lock.
fn is_ours(name: &str) -> bool {
    let key = name.strip_prefix(".lock-").or_else(|| name.strip_prefix(DRAFT)?.split('.').next()).unwrap_or(name);
    key.len() == KEY && key.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn remove(path: &Path) -> Result<(), Error> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::host(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

fn about(folder: &Path) -> io::Result<About> {
    serde_json::from_slice(&read_all(&folder.join("about.json"), LONGEST_ABOUT)?).map_err(io::Error::other)
}

fn read_all(path: &Path, longest: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(longest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        return Err(io::Error::other(format!("{} is longer than {longest} bytes", path.display())));
    }
    Ok(bytes)
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn written(meta: &fs::Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0123456789abcdef0123456789abcdef";
    const B: &str = "fedcba9876543210fedcba9876543210";

    fn made(store: &Store, key: &str) {
        let draft = store.draft(key, 1).expect("a folder").expect("nobody else");
        draft.file("memory").expect("made").write_all(b"m").expect("written");
        draft.file("state").expect("made").write_all(b"state").expect("written");
        draft.publish(1, 1, "k".into()).expect("published");
    }

    #[test]
    fn what_was_changed_is_not_used() {
        let root = tempfile::tempdir().expect("a folder");
        let store = Store::new(&root.path().join("templates"));
        assert!(store.open(A, 1).expect("looked").is_none());
        made(&store, A);
        let (_, state) = store.open(A, 1).expect("good").expect("there");
        assert_eq!(
            read_all(Path::new(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&state))), 9)
                .expect("read"),
            b"state"
        );
        store.open(A, 2).expect_err("of another size");
        let folder = root.path().join("templates").join(A);
        for (file, bytes) in [("state", &b"statf"[..]), ("state", b"stat"), ("memory", b""), ("about.json", b"{")] {
            store.discard(A);
            made(&store, A);
            fs::write(folder.join(file), bytes).expect("written");
            store.open(A, 1).expect_err(file);
        }
        assert_eq!(store.list().expect("listed").len(), 0, "without a description it is none");
        fs::create_dir(root.path().join("templates/other")).expect("made");
        assert_eq!(store.destroy().expect("removed"), Taken { templates: 1, being_made: 0 });
        let left: Vec<_> = fs::read_dir(root.path().join("templates")).expect("listed").flatten().collect();
        assert_eq!(left.iter().map(fs::DirEntry::file_name).collect::<Vec<_>>(), ["other"], "what is not ours stays");
    }

    #[test]
    fn one_makes_it_and_what_a_dead_one_left_goes() {
        let root = tempfile::tempdir().expect("a folder");
        let store = Store::new(root.path());
        let first = store.draft(A, 1).expect("a folder").expect("nobody else");
        assert!(store.draft(A, 1).expect("looked").is_none(), "it is being made");
        assert_eq!(store.destroy().expect("looked"), Taken { templates: 0, being_made: 1 });
        assert!(store.draft(B, 1).expect("looked").is_some(), "another is not");
        drop(first);
        fs::create_dir(root.path().join(format!(".making-{A}.1"))).expect("made");
        made(&store, A);
        assert!(store.draft(A, 1).expect("looked").is_none(), "it is there");
        assert!(!root.path().join(format!(".making-{A}.1")).exists());
        for number in 0..KEPT + 3 {
            made(&store, &format!("{number:032x}"));
        }
        assert_eq!(store.list().expect("listed").len(), KEPT);
    }
}
