//! Which disks a VM has: containers of a pod that need the same one share it.

use hypervisor::{Device, Disk};

use std::path::PathBuf;

use super::block::{Key, Source};
use crate::Error;

/// Those of a pod.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    /// Names are never used twice in a VM.
    named: u64,
    all: Vec<Known>,
    /// Which no container has any more, and the guest has not let go of.
    kept: Vec<Known>,
    /// Which no container has any more, and the VM cannot give back: another container may have them.
    idle: Vec<Known>,
}

#[derive(Debug)]
pub(crate) struct Known {
    key: Key,
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    bytes: u64,
    users: usize,
}

impl Disks {
    /// Their names in the VM, and those that have to be plugged.
    pub(crate) fn assign(&mut self, sources: &[Source]) -> Result<(Vec<String>, Vec<Device>), Error> {
        let (mut ids, mut devices) = (Vec::new(), Vec::new());
        // what can fail comes first: nothing is counted then
        sources.iter().try_for_each(|source| self.is_free(source))?;
        let files = sources.iter().map(|source| source.file.try_clone()).collect::<std::io::Result<Vec<_>>>();
        let files = files.map_err(Error::host("opening a disk again"))?;
        for (source, file) in sources.iter().zip(files) {
            if let Some(place) = self.idle.iter().position(|idle| idle.key == source.key) {
                self.all.push(self.idle.swap_remove(place));
            }
            if let Some(known) = self.all.iter_mut().find(|known| known.key == source.key) {
                known.users += 1;
                ids.push(known.id.clone());
                continue;
            }
            self.named += 1;
            let id = format!("disk{}", self.named);
            let (path, bytes) = (source.path.clone(), source.bytes);
            self.all.push(Known { key: source.key, id: id.clone(), path, bytes, users: 1 });
            ids.push(id.clone());
            let (bytes, read_only, shared) = (source.bytes, source.key.read_only, source.shared);
            devices.push(Device::Disk(Disk { id, file, bytes, read_only, shared }));
        }
        Ok((ids, devices))
    }

    /// The VMM would refuse a second one with a word of locks, unless both only read; who else may have it at the same time may
    /// have it here too.
    fn is_free(&self, source: &Source) -> Result<(), Error> {
        let in_the_way =
            |kept: &Known| kept.key.is_same_file(source.key) && !(kept.key.read_only && source.key.read_only);
        let resized = self.idle.iter().find(|idle| idle.key == source.key && idle.bytes != source.bytes);
        if let Some(Known { bytes, .. }) = resized {
            return Err(Error::WrongState(format!(
                "block device {} had {bytes} bytes when it was attached to the VM as persistent memory, whose size cannot change, and has {} now: restart the pod",
                source.path.display(),
                source.bytes
            )));
        }
        // the same disk once more is another matter
        let idle = self.idle.iter().filter(|idle| idle.key != source.key).any(in_the_way);
        if (idle || self.kept.iter().any(in_the_way)) && !source.shared {
            return Err(Error::WrongState(format!(
                "the guest has not released block device {} of another container of the pod: it stays attached until the pod ends",
                source.path.display()
            )));
        }
        Ok(())
    }

    /// A container has gone; hands out the disks that nobody uses any more.
    pub(crate) fn release(&mut self, ids: &[String]) -> Vec<Known> {
        for known in self.all.iter_mut().filter(|known| ids.contains(&known.id)) {
            known.users = known.users.saturating_sub(1);
        }
        let (used, gone) = std::mem::take(&mut self.all).into_iter().partition(|known| known.users > 0);
        self.all = used;
        gone
    }

    /// The guest did not let go of these.
    pub(crate) fn keep(&mut self, kept: impl IntoIterator<Item = Known>) {
        self.kept.extend(kept);
    }

    /// The VM has these as long as it lives.
    pub(crate) fn rest(&mut self, idle: impl IntoIterator<Item = Known>) {
        self.idle.extend(idle);
    }

