//! Mounts and mount points: how they go without anybody's data going with them.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::mountinfo::MountTable;

/// Unmounts everything at or below `path`.
///
/// Only what is below no other of them is named to the kernel, which takes off what is mounted on it with it: the way to
/// a mount below a volume leads through folders that the guest may turn into links at any moment.
pub(crate) fn unmount_tree(path: &Path) -> io::Result<()> {
    for point in tops(&mount_points(path)?).into_iter().rev() {
        match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // gone already: propagation may have taken it with another
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Those that are not below others; as often as something is mounted there.
fn tops(points: &[PathBuf]) -> Vec<&PathBuf> {
    let all: HashSet<&Path> = points.iter().map(PathBuf::as_path).collect();
    points.iter().filter(|point| !point.ancestors().skip(1).any(|above| all.contains(above))).collect()
}

/// Mount points at or below `path`, in the order in which they were mounted.
pub(crate) fn mount_points(path: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(MountTable::read()?.points_below(path))
}

/// Removes empty folders and empty files on one file system; anything else stays and is an error.
pub(crate) fn remove_mount_points(path: &Path) -> io::Result<()> {
    // a volume may be of the same file system as its mount point
    if let Some(point) = mount_points(path)?.first() {
        return Err(io::Error::other(format!("{} is still mounted", point.display())));
    }
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    remove_empty(path, &meta, meta.dev())
}

fn remove_empty(path: &Path, meta: &fs::Metadata, device: u64) -> io::Result<()> {
    if meta.dev() != device {
        return Err(io::Error::other(format!("{} is still mounted", path.display())));
    }
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            remove_empty(&entry.path(), &entry.metadata()?, device)?;
        }
        return fs::remove_dir(path);
    }
    if meta.is_file() && meta.len() == 0 {
        return fs::remove_file(path);
    }
    Err(io::Error::other(format!(
        "{} is neither an empty folder nor an empty file, so it is not removed",
        path.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_below_a_mount_is_named() {
        let points = ["/m", "/m/v", "/m/v/deep/er", "/mx", "/m"].map(PathBuf::from);
        assert_eq!(tops(&points), [&points[0], &points[3], &points[4]]);
        assert_eq!(tops(&points[1..4]), [&points[1], &points[3]]);
    }
}
