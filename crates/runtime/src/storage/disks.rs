//! Which disks a VM has: containers of a pod that need the same one share it.

use hypervisor::{Device, Disk};

use super::block::{Key, Source};

/// Those of a pod.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    /// Names are never used twice in a VM.
    named: u64,
    all: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    key: Key,
    id: String,
    users: usize,
}

impl Disks {
    /// Their names in the VM, and those that have to be plugged.
    pub(crate) fn assign(&mut self, sources: &mut [Source]) -> std::io::Result<(Vec<String>, Vec<Device>)> {
        let (mut ids, mut devices) = (Vec::new(), Vec::new());
        // what can fail comes first: nothing is counted then
        let files = sources.iter().map(|source| source.file.try_clone()).collect::<std::io::Result<Vec<_>>>()?;
        for (source, file) in sources.iter().zip(files) {
            if let Some(known) = self.all.iter_mut().find(|known| known.key == source.key) {
                known.users += 1;
                ids.push(known.id.clone());
                continue;
            }
            self.named += 1;
            let id = format!("disk{}", self.named);
            self.all.push(Known { key: source.key, id: id.clone(), users: 1 });
            ids.push(id.clone());
            let (read_only, shared) = (source.key.read_only, source.shared);
            devices.push(Device::Disk(Disk { id, file, read_only, shared }));
        }
        Ok((ids, devices))
    }

    /// A container has gone; tells which disks nobody uses any more.
    pub(crate) fn release(&mut self, ids: &[String]) -> Vec<String> {
        for known in self.all.iter_mut().filter(|known| ids.contains(&known.id)) {
            known.users = known.users.saturating_sub(1);
        }
        let gone = self.all.iter().filter(|known| known.users == 0).map(|known| known.id.clone()).collect();
        self.all.retain(|known| known.users > 0);
        gone
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
        let (ids, devices) = disks.assign(&mut [source(true), source(false)]).expect("assigned");
        assert_eq!((ids.as_slice(), devices.len()), (["disk1".to_owned(), "disk2".to_owned()].as_slice(), 2));
        let (again, devices) = disks.assign(&mut [source(false)]).expect("assigned");
        assert_eq!((again.as_slice(), devices.len()), (["disk2".to_owned()].as_slice(), 0));
        assert_eq!(disks.release(&ids), ["disk1"]);
        assert_eq!(disks.release(&again), ["disk2"]);
        assert_eq!(disks.assign(&mut [source(true)]).expect("assigned").0, ["disk3"]);
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
