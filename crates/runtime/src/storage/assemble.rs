//! A root file system of several mounts, put together on the host: where `disable_block_device_use` wants it, or where a
//! part of it is a folder of the host's.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::layers::Part;
use super::loop_device::LoopDevice;
use super::rootfs::parse;
use crate::Error;
use crate::cleanup::{Journal, Step};

/// Mounts the last of `parts` on `target`, the others below `folder`; the folder around it is
/// written down first.
pub(crate) fn on_host(parts: &[Part], folder: &Path, target: &Path, journal: &Journal) -> Result<(), Error> {
    let all = folder.parent().unwrap_or(folder);
    for step in [Step::Staging(all.to_owned()), Step::Mounts(all.to_owned())] {
        journal.push(step).map_err(Error::host("the undo journal"))?;
    }
    let mut points = Vec::new();
    // held, since overlayfs' options have room for one page: short names for long ones
    let mut held = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let part = part.filled(&points)?;
        if number + 1 == parts.len() {
            return mount_part(&part, target);
        }
        let point = folder.join(number.to_string());
        let named = || Error::host(point.display().to_string());
        fs::create_dir_all(&point).map_err(named())?;
        mount_part(&part, &point)?;
        let open = File::open(&point).map_err(named())?;
        points.push(format!("/proc/self/fd/{}", open.as_raw_fd()));
        held.push(open);
    }
    Err(Error::Invalid("the root file system has no mounts".into()))
}

fn mount_part(part: &Part, target: &Path) -> Result<(), Error> {
    let what = || format!("mounting the rootfs ({} {} on {})", part.kind, part.source, target.display());
    for folder in &part.folders {
        match fs::create_dir(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(Error::host(what())(error)),
            _ => {}
        }
    }
    let (mut options, mut loops) = (part.options.clone(), Vec::new());
    let mut device = |path: &str, read_only: bool| -> Result<String, Error> {
        if !fs::metadata(path).map_err(Error::host(what()))?.is_file() {
            return Ok(path.to_owned());
        }
        let made = LoopDevice::new(Path::new(path), read_only)
            .map_err(Error::host(format!("a loop device for {path} of the rootfs")))?;
        let node = made.path().display().to_string();
        loops.push(made);
        Ok(node)
    };
    let source = if part.is_disk { device(&part.source, part.is_read_only())? } else { part.source.clone() };
    for option in &mut options {
        if part.is_disk
            && let Some(path) = option.strip_prefix("device=")
        {
            *option = format!("device={}", device(path, true)?);
        }
    }
    let (flags, data) = parse(&options);
    let flags = if part.kind == "bind" { flags | MsFlags::MS_BIND } else { flags };
    let flags = if part.kind == "erofs" { flags | MsFlags::MS_RDONLY } else { flags };
    mount(Some(source.as_str()), target, Some(part.kind.as_str()), flags, Some(data.join(",").as_str()))
        .map_err(Error::host(what()))?;
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        let again = flags | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, again, None::<&str>).map_err(Error::host(what()))?;
    }
    Ok(())
}
