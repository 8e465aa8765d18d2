//! Bind mounts of a specification: the host's folder or file is bound into the share, the guest binds it from there.

use std::fs::{self, File};
use std::path::Path;

use agent_api::{oci, paths};

use super::share::{Share, guest_path};
use super::shm::{self, Shm};
use super::tree::{self, How, ReadOnly};
use crate::{ContainerId, Error, cleanup};

/// Most submounts that one container's guest is told of. Each costs its start a request to virtiofsd.
const SUBMOUNTS: usize = 256;

/// What a container's volumes are.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    /// Names in the share, for taking them away with the container.
    pub(crate) names: Vec<String>,
    /// Folders in the container that are mounts of their own below read-only ones, and not read-only by that.
    pub(crate) submounts: Vec<String>,
}

/// Shares every host bind mount of `spec` and rewrites its source to the guest's path. `volumes` has what was done also
/// when the rest failed.
pub(crate) fn connect(
    share: &Share,
    id: &ContainerId,
    spec: &mut oci::Spec,
    shm: Option<&Shm>,
    volumes: &mut Volumes,
) -> Result<(), Error> {
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
        share.must_serve(&format!("the mount on {}", mount.destination))?;
        let name = format!("{id}-{index:04}");
        let meta = fs::metadata(source)
            .map_err(Error::host(format!("source {} of the mount on {}", mount.source, mount.destination)))?;
        let target = share.host_path(&name);
        if meta.is_dir() {
            fs::create_dir(&target).map_err(Error::host(target.display().to_string()))?;
        } else {
            File::create_new(&target).map_err(Error::host(target.display().to_string()))?;
        }
        volumes.names.push(name.clone());
        // read-only also on the host: a guest that was taken over must not write
        let how = How::of(&mount.options);
        tree::copy(source, &target, how)?;
        if how.read_only == ReadOnly::Top {
            volumes.submounts.extend(submounts(&target, &mount.destination)?);
        }
        if mount.options.iter().any(|option| option == "shared" || option == "rshared") {
            tracing::warn!(
                destination = mount.destination,
                "what the container mounts below a shared mount stays in the virtual machine"
            );
        }
        mount.source = guest_path(&name);
    }
    if volumes.submounts.len() > SUBMOUNTS {
        tracing::warn!(
            count = volumes.submounts.len(),
            "too many mounts below read-only ones: those after the first {SUBMOUNTS} are read-only too"
        );
        volumes.submounts.truncate(SUBMOUNTS);
    }
    Ok(())
}

/// Where a container finds what is mounted below `target`, which it sees as `destination`.
fn submounts(target: &Path, destination: &str) -> Result<Vec<String>, Error> {
    let points = cleanup::mount_points(target).map_err(Error::host("mounts of the host"))?;
    let below = points.iter().filter_map(|point| point.strip_prefix(target).ok()?.to_str());
    Ok(below.filter(|path| !path.is_empty()).map(|path| format!("{destination}/{path}")).collect())
}
