//! Volumes that are file systems of the guest's own: how full they are, and how they grow with their disk.
#![allow(unsafe_code, reason = "the ioctl that enlarges an ext4")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use agent_api::csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage, volume_usage::Unit};
use agent_api::paths;
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;

use crate::disk;
use crate::error::Error;

/// `EXT4_IOC_RESIZE_FS`, `_IOW('f', 16, __u64)` of the kernel's fs/ext4.
const EXT4_RESIZE: libc::Ioctl = 0x4008_6610;
/// sysfs counts a disk's size in these.
const SECTOR: u64 = 512;

/// A volume's mount point, open.
fn open(point: &str) -> Result<File, Error> {
    let name = point.strip_prefix(paths::DISKS).and_then(|rest| rest.strip_prefix('/')).unwrap_or_default();
    if name.is_empty() || name.contains('/') || name == ".." {
        return Err(Error::Invalid(format!("{point:.200?} is not the mount point of a volume")));
    }
    File::open(point).map_err(|_| Error::NotFound(format!("volume {point}")))
}

/// Bytes and inodes.
pub(crate) fn stats(point: &str) -> Result<VolumeStatsResponse, Error> {
    let stat = fstatvfs(open(point)?).map_err(Error::failed(point))?;
    let usage = |unit: Unit, factor: u64, total: u64, free: u64, available: u64| VolumeUsage {
        available: available.saturating_mul(factor),
        total: total.saturating_mul(factor),
        used: total.saturating_sub(free).saturating_mul(factor),
        unit: unit.into(),
        ..Default::default()
    };
    Ok(VolumeStatsResponse {
        usage: vec![
            usage(Unit::BYTES, stat.fragment_size(), stat.blocks(), stat.blocks_free(), stat.blocks_available()),
            usage(Unit::INODES, 1, stat.files(), stat.files_free(), stat.files_available()),
        ],
        volume_condition: Some(VolumeCondition::default()).into(),
        ..Default::default()
    })
}

/// Makes a file system as large as its disk, as soon as that has `size` bytes.
pub(crate) async fn grow(point: &str, size: u64, patience: Duration) -> Result<(), Error> {
    let root = open(point)?;
    let kind = fstatfs(&root).map_err(Error::failed(point))?.filesystem_type();
    if kind != EXT4_SUPER_MAGIC {
        return Err(Error::Unsupported(format!("growing volume {point}, whose file system is not ext4,")));
    }
    let device = root.metadata().map_err(Error::failed(point))?.dev();
    let path = format!("/sys/dev/block/{}:{}/size", libc::major(device), libc::minor(device));
    let bytes = || {
        let sectors: u64 = fs::read_to_string(&path).ok()?.trim().parse().ok()?;
        sectors.checked_mul(SECTOR).filter(|bytes| *bytes >= size)
    };
    let bytes = disk::wait(patience, bytes, || {})
        .await?
        .ok_or_else(|| Error::State(format!("the disk of volume {point} did not grow to {size} bytes")))?;
    let block = fstatvfs(&root).map_err(Error::failed(point))?.block_size().max(1);
    let blocks: u64 = bytes / block;
    // SAFETY: an open descriptor and a pointer to a number that lives through the call.
    if unsafe { libc::ioctl(root.as_raw_fd(), EXT4_RESIZE, &raw const blocks) } < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Error::failed(format!("growing volume {point}"))(error));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mount_points_of_disks() {
        for point in
            ["/etc", "/run/kata-containers/disks/", "/run/kata-containers/disks/../x", "/run/kata-containers/disks/.."]
        {
            let error = open(point).expect_err(point);
            assert!(matches!(error, Error::Invalid(_)), "{point}: {error}");
        }
        assert!(matches!(open("/run/kata-containers/disks/disk77"), Err(Error::NotFound(_))));
    }
}
