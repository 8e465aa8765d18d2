//! Disks that are persistent memory of the guest (virtio-pmem): QEMU maps the file, and the guest's accesses are the host's
//! page cache. Pure, but for the lock.
//!
//! No QEMU gives such a device back while it runs, so a disk of this kind stays as long as the VM.

use nix::fcntl::{FcntlArg, fcntl};
use serde_json::json;

use super::device::{Options, at};
use super::disk::node_name;
use super::pci::Slot;
use crate::{Disk, Error};

/// The guest's kernel takes a multiple of this.
const BLOCK: u64 = 2 << 20;
/// So many times its own memory a guest can have of it: it pays 64 bytes of its memory for each 4 KiB, an eighth then.
const TIMES: u64 = 8;
/// A vhost-user daemon has the guest's memory in eight pieces at least, of which the memory itself is up to three.
const MOST: usize = 4;

/// And no more than this: processors have 40 bits for addresses under TCG, and not many more elsewhere.
const MOST_BYTES: u64 = 256 << 30;

/// How much of it a VM of this size can have, bytes.
pub(super) fn room(memory_mib: u64) -> u64 {
    memory_mib.saturating_mul(TIMES << 20).min(MOST_BYTES)
}

/// Why a disk of `bytes` cannot be memory where `used` are already, each of so many bytes.
pub(super) fn obstacle(bytes: u64, room: u64, used: impl Iterator<Item = u64>) -> Option<String> {
    let (count, sum) = used.fold((0, 0_u64), |(count, sum), one| (count + 1, sum.saturating_add(one)));
    if !bytes.is_multiple_of(BLOCK) {
        return Some(format!("its size, {bytes} bytes, is not a multiple of 2 MiB"));
    }
    if count >= MOST {
        return Some(format!("the VM has {count} already, of at most {MOST}"));
    }
    let all = sum.saturating_add(bytes);
    (all > room).then(|| format!("all together would have {all} bytes, and the VM has address space for {room}"))
}

/// For `-m`: the addresses must be set aside at the start.
pub(super) fn size(memory_mib: u64, room: u64) -> String {
    match room.div_ceil(1 << 20) {
        0 => format!("{memory_mib}M"),
        // what lies between two that do not follow each other
        more => format!("{memory_mib}M,maxmem={}M", memory_mib.saturating_add(more).saturating_add(MOST as u64 * 2)),
    }
}

/// The file; QEMU opens it once more through the descriptor that it has, `fd`.
pub(super) fn backend(disk: &Disk, fd: i64) -> Options {
    file(&node_name(&disk.id), &format!("/proc/self/fd/{fd}"), disk.bytes, disk.read_only)
}

/// A file as memory. One that is only read is no memory that anything could write: what a guest writes there is gone.
pub(super) fn file(id: &str, path: &str, bytes: u64, read_only: bool) -> Options {
    let mut options = vec![
        ("qom-type", json!("memory-backend-file")),
        ("id", json!(id)),
        ("mem-path", json!(path)),
        ("size", json!(bytes)),
        ("share", json!(true)),
    ];
    if read_only {
        options.push(("readonly", json!(true)));
    }
    Options(options)
}

/// The guest's side.
pub(super) fn device(id: &str, backend: &str, place: Option<Slot>) -> Options {
    let mut options = vec![("driver", json!("virtio-pmem-pci")), ("id", json!(id)), ("memdev", json!(backend))];
    at(&mut options, place);
    Options(options)
}

/// QEMU's lock of a file that is a disk, which it does not take for one that is memory: bytes from 100 for what its holder
/// does, from 200 for what it lets nobody else do. Held by the open file, so for as long as QEMU has it.
const DOES: i64 = 100;
const FORBIDS: i64 = 200;
/// Among what is done: reading what is right, writing.
const READS: i64 = 0;
const WRITES: i64 = 1;
/// Changing the size.
const RESIZES: i64 = 3;

/// Takes it, if what the disk is for does not suffer others.
pub(super) fn lock(disk: &Disk) -> Result<(), Error> {
    if disk.shared {
        return Ok(());
    }
    let does: &[i64] = if disk.read_only { &[READS] } else { &[READS, WRITES] };
    let forbids = [WRITES, RESIZES];
    let own = does.iter().map(|one| DOES + one).chain(forbids.iter().map(|one| FORBIDS + one));
    let others = does.iter().map(|one| FORBIDS + one).chain(forbids.iter().map(|one| DOES + one));
    let failed = || Error::system("locking the file of a disk");
    for byte in own {
        fcntl(&disk.file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))).map_err(failed())?;
    }
    // both look after they have locked: one at least sees the other
    for byte in others {
        let mut found = range(libc::F_WRLCK, byte);
        fcntl(&disk.file, FcntlArg::F_OFD_GETLK(&mut found)).map_err(failed())?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            return Err(Error::InUse { device: disk.id.clone() });
        }
    }
    Ok(())
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_memory_says_why() {
        let mib = |count: u64| count << 20;
        let of = |bytes, used: &[u64]| obstacle(bytes, room(128), used.iter().copied());
        assert_eq!(of(mib(1024), &[]), None);
        assert_eq!(of(mib(512), &[mib(512)]), None);
        for (bytes, used, why) in [
            (mib(3), &[][..], "not a multiple of 2 MiB"),
            (mib(1026), &[], "1075838976 bytes, and the VM has address space for 1073741824"),
            (mib(2), &[mib(1024)], "1075838976 bytes"),
            (u64::MAX - (mib(2) - 1), &[mib(2)], "has address space for"),
            (mib(2), &[mib(2); MOST], "of at most 4"),
        ] {
            let told = of(bytes, used).expect("an obstacle");
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn addresses_are_set_aside_for_those_who_need_them() {
        assert_eq!(size(512, 0), "512M");
        assert_eq!(size(512, room(512)), "512M,maxmem=4616M");
        assert_eq!(room(1 << 20), 256 << 30);
    }

    #[test]
    fn two_who_write_are_one_too_many() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let disk = |read_only: bool, shared: bool| {
            let file = std::fs::File::options().read(true).write(!read_only).open(file.path()).expect("opened");
            Disk { id: "disk1".into(), file: file.into(), bytes: BLOCK, read_only, shared }
        };
        let first = disk(false, false);
        lock(&first).expect("free");
        // the same open file is no other
        lock(&Disk { file: first.file.try_clone().expect("again"), ..disk(false, false) }).expect("its own");
        for read_only in [false, true] {
            assert!(matches!(lock(&disk(read_only, false)), Err(Error::InUse { .. })), "read-only: {read_only}");
        }
        lock(&disk(false, true)).expect("others may write that");
        drop(first);
        let readers = [disk(true, false), disk(true, false)];
        readers.iter().try_for_each(lock).expect("any number may read");
        assert!(matches!(lock(&disk(false, false)), Err(Error::InUse { .. })));
    }
}
