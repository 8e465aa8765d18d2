//! What the containers of a pod have in common: each source of the host's is in the share once for all of them.
//!
//! To the guest's kernel every mount in the share is a file system of its own. Two containers that see one folder through
//! two of them would not see each other's locks, nor each other's memory maps.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::source::{Identity, Source};
use super::tree::How;

/// The longest name that is taken over from the host's folder, bytes.
const NAME: usize = 128;

/// Who has what of a pod's share and of its VM's own volumes.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    shared: Vec<Shared>,
    /// By the host's folder that one stands for.
    local: HashMap<(PathBuf, u64, u64), String>,
    local_names: HashSet<String>,
    /// Of containers, for what each has of its own.
    owners: HashSet<String>,
    count: u64,
}

#[derive(Debug)]
struct Shared {
    source: Identity,
    how: How,
    name: String,
    users: u64,
    /// It is no longer what a container would get that is made now.
    is_old: bool,
}

/// A name in the share.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing is there yet.
    New(String),
    /// Another container has it already.
    Taken(String),
}

impl Shelf {
    /// The place of a source, for a container more. `owner` makes names that a person can read.
    pub(crate) fn take(&mut self, source: Identity, how: How, owner: &str) -> Place {
        let current = |one: &&mut Shared| one.source == source && one.how == how && !one.is_old;
        if let Some(shared) = self.shared.iter_mut().find(current) {
            shared.users += 1;
            return Place::Taken(shared.name.clone());
        }
        Place::New(self.add(source, how, owner))
    }

    /// A place of its own for a container that was just told to share `old`, which has changed on the host since.
    pub(crate) fn renew(&mut self, source: Identity, how: How, owner: &str, old: &str) -> String {
        if let Some(shared) = self.shared.iter_mut().find(|one| one.name == old) {
            shared.is_old = true;
            shared.users = shared.users.saturating_sub(1);
        }
        self.add(source, how, owner)
    }

    /// A name for what no other container can have.
    pub(crate) fn own(&mut self, owner: &str) -> String {
        // never used again: the guest may still know what was there
        self.count += 1;
        format!("{owner}-{:04}", self.count)
    }

    /// The name of a container's own folder: its id, unless that is still the name of an earlier one's.
    pub(crate) fn own_or(&mut self, id: &str) -> String {
        let name = if self.owners.contains(id) { self.own(id) } else { id.to_owned() };
        self.owners.insert(name.clone());
        name
    }

    fn add(&mut self, source: Identity, how: How, owner: &str) -> String {
        let name = self.own(owner);
        self.shared.push(Shared { source, how, name: name.clone(), users: 1, is_old: false });
        name
    }

    /// A container less has it; `true` when that was the last one, or nobody knows it.
    pub(crate) fn give_back(&mut self, name: &str) -> bool {
        self.owners.remove(name);
        let Some(index) = self.shared.iter().position(|shared| shared.name == name) else { return true };
        let shared = &mut self.shared[index];
        shared.users = shared.users.saturating_sub(1);
        let is_last = shared.users == 0;
        if is_last {
            self.shared.swap_remove(index);
        }
        is_last
    }

    /// The name of what the VM has of its own in place of a folder of the host's: always the same, and for one folder.
    pub(crate) fn local(&mut self, path: &Path, source: &Source) -> String {
        let (device, inode) = source.device_and_inode();
        let key = (path.to_owned(), device, inode);
        if let Some(name) = self.local.get(&key) {
            return name.clone();
        }
        let wanted = path.file_name().and_then(|name| name.to_str()).filter(|name| is_plain(name));
        let wanted = wanted.unwrap_or("volume");
        let mut name = wanted.to_owned();
        while !self.local_names.insert(name.clone()) {
            self.count += 1;
            name = format!("{wanted}-{}", self.count);
        }
        self.local.insert(key, name.clone());
        name
    }
}

/// As Kubernetes names volumes, and more.
fn is_plain(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    name.len() <= NAME && !name.starts_with('.') && name.bytes().all(known)
}

#[cfg(test)]
mod tests {
    use super::super::source::GuestWritable;
    use super::*;

    fn open(path: &Path) -> Source {
        Source::open(path, &GuestWritable::default()).expect("opened")
    }

    #[test]
    fn one_source_has_one_place_until_nobody_uses_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let (source, how) = (open(folder.path()).identity(), How::default());
        let mut shelf = Shelf::default();
        assert_eq!(shelf.take(source, how, "c1"), Place::New("c1-0001".into()));
        assert_eq!(shelf.take(source, how, "c2"), Place::Taken("c1-0001".into()));
        let other = How { recursive: true, ..how };
        assert_eq!(shelf.take(source, other, "c2"), Place::New("c2-0002".into()));
        assert!(!shelf.give_back("c1-0001"));
        assert!(shelf.give_back("c1-0001"));
        assert_eq!(shelf.take(source, how, "c1"), Place::New("c1-0003".into()));
        assert!(shelf.give_back("unknown"));
        // what has changed since stays with those that have it
        assert_eq!(shelf.take(source, how, "c2"), Place::Taken("c1-0003".into()));
        assert_eq!(shelf.renew(source, how, "c2", "c1-0003"), "c2-0004");
        assert_eq!(shelf.take(source, how, "c3"), Place::Taken("c2-0004".into()));
        assert!(shelf.give_back("c1-0003"));
        assert!(!shelf.give_back("c2-0004"));
    }

    #[test]
    fn local_names_are_the_folders_and_different() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut shelf = Shelf::default();
        for (parent, name, expected) in
            [("a", "scratch", "scratch"), ("b", "scratch", "scratch-1"), ("a", "..x", "volume"), ("a", "é", "volume-2")]
        {
            let path = folder.path().join(parent).join(name);
            std::fs::create_dir_all(&path).expect("made");
            assert_eq!(shelf.local(&path, &open(&path)), expected);
            assert_eq!(shelf.local(&path, &open(&path)), expected);
        }
    }
}
