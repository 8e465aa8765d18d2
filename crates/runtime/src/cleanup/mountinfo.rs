//! The kernel's list of mounts (proc_pid_mountinfo(5)). It holds names that guests give to folders of theirs, in any bytes.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// All mounts, in the order in which they were mounted.
#[derive(Debug, Default)]
pub(crate) struct MountTable(Vec<Row>);

/// One of them.
#[derive(Debug)]
pub(crate) struct Row {
    /// The kernel's number of it.
    id: u64,
    /// The file system, as `major:minor`.
    device: OsString,
    /// Which folder of it is mounted.
    root: PathBuf,
    point: PathBuf,
    is_writable: bool,
}

/// A path in a file system, whatever is mounted where.
pub(crate) type MountedPath = (OsString, PathBuf);

impl MountTable {
    /// As it is now.
    pub(crate) fn read() -> io::Result<Self> {
        let table = fs::read("/proc/self/mountinfo")?;
        Ok(Self(table.split(|byte| *byte == b'\n').filter_map(Row::parse).collect()))
    }

    /// Mount points at or below `path`.
    pub(crate) fn points_below(&self, path: &Path) -> Vec<PathBuf> {
        self.0.iter().map(|row| &row.point).filter(|point| point.starts_with(path)).cloned().collect()
    }

    /// What is mounted there for writing.
    pub(crate) fn written_below(&self, path: &Path) -> impl Iterator<Item = MountedPath> {
        let rows = self.0.iter().filter(move |row| row.is_writable && row.point.starts_with(path));
        rows.map(|row| (row.device.clone(), row.root.clone()))
    }

    /// Where something is that the kernel shows as `shown` through the mount of this number; `None` when it is gone.
    pub(crate) fn place(&self, mount: u64, shown: &Path) -> Option<MountedPath> {
        let row = self.0.iter().find(|row| row.id == mount)?;
        let below = shown.strip_prefix(&row.point).ok()?;
        // joining nothing would add a slash
        let path = if below.as_os_str().is_empty() { row.root.clone() } else { row.root.join(below) };
        Some((row.device.clone(), path))
    }
}

impl Row {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let device = OsString::from_vec(fields.nth(1)?.to_vec());
        let root = path(fields.next()?);
        let point = path(fields.next()?);
        let is_writable = fields.next()?.split(|byte| *byte == b',').any(|option| option == b"rw");
        Some(Self { id, device, root, point, is_writable })
    }
}

/// Space, tab, newline and backslash are written as three octal digits.
fn path(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(code) = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            out.push(code);
            rest = &after[3..];
        } else {
            out.push(*first);
            rest = after;
        }
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_row_is_read() {
        let line = b"36 35 98:0 /vol\\0401 /run/a\xff rw,noatime master:1 - ext4 /dev/root ro,errors=continue";
        let row = Row::parse(line).expect("a row");
        assert_eq!((row.id, row.is_writable), (36, true));
        assert_eq!((row.root.as_path(), row.device.as_os_str()), (Path::new("/vol 1"), OsStr::new("98:0")));
        assert_eq!(row.point.as_os_str(), OsStr::from_bytes(b"/run/a\xff"));
        let table = MountTable(vec![row]);
        let below = Path::new(OsStr::from_bytes(b"/run/a\xff/b"));
        assert_eq!(table.place(36, below), Some(("98:0".into(), "/vol 1/b".into())));
        assert_eq!(table.place(36, Path::new("/run")), None);
        assert_eq!(table.written_below(Path::new("/run")).count(), 1);
        assert!(Row::parse(b"").is_none());
    }

    #[test]
    fn octal_escapes_are_read() {
        assert_eq!(path(br"/a\040b\134c\9"), Path::new(r"/a b\c\9"));
        assert_eq!(path(br"\377").as_os_str().as_bytes(), b"\xff");
    }
}
