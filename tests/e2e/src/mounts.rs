//! Mounts that something has left below folders of ours.

use nix::mount::{MntFlags, umount2};
use std::{fs, path::PathBuf};

/// Takes them off, the newest first.
pub fn unmount_below(folders: &[PathBuf]) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let mut below: Vec<_> =
        points.filter(|point| folders.iter().any(|dir| PathBuf::from(point).starts_with(dir))).collect();
    below.reverse();
    for point in below {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
}
