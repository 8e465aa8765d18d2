//! Kernel and initrd as QEMU reads them: copies in memory that are given back once the guest runs.
//!
//! QEMU maps these files, copies them into the guest, and keeps the mappings: about 25 MiB that nobody reads again, in
//! every VM. A mapping of an anonymous file can be emptied from outside; and QEMU opens no path for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// An anonymous file with one of them in it.
#[derive(Debug)]
pub(super) struct BootFile {
    memory: OwnedFd,
    size: i64,
}

impl BootFile {
    /// Copies `file`; blocks for some milliseconds.
    pub(super) fn new(file: &Path) -> io::Result<Self> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
        let mut from = File::open(file).map_err(named)?;
        let mut memory = File::from(memfd_create(c"boot", MFdFlags::MFD_CLOEXEC)?);
        let size = io::copy(&mut from, &mut memory)?;
        Ok(Self { memory: memory.into(), size: i64::try_from(size).map_err(io::Error::other)? })
    }

    /// For a child to inherit, and where the child opens it.
    pub(super) fn share(&self) -> io::Result<(OwnedFd, String)> {
        let shared = self.memory.try_clone()?;
        let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
        Ok((shared, path))
    }

    /// Empties it, and thereby QEMU's mapping (fallocate(2), `FALLOC_FL_PUNCH_HOLE`).
    pub(super) fn give_back(&self) -> io::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // a last page that is only partly in the hole would stay
        Ok(fallocate(&self.memory, hole, 0, self.size.saturating_add(1 << 20))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn holds_the_file_until_it_is_given_back() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        io::Write::write_all(&mut file, &vec![7; 100_000]).expect("written");
        let copy = BootFile::new(file.path()).expect("copied");
        let (_shared, path) = copy.share().expect("shared");
        assert_eq!(std::fs::read(&path).expect("read"), vec![7; 100_000]);
        copy.give_back().expect("emptied");
        let meta = std::fs::metadata(&path).expect("still there");
        assert_eq!((meta.len(), meta.blocks()), (100_000, 0));
        let error = BootFile::new(Path::new("/no/such/kernel")).expect_err("missing");
        assert!(error.to_string().starts_with("/no/such/kernel: "), "{error}");
    }
}