    /// The guest may have let go of some later; `has` says which it still has.
    pub(crate) fn let_go(&mut self, has: impl Fn(&str) -> bool) {
        self.kept.retain(|kept| has(&kept.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_file_is_one_disk() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "x").expect("written");
        let source = |read_only| Source::open(file.path(), read_only, false).expect("opened");
        let mut disks = Disks::default();
        let (ids, devices) = disks.assign(&[source(true), source(false)]).expect("assigned");
        assert_eq!((ids.as_slice(), devices.len()), (["disk1".to_owned(), "disk2".to_owned()].as_slice(), 2));
        let (again, devices) = disks.assign(&[source(false)]).expect("assigned");
        assert_eq!((again.as_slice(), devices.len()), (["disk2".to_owned()].as_slice(), 0));
        let names = |gone: Vec<Known>| gone.into_iter().map(|known| known.id).collect::<Vec<_>>();
        assert_eq!(names(disks.release(&ids)), ["disk1"]);
        assert_eq!(names(disks.release(&again)), ["disk2"]);
        assert_eq!(disks.assign(&[source(true)]).expect("assigned").0, ["disk3"]);
    }

    #[test]
    fn what_the_guest_keeps_is_not_given_again() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "x").expect("written");
        let source = |read_only, shared| Source::open(file.path(), read_only, shared).expect("opened");
        let mut disks = Disks::default();
        let (ids, _) = disks.assign(&[source(false, false)]).expect("assigned");
        let gone = disks.release(&ids);
        disks.keep(gone);
        for read_only in [false, true] {
            let error = disks.assign(&[source(read_only, false)]).expect_err("kept").to_string();
            assert!(error.contains(&file.path().display().to_string()) && error.contains("the pod ends"), "{error}");
        }
        let (raw, _) = disks.assign(&[source(false, true)]).expect("others may have it too");
        assert_eq!(raw, ["disk2"]);
        disks.let_go(|id| id == "disk1");
        disks.assign(&[source(false, false)]).expect_err("still kept");
        assert_eq!(disks.release(&raw).len(), 1);
        disks.let_go(|_| false);
        let (free, _) = disks.assign(&[source(false, false)]).expect("free");
        assert_eq!(free, ["disk3"]);
        assert_eq!(disks.release(&free).len(), 1);
        let (read, _) = disks.assign(&[source(true, false)]).expect("assigned");
        let gone = disks.release(&read);
        disks.keep(gone);
        disks.assign(&[source(true, false)]).expect("a layer that is only read may be there twice");
        disks.assign(&[source(false, false)]).expect_err("kept by a reader");
    }

    #[test]
    fn what_stays_is_given_again() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "x").expect("written");
        let source = |read_only| Source::open(file.path(), read_only, false).expect("opened");
        let mut disks = Disks::default();
        let (ids, _) = disks.assign(&[source(false)]).expect("assigned");
        let gone = disks.release(&ids);
        disks.rest(gone);
        disks.assign(&[source(true)]).expect_err("the guest could write it");
        for _ in 0..2 {
            let (again, devices) = disks.assign(&[source(false)]).expect("assigned");
            assert_eq!((again.as_slice(), devices.len()), (ids.as_slice(), 0));
        }
        assert_eq!(disks.release(&ids).len(), 0, "the second still has it");
        let gone = disks.release(&ids);
        assert_eq!(gone.len(), 1);
        disks.rest(gone);
        std::fs::write(file.path(), "longer").expect("written");
        let error = disks.assign(&[source(false)]).expect_err("it has grown").to_string();
        assert!(error.contains("had 1 bytes") && error.contains("has 6 now"), "{error}");
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Source::open(folder.path(), true, false).expect_err("a folder").to_string();
        assert!(error.contains("neither"), "{error}");
        let empty = folder.path().join("empty");
        std::fs::write(&empty, "").expect("written");
        let error = Source::open(&empty, true, false).expect_err("empty").to_string();
        assert!(error.contains("no bytes"), "{error}");
        Source::open(&folder.path().join("none"), true, false).expect_err("not there");
    }
}
