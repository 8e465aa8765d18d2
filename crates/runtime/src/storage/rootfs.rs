//! A container's root file system, brought into the shared folder.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::assemble;
use super::layers;
use super::tree::{self, How};
use crate::Error;
use crate::cleanup::Journal;
use crate::host_work::Progress;
pub(crate) use crate::request::RootfsMount;

/// Mounts what containerd gave, or binds `bundle_root` when it gave nothing, on `target`. What must be mounted before goes
/// below `layers`.
pub(crate) fn connect(
    mounts: &[RootfsMount],
    bundle_root: &Path,
    target: &Path,
    layers: &Path,
    journal: &Journal,
    progress: &Progress,
) -> Result<(), Error> {
    fs::create_dir_all(target).map_err(Error::host(target.display().to_string()))?;
    if mounts.is_empty() {
        progress.step(format!("rootfs {} of the container", bundle_root.display()))?;
        let meta = fs::metadata(bundle_root)
            .map_err(Error::host(format!("rootfs {} of the container", bundle_root.display())))?;
        if !meta.is_dir() {
            return Err(Error::Invalid(format!("rootfs {} is not a folder", bundle_root.display())));
        }
        return tree::copy(bundle_root, target, How { recursive: true, ..How::default() });
    }
    let shown: Vec<_> = mounts.iter().map(|one| format!("{} {}", one.kind, one.source)).collect();
    progress.step(format!("the container's rootfs ({})", shown.join(", ")))?;
    if let Some(parts) = layers::understand(mounts)? {
        return assemble::on_host(&parts, layers, target, journal);
    }
    for one in mounts {
        mount_one(one, target)?;
    }
    Ok(())
}

fn mount_one(from: &RootfsMount, target: &Path) -> Result<(), Error> {
    let (flags, data) = parse(&from.options);
    let what = || format!("mounting the rootfs ({} {} on {})", from.kind, from.source, target.display());
    let data = data.join(",");
    mount(Some(from.source.as_str()), target, Some(from.kind.as_str()), flags, Some(data.as_str()))
        .map_err(Error::host(what()))?;
    if flags.contains(MsFlags::MS_BIND) && flags.intersects(MsFlags::MS_RDONLY) {
        let again = flags | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, again, None::<&str>).map_err(Error::host(what()))?;
    }
    Ok(())
}

/// Splits fstab options into mount flags and what the file system itself reads.
pub(super) fn parse(options: &[String]) -> (MsFlags, Vec<&str>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "defaults" => {}
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            other => data.push(other),
        }
    }
    (flags, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split() {
        let options: Vec<String> = ["ro", "lowerdir=/a:/b", "rbind"].map(String::from).into();
        let (flags, data) = parse(&options);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(data, ["lowerdir=/a:/b"]);
    }
}
