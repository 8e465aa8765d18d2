//! Mounts and mount points: how they go without anybody's data going with them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// Unmounts everything at or below `path`, the newest first.
pub(crate) fn unmount_tree(path: &Path) -> io::Result<()> {
    for point in mount_points(path)?.into_iter().rev() {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // gone already: propagation may have taken it with another
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Mount points at or below `path`, in the order in which they were mounted (proc_pid_mountinfo(5)).
pub(crate) fn mount_points(path: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(path))
        .collect())
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
}
