//! Bind mounts of a specification: the host's folder or file is bound into the share, the guest binds it from there.

use std::fs::{self, File};
use std::path::Path;

use agent_api::{oci, paths};

use super::share::{Share, guest_path};
use super::shm::{self, Shm};
use crate::{ContainerId, Error};

/// Shares every host bind mount of `spec` and rewrites its source to the guest's path.
///
/// Returns the names in the share, for taking them away with the container.
pub(crate) fn connect(
    share: &Share,
    id: &ContainerId,
    spec: &mut oci::Spec,
    shm: Option<&Shm>,
) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for (index, mount) in spec.Mounts.iter_mut().enumerate() {
        let bound = mount.type_ == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind");
        if !bound {
            continue;
        }
        let source = Path::new(&mount.source);
        if mount.destination == shm::DESTINATION && shm.is_some_and(|shm| shm.is(source)) {
            mount.source = paths::SANDBOX_SHM.into();
            continue;
        }
        // the guest's own devices and kernel files, never the host's
        if ["/dev", "/proc", "/sys"].iter().any(|own| source.starts_with(own)) {
            continue;
        }
        let name = format!("{id}-{index:04}");
        let meta = fs::metadata(source)
            .map_err(Error::host(format!("source {} of the mount on {}", mount.source, mount.destination)))?;
        let target = share.host_path(&name);
        if meta.is_dir() {
            fs::create_dir(&target).map_err(Error::host(target.display().to_string()))?;
        } else {
            File::create_new(&target).map_err(Error::host(target.display().to_string()))?;
        }
        names.push(name.clone());
        let recursive = mount.options.iter().any(|option| option == "rbind");
        super::rootfs::bind(source, &target, recursive)?;
        if mount.options.iter().any(|option| option == "ro") {
            // also on the host: a guest that was taken over must not write
            read_only(&target)?;
        }
        mount.source = guest_path(&name);
    }
    Ok(names)
}

fn read_only(target: &Path) -> Result<(), Error> {
    use nix::mount::{MsFlags, mount};
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .map_err(Error::host(format!("read-only bind mount on {}", target.display())))
}
