//! Mounts that something has left below folders of ours.

use nix::mount::{MntFlags, umount2};
use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt as _, path::PathBuf};

/// The kernel's list for this thread, which may have a namespace of its own, whatever bytes a container has named its folders with.
pub fn table() -> Vec<u8> {
    fs::read("/proc/thread-self/mountinfo").unwrap_or_default()
}

/// Takes them off, the newest first.
pub fn unmount_below(folders: &[PathBuf]) {
    let table = table();
    let points = table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let points = points.map(|point| PathBuf::from(OsString::from_vec(point.to_vec())));
    let mut below: Vec<_> = points.filter(|point| folders.iter().any(|dir| point.starts_with(dir))).collect();
    below.reverse();
    for point in below {
        let _ = umount2(&point, MntFlags::MNT_DETACH);
    }
}
