//! Pages of a saved memory that are zeros take no room: a hole reads the same, and no clone has to copy it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use hypervisor::next_data;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

const PAGE: usize = 4096;
/// Read at once, bytes.
const CHUNK: usize = 256 << 10;
/// Shorter runs of zeros, bytes, cost a copier more in calls than in bytes.
const SHORTEST: i64 = 4 * PAGE as i64;

/// Makes holes of them. On a file system without holes it stays as it was.
pub(super) fn punch(file: &File) -> io::Result<()> {
    let mut at = 0;
    while let Some((begin, end)) = next_data(file, at)? {
        at = end;
        for (begin, length) in runs(file, begin, end)? {
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match fallocate(file, how, begin, length) {
                Err(Errno::EOPNOTSUPP) => return Ok(()),
                done => done?,
            }
        }
    }
    Ok(())
}

/// Where there are enough zeros between `begin` and `end`, and how many bytes.
fn runs(file: &File, begin: i64, end: i64) -> io::Result<Vec<(i64, i64)>> {
    let mut found = Vec::new();
    let (mut from, mut at) = (begin, begin);
    let mut chunk = vec![0; CHUNK];
    let mut close = |from: i64, to: i64| {
        if to - from >= SHORTEST {
            found.push((from, to - from));
        }
    };
    while at < end {
        let count = CHUNK.min(usize::try_from(end - at).map_err(io::Error::other)?);
        file.read_exact_at(&mut chunk[..count], u64::try_from(at).map_err(io::Error::other)?)?;
        for page in chunk[..count].chunks(PAGE) {
            at += page.len() as i64;
            if page.iter().any(|byte| *byte != 0) {
                close(from, at - page.len() as i64);
                from = at;
            }
        }
    }
    close(from, end);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn zeros_become_holes_and_nothing_else_changes() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        let mut bytes = vec![0; 3 << 20];
        bytes[5000] = 1;
        // too few zeros between these
        bytes[(1 << 20) + 1] = 2;
        bytes[(1 << 20) + 2 * PAGE] = 3;
        file.write_all_at(&bytes, 1 << 20).expect("written");
        file.set_len(8 << 20).expect("long");
        let before = file.metadata().expect("metadata").blocks();
        punch(&file).expect("punched");
        let mut after = vec![1; 8 << 20];
        file.read_exact_at(&mut after, 0).expect("read");
        assert!(after[1 << 20..4 << 20] == bytes && after[..1 << 20].iter().all(|byte| *byte == 0));
        assert!(after[4 << 20..].iter().all(|byte| *byte == 0));
        let blocks = file.metadata().expect("metadata").blocks();
        // two at the beginning and three around one that is not worth a hole
        assert_eq!((before, blocks), (3 << 11, 5 * 8));
    }
}
