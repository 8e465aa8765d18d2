//! Volumes that the VM has of its own in place of the host's, because they live and end with the pod anyway: emptyDirs
//! in memory and on huge pages, and those on disk where the configuration says so (`disable_guest_empty_dir`).
//!
//! They are told from others by kubelet's paths. A part of one (`subPath`), which kubelet makes on the host and binds
//! elsewhere, is found again by its place in the volume's file system.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use agent_api::agent::Storage;
use agent_api::{oci, paths};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC};

use super::kubelet;
use super::shelf::Shelf;
use super::source::{GuestWritable, Source};
use crate::Error;

/// Larger sizes of a file system mean that it has none.
const UNLIMITED: u64 = 1 << 50;

/// What decides whether and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// emptyDirs on disk are the VM's own too.
    pub(crate) on_disk: bool,
    pub(crate) writable: &'a GuestWritable,
    pub(crate) huge_pages: &'a [oci::LinuxHugepageLimit],
}

/// One in the guest.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) path: String,
    /// What the guest makes before; it keeps what is there already.
    pub(crate) storages: Vec<Storage>,
}

/// The VM's own volume for `source`, which is open by `path`; `None` for one that is to be shared.
pub(crate) fn place(
    path: &Path,
    source: &Source,
    wanted: Wanted<'_>,
    shelf: &mut Shelf,
) -> Result<Option<Local>, Error> {
    if let Some(storage) = whole(path, source, wanted, shelf)? {
        return Ok(Some(Local { path: storage.mount_point.clone(), storages: vec![storage] }));
    }
    part(path, source, wanted, shelf)
}

fn whole(path: &Path, source: &Source, wanted: Wanted<'_>, shelf: &mut Shelf) -> Result<Option<Storage>, Error> {
    if !kubelet::is_empty_dir(path) || !source.kind().is_dir() {
        return Ok(None);
    }
    let named = |error| Error::host(path.display().to_string())(error);
    let (kind, size) = source.file_system().map_err(named)?;
    // kubelet's own mount, not a folder of a host whose disk is memory
    let is_mount = source.path_in_file_system().map_err(named)? == Path::new("/");
    let limit = (1..UNLIMITED).contains(&size).then_some(size);
    let mut storage = match kind {
        TMPFS_MAGIC if is_mount => memory(limit),
        HUGETLBFS_MAGIC if is_mount => huge_pages(path, source, limit, wanted.huge_pages)?,
        _ if wanted.on_disk => {
            Storage { driver: "local".into(), source: "local".into(), fstype: "local".into(), ..Default::default() }
        }
        _ => return Ok(None),
    };
    let folder = if storage.driver == "local" { paths::SANDBOX_LOCAL } else { paths::SANDBOX_EPHEMERAL };
    storage.options.extend(owner(source));
    storage.mount_point = format!("{folder}/{}", shelf.local(path, source));
    storage.shared = true;
    Ok(Some(storage))
}

fn memory(limit: Option<u64>) -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options: limit.map(|size| format!("size={size}")).into_iter().collect(),
        ..Default::default()
    }
}

fn huge_pages(
    path: &Path,
    source: &Source,
    limit: Option<u64>,
    limits: &[oci::LinuxHugepageLimit],
) -> Result<Storage, Error> {
    let page = source.block_size().map_err(Error::host(path.display().to_string()))?;
    // kubelet's mount has no size: the container's limit on such pages is what it may use
    let size = limit.or_else(|| limits.iter().find(|limit| bytes(&limit.Pagesize) == Some(page)).map(|one| one.Limit));
    let size = size.filter(|size| (1..UNLIMITED).contains(size)).ok_or_else(|| {
        Error::Unsupported(format!(
            "volume {} has huge pages of {page} bytes without a size: set a limit for them on the container (hugepages-2Mi, hugepages-1Gi), so that the VM can reserve them",
            path.display()
        ))
    })?;
    Ok(Storage {
        driver: "ephemeral".into(),
        source: "nodev".into(),
        fstype: "hugetlbfs".into(),
        options: vec![format!("pagesize={page}"), format!("size={size}")],
        ..Default::default()
    })
}

