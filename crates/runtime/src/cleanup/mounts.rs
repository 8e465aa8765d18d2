//! Mounts and mount points: how they go without anybody's data going with them.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

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

/// Mount points at or below `path`, in the order in which they were mounted (proc_pid_mountinfo(5)).
pub(crate) fn mount_points(path: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(table()?.lines().filter_map(Row::read).map(|row| row.point).filter(|point| point.starts_with(path)).collect())
}

/// Those of them that can be written through.
pub(crate) fn writable_mount_points(path: &Path) -> io::Result<Vec<PathBuf>> {
    let table = table()?;
    let rows = table.lines().filter_map(Row::read);
    Ok(rows.filter(|row| row.is_writable && row.point.starts_with(path)).map(|row| row.point).collect())
}

/// Where in its file system something is that the kernel shows as `shown` through the mount of this number.
pub(crate) fn path_in_file_system(mount: u64, shown: &Path) -> io::Result<Option<PathBuf>> {
    let table = table()?;
    let Some(row) = table.lines().filter_map(Row::read).find(|row| row.id == mount) else { return Ok(None) };
    let Ok(below) = shown.strip_prefix(&row.point) else { return Ok(None) };
    // joining nothing would add a slash
    Ok(Some(if below.as_os_str().is_empty() { row.root } else { row.root.join(below) }))
}

fn table() -> io::Result<String> {
    fs::read_to_string("/proc/self/mountinfo")
}

/// A line of it.
struct Row {
    id: u64,
    /// Which folder of the file system is mounted.
    root: PathBuf,
    point: PathBuf,
    is_writable: bool,
}

impl Row {
    fn read(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let id = fields.next()?.parse().ok()?;
        let root = unescape(fields.nth(2)?).into();
        let point = unescape(fields.next()?).into();
        let is_writable = fields.next()?.split(',').any(|option| option == "rw");
        Some(Self { id, root, point, is_writable })
    }
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(code) = code {
            out.push(char::from(code));
            rest = &rest[at + 4..];
        } else {
            out.push('\\');
            rest = &rest[at + 1..];
        }
    }
    out + rest
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
    Err(io::Error::other(format!("{} is not a mount point of ours", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_escapes_are_read() {
        assert_eq!(unescape(r"/a\040b\134c\9"), r"/a b\c\9");
    }

    #[test]
    fn a_row_is_read() {
        let line = r"36 35 98:0 /vol\0401 /run/a rw,noatime master:1 - ext4 /dev/root ro,errors=continue";
        let row = Row::read(line).expect("a row");
        assert_eq!((row.id, row.is_writable), (36, true));
        assert_eq!((row.root, row.point), ("/vol 1".into(), "/run/a".into()));
        assert!(Row::read("").is_none());
    }

    #[test]
    fn nothing_below_a_mount_is_named() {
        let points = ["/m", "/m/v", "/m/v/deep/er", "/mx", "/m"].map(PathBuf::from);
        assert_eq!(tops(&points), [&points[0], &points[3], &points[4]]);
        assert_eq!(tops(&points[1..4]), [&points[1], &points[3]]);
    }
}
