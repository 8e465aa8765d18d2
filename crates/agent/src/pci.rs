//! Where a PCI device is in sysfs, from its path in Kata's form: slots from the root bus on.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Where the root bus is in sysfs.
pub(crate) const ROOT: &str = "/sys/devices/pci0000:00";
/// Most bridges on the way to a device.
const DEEPEST: usize = 8;

/// Slots from the root bus on, each with its function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slots(Vec<(u8, u8)>);

impl Slots {
    /// `02/1f.3`: slots in hexadecimal, each with a function where that is not 0.
    pub(crate) fn parse(path: &str) -> Result<Self, Error> {
        let number = |text: &str, digits: usize, most: u8| {
            let plain = (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(text, 16).ok().filter(|number| plain && *number <= most)
        };
        let slot = |text: &str| {
            let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
            Some((number(slot, 2, 0x1f)?, number(function, 1, 7)?))
        };
        let slots: Option<Vec<_>> = path.split('/').take(DEEPEST + 1).map(slot).collect();
        slots
            .filter(|slots| slots.len() <= DEEPEST)
            .map(Self)
            .ok_or_else(|| Error::Invalid(format!("invalid PCI path {path:.80?}: must be like 02/1f")))
    }

    /// Its folder in sysfs.
    pub(crate) fn device(&self, root: &Path) -> Option<PathBuf> {
        // domain and bus are the kernel's choice
        self.0.iter().try_fold(root.to_owned(), |device, (slot, function)| {
            entry(&device, |name| name.ends_with(&format!(":{slot:02x}.{function}")))
        })
    }

    /// What the device there is for the subsystem `class`, such as `net` or `block`; a virtio device's is one below.
    pub(crate) fn find(&self, root: &Path, class: &str) -> Option<std::ffi::OsString> {
        let device = self.device(root)?;
        let owner =
            if device.join(class).is_dir() { device } else { entry(&device, |name| name.starts_with("virtio"))? };
        let owner = if owner.join(class).is_dir() { owner } else { memory(&owner)? };
        entry(&owner.join(class), |_| true)?.file_name().map(ToOwned::to_owned)
    }
}

/// Where persistent memory is a disk, below its device.
fn memory(device: &Path) -> Option<PathBuf> {
    ["ndbus", "region", "namespace"].iter().try_fold(device.to_owned(), |at, part| {
        entry(&at, |name| name.starts_with(part) && name.ends_with(|last: char| last.is_ascii_digit()))
    })
}

/// The first entry of a folder that is wanted.
pub(crate) fn entry(folder: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries.into_iter().find(|entry| entry.file_name().to_str().is_some_and(&wanted)).map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_card_is_found_behind_its_bridge() {
        let root = tempfile::tempdir().expect("a folder");
        for path in [
            "0000:00:02.0/0000:01:02.0/virtio3/net/eth1",
            "0000:00:03.0/virtio0/net/eth0",
            "0000:00:04.1/net/enp4",
            "0000:00:02.0/0000:01:05.0/virtio4/block/vda",
            "0000:00:02.0/0000:01:06.0/virtio5/ndbus1/region1/namespace_seed",
            "0000:00:02.0/0000:01:06.0/virtio5/ndbus1/region1/namespace1.0/block/pmem1",
        ] {
            fs::create_dir_all(root.path().join(path)).expect("made");
        }
        let at = |path: &str, class: &str| {
            let name = Slots::parse(path).expect("a path").find(root.path(), class)?;
            Some(name.to_str().expect("a name").to_owned())
        };
        assert_eq!(at("02/02", "net").as_deref(), Some("eth1"));
        assert_eq!(at("03", "net").as_deref(), Some("eth0"));
        assert_eq!(at("04.1", "net").as_deref(), Some("enp4"));
        assert_eq!(at("02/05", "block").as_deref(), Some("vda"));
        assert_eq!(at("02/06", "block").as_deref(), Some("pmem1"));
        assert_eq!(at("02/02", "block"), None);
        assert_eq!(at("04", "net"), None);
        assert_eq!(at("02/03", "net"), None);
        assert_eq!(at("02", "net"), None);
    }

    #[test]
    fn paths_are_as_katas() {
        assert_eq!(Slots::parse("02/1f.3"), Ok(Slots(vec![(2, 0), (0x1f, 3)])));
        for path in ["/", "20", "1.8", "+1", "../..", "02//01", "0/0/0/0/0/0/0/0/0"] {
            Slots::parse(path).expect_err(path);
        }
    }

    proptest! {
        #[test]
        fn any_path_is_refused_or_understood(path in ".{0,40}") {
            if let Ok(slots) = Slots::parse(&path) {
                prop_assert!((1..=DEEPEST).contains(&slots.0.len()));
            }
        }
    }
}