/// A page size as the OCI specification writes it: `64KB`, `2MB`, `1GB`, in powers of 1024.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|letter: char| !letter.is_ascii_digit())?);
    let shift = ["B", "KB", "MB", "GB"].iter().position(|one| *one == unit)? * 10;
    number.parse::<u64>().ok()?.checked_shl(u32::try_from(shift).ok()?)
}

/// As kubelet made it: with fsGroup's owner and bits.
fn owner(source: &Source) -> [String; 3] {
    let meta = source.meta();
    [format!("mode={:o}", meta.mode() & 0o7777), format!("uid={}", meta.uid()), format!("gid={}", meta.gid())]
}

fn part(path: &Path, source: &Source, wanted: Wanted<'_>, shelf: &mut Shelf) -> Result<Option<Local>, Error> {
    let Some(above) = kubelet::empty_dir_of_subpath(path) else { return Ok(None) };
    // then it is a part of another kind of volume
    let Ok(volume) = Source::open(&above, wanted.writable) else { return Ok(None) };
    if volume.device_and_inode().0 != source.device_and_inode().0 {
        return Ok(None);
    }
    let Some(storage) = whole(&above, &volume, wanted, shelf)? else { return Ok(None) };
    let place = |one: &Source| one.path_in_file_system().map_err(Error::host(path.display().to_string()));
    let (inner, outer) = (place(source)?, place(&volume)?);
    let Ok(rest) = inner.strip_prefix(&outer) else { return Ok(None) };
    let rest = rest.to_str().ok_or_else(|| {
        Error::Unsupported(format!("the path of {} in its volume is not UTF-8: rename it", path.display()))
    })?;
    if rest.is_empty() {
        return Ok(Some(Local { path: storage.mount_point.clone(), storages: vec![storage] }));
    }
    let folder = Storage {
        driver: "local".into(),
        source: "local".into(),
        fstype: "local".into(),
        options: owner(source).into(),
        mount_point: format!("{}/{rest}", storage.mount_point),
        shared: true,
        ..Default::default()
    };
    Ok(Some(Local { path: folder.mount_point.clone(), storages: vec![storage, folder] }))
}

/// File systems that are never shared as files.
pub(crate) fn is_huge(kind: FsType) -> bool {
    kind == HUGETLBFS_MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_read() {
        assert_eq!(bytes("2MB"), Some(2 << 20));
        assert_eq!(bytes("1GB"), Some(1 << 30));
        assert_eq!(bytes("64KB"), Some(64 << 10));
        for wrong in ["", "MB", "2", "2XB", "99999999999999999999MB"] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_empty_dir_on_disk_is_the_vms_own_only_where_it_was_asked_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pods/u/volumes/kubernetes.io~empty-dir/scratch");
        std::fs::create_dir_all(path.join("part")).expect("made");
        let writable = GuestWritable::default();
        let source = Source::open(&path, &writable).expect("opened");
        let mut shelf = Shelf::default();
        let wanted = Wanted { on_disk: false, writable: &writable, huge_pages: &[] };
        assert!(place(&path, &source, wanted, &mut shelf).expect("looked at").is_none());
        let wanted = Wanted { on_disk: true, ..wanted };
        let local = place(&path, &source, wanted, &mut shelf).expect("looked at").expect("local");
        assert_eq!(local.path, format!("{}/scratch", paths::SANDBOX_LOCAL));
        assert_eq!(local.storages[0].driver, "local");
        // a folder below it is no volume by itself
        let source = Source::open(&path.join("part"), &writable).expect("opened");
        assert!(place(&path.join("part"), &source, wanted, &mut shelf).expect("looked at").is_none());
    }
}
