//! `Storage` messages: what the host gives the guest to mount, by driver (Kata's names).

use std::fs;
use std::os::unix::fs::PermissionsExt;

use agent_api::agent::Storage;
use nix::mount::{MntFlags, mount, umount2};

use crate::error::Error;
use crate::launcher::options;

/// Mounts one and returns its mount point.
pub(crate) fn connect(storage: &Storage) -> Result<String, Error> {
    let point = storage.mount_point.as_str();
    if !point.starts_with("/run/") || point.split('/').any(|part| part == "..") {
        return Err(Error::Invalid(format!("mount point {point:?} of a storage is not below /run")));
    }
    fs::create_dir_all(point).map_err(Error::failed(point))?;
    let (kind, options) = match storage.driver.as_str() {
        "virtio-fs" => ("virtiofs", storage.options.clone()),
        "9p" => ("9p", storage.options.clone()),
        "ephemeral" => ("tmpfs", storage.options.clone()),
        "bind" => ("bind", [&["bind".to_owned()], storage.options.as_slice()].concat()),
        "local" => {
            // a folder in the guest; the mode is all that can be asked for
            let mode = storage.options.iter().find_map(|option| option.strip_prefix("mode="));
            let mode = mode.and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or(0o777);
            fs::set_permissions(point, fs::Permissions::from_mode(mode & 0o7777)).map_err(Error::failed(point))?;
            return Ok(point.to_owned());
        }
        other => return Err(Error::Unsupported(format!("storage driver {other:?}"))),
    };
    let parsed = options::parse(&options);
    mount(Some(storage.source.as_str()), point, Some(kind), parsed.flags, Some(parsed.data.as_str()))
        .map_err(Error::failed(format!("mount of {kind} {} on {point}", storage.source)))?;
    Ok(point.to_owned())
}

/// Unmounts what [`connect`] mounted.
pub(crate) fn disconnect(point: &str) {
    if let Err(errno) = umount2(point, MntFlags::MNT_DETACH) {
        crate::log::debug(&format!("unmounting {point}: {errno}"));
    }
}
