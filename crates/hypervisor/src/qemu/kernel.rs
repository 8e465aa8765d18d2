//! The kernel as QEMU reads it: a copy in memory that is given back once the guest runs.
//!
//! QEMU maps the kernel's file, copies it into the guest, and keeps the mapping: about 20 MiB that nobody reads again,
//! in every VM. A mapping of an anonymous file can be emptied from outside; and QEMU opens no path for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// An anonymous file with the kernel in it.
#[derive(Debug)]
pub(super) struct KernelCopy {
    memory: OwnedFd,
    size: i64,
}

impl KernelCopy {
    /// Copies `kernel`; blocks for some milliseconds.
    pub(super) fn new(kernel: &Path) -> io::Result<Self> {
        let mut from = File::open(kernel)?;
        let mut memory = File::from(memfd_create(c"kernel", MFdFlags::MFD_CLOEXEC)?);
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
    fn holds_the_kernel_until_it_is_given_back() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        io::Write::write_all(&mut file, &vec![7; 100_000]).expect("written");
        let copy = KernelCopy::new(file.path()).expect("copied");
        let (_shared, path) = copy.share().expect("shared");
        assert_eq!(std::fs::read(&path).expect("read"), vec![7; 100_000]);
        copy.give_back().expect("emptied");
        let meta = std::fs::metadata(&path).expect("still there");
        assert_eq!((meta.len(), meta.blocks()), (100_000, 0));
    }
}
