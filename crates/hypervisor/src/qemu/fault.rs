//! What QEMU means by its words about a disk.

use crate::{Error, Fault};

/// What follows a disk's id in the name of its node ([`super::disk::node_name`]).
const NODE: &str = "-host";

/// Whether QEMU's words say that another has locked the file.
fn is_locked(why: &str) -> bool {
    why.contains("Failed to get") && why.contains("lock")
}

/// The disk that QEMU did not start with, from what it said: `QEMU: -OPTION WITH THE NODE: WHY`.
pub(super) fn find(stderr: &str) -> Option<Fault> {
    stderr.lines().find_map(|line| {
        let (option, why) = line.split_once(": -")?.1.split_once(": ")?;
        // a card has such a node too
        let id = if option.starts_with("netdev") { None } else { node_of(option) }?.to_owned();
        Some(if is_locked(why) { Fault::DiskInUse { id } } else { Fault::Disk { id, why: why.trim().to_owned() } })
    })
}

/// The id before the first node's name.
fn node_of(option: &str) -> Option<&str> {
    option.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).find_map(|word| word.strip_suffix(NODE))
}

/// The same for a disk that was plugged.
pub(super) fn of_disk(id: &str, error: Error) -> Error {
    match error {
        Error::Refused { answer, .. } if is_locked(&answer) => Error::InUse { device: id.to_owned() },
        Error::Refused { call, answer } => Error::Disk { device: id.to_owned(), why: format!("{call}: {answer}") },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_found_in_what_is_said() {
        let locked = "qemu-system-x86_64: -device virtio-blk-pci,id=disk1,drive=disk1-host,werror=report: Failed to get \"write\" lock\n\
                      Is another process using the image [/dev/fdset/1]?\n";
        assert_eq!(find(locked), Some(Fault::DiskInUse { id: "disk1".into() }));
        let refused = "warning: x\nqemu-system-x86_64: -blockdev {\"driver\":\"file\",\"node-name\":\"disk2-host\"}: Could not open \
                       '/dev/fdset/2': Input/output error\n";
        let why = "Could not open '/dev/fdset/2': Input/output error".to_owned();
        assert_eq!(find(refused), Some(Fault::Disk { id: "disk2".into(), why }));
        for other in
            ["", "qemu-system-x86_64: -netdev tap,id=net1-host,fd=7: broken", "qemu-system-x86_64: -accel kvm: no"]
        {
            assert_eq!(find(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_plugged_is_told_by_kind() {
        let refused = |answer: &str| Error::Refused { call: "device_add".into(), answer: answer.into() };
        assert!(matches!(of_disk("disk1", refused("Failed to get shared \"write\" lock")), Error::InUse { .. }));
        assert!(matches!(of_disk("disk1", refused("no")), Error::Disk { .. }));
        assert!(matches!(of_disk("disk1", Error::Gone), Error::Gone));
    }
}
