//! Bind mounts of a specification: the host's folder or file is bound into the share, the guest binds it from there.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use agent_api::agent::{Storage, WatchedVolume};
use agent_api::{oci, paths};

use super::local::{self, Wanted};
use super::share::{PodFolder, guest_path};
use super::shelf::Place;
use super::shm::{self, Shm};
use super::source::{GuestWritable, Source};
use super::tree::{self, How, ReadOnly};
use super::{kubelet, overlay, watched};
use crate::host_work::Progress;
use crate::{ContainerId, Error, cleanup};

/// Most submounts that one container's guest is told of. Each costs its start a request to virtiofsd.
const SUBMOUNTS: usize = 256;
/// Most bytes of copies that a container is made with: they are in the request.
const COPIES: usize = 1 << 20;

/// What a container's volumes are.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    /// Names in the share, for taking them away with the container.
    pub(crate) names: Vec<String>,
    /// Folders in the container that are mounts of their own below read-only ones, and not read-only by that.
    pub(crate) submounts: Vec<String>,
    /// What the VM has of its own.
    pub(crate) storages: Vec<Storage>,
    /// What the VM has copies of.
    pub(crate) watched: Vec<WatchedVolume>,
}

/// What there is for a container's volumes.
#[derive(Clone, Copy)]
pub(crate) struct For<'a> {
    pub(crate) share: &'a PodFolder,
    pub(crate) id: &'a ContainerId,
    pub(crate) shm: Option<&'a Shm>,
    /// emptyDirs on disk are the VM's own.
    pub(crate) guest_empty_dir: bool,
    /// Mounts that are the guest's own, by their places in the specification, and where the guest has them.
    pub(crate) on_disks: &'a HashMap<usize, String>,
    pub(crate) progress: &'a Progress,
}

/// Shares every host bind mount of `spec` and rewrites its source to the guest's path. `volumes` has what was done also
/// when the rest failed.
pub(crate) fn connect(given: For<'_>, spec: &mut oci::Spec, volumes: &mut Volumes) -> Result<(), Error> {
    let resources = spec.Linux.as_ref().and_then(|linux| linux.Resources.as_ref());
    let huge_pages = resources.map(|all| all.HugepageLimits.clone()).unwrap_or_default();
    // most containers of ctr's have no such mount
    let mut writable = None;
    for (index, mount) in spec.Mounts.iter_mut().enumerate() {
        if let Some(place) = given.on_disks.get(&index) {
            mount.source.clone_from(place);
            continue;
        }
        let is_overlay = overlay::is_one(mount);
        let bound = mount.type_ == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind");
        if !bound && !is_overlay {
            continue;
        }
        let path = Path::new(&mount.source);
        if mount.destination == shm::DESTINATION && given.shm.is_some_and(|shm| shm.is(path)) {
            mount.source = paths::SANDBOX_SHM.into();
            continue;
        }
        // the guest's own devices and kernel files, never the host's
        if !is_overlay && ["/dev", "/proc", "/sys"].iter().any(|own| path.starts_with(own)) {
            continue;
        }
        given.progress.step(format!("source {} of the mount on {}", mount.source, mount.destination))?;
        let writable = match &writable {
            Some(known) => known,
            None => &*writable
                .insert(GuestWritable::of(given.share.sandboxes()).map_err(Error::host("the mounts of all pods"))?),
        };
        if is_overlay {
            overlay::connect(given.share, given.id, writable, mount, &mut volumes.names, given.progress)?;
            continue;
        }
        let source = Source::open(path, writable)
            .map_err(Error::host(format!("source {} of the mount on {}", mount.source, mount.destination)))?;
        let wanted = Wanted { on_disk: given.guest_empty_dir, writable, huge_pages: &huge_pages };
        mount.source = place(given, path, &source, wanted, mount, volumes)?;
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

/// Where the guest finds a source that is open by `path`.
fn place(
    given: For<'_>,
    path: &Path,
    source: &Source,
    wanted: Wanted<'_>,
    mount: &oci::Mount,
    volumes: &mut Volumes,
) -> Result<String, Error> {
    possible(path, source, mount)?;
    if let Some(local) = local::place(path, source, wanted, &mut given.share.shelf())? {
        volumes.storages.extend(local.storages);
        return Ok(local.path);
    }
    let how = How::of(&mount.options);
    if let Some(copy) = copied(given, path, source, how, volumes) {
        return Ok(copy);
    }
    given.share.must_serve(&format!("the mount on {}", mount.destination))?;
    shared(given, path, source, how, mount, volumes)
}

/// Refuses what no virtual machine can have.
fn possible(path: &Path, source: &Source, mount: &oci::Mount) -> Result<(), Error> {
    if source.kind().is_socket() {
        return Err(Error::Unsupported(format!(
            "source {} of the mount on {} is a unix socket of the host, to which nobody in a virtual machine can \
             connect: remove the mount, or reach its server through the network",
            path.display(),
            mount.destination
        )));
    }
    let huge = source.file_system().is_ok_and(|(kind, _)| local::is_huge(kind));
    if huge && !kubelet::is_empty_dir(path) && kubelet::empty_dir_of_subpath(path).is_none() {
        return Err(Error::Unsupported(format!(
            "source {} of the mount on {} is in the host's huge pages, which a virtual machine cannot share: use an \
             emptyDir of medium HugePages",
            path.display(),
            mount.destination
        )));
    }
    Ok(())
}

/// A small volume of kubelet's, as a copy that follows it; what a container can write is no copy.
fn copied(given: For<'_>, path: &Path, source: &Source, how: How, volumes: &mut Volumes) -> Option<String> {
    // what a guest can write to is not kubelet's, whatever it is called
    let is_kubelets = kubelet::is_swapped(path) && !source.is_guests();
    if !is_kubelets || !source.kind().is_dir() || how.read_only == ReadOnly::AsIs {
        return None;
    }
    let name = given.share.shelf().local(path, source);
    let room = COPIES.saturating_sub(volumes.watched.iter().map(watched::size).sum());
    let volume = given.share.watcher().add(path, source, given.share.sandboxes(), &name, room)?;
    volumes.watched.push(volume);
    Some(format!("{}/{name}", paths::SANDBOX_WATCHED))
}

fn shared(
    given: For<'_>,
    path: &Path,
    source: &Source,
    how: How,
    mount: &oci::Mount,
    volumes: &mut Volumes,
) -> Result<String, Error> {
    let (identity, owner) = (source.identity(), given.id.as_str());
    let mut place = given.share.shelf().take(identity, how, owner);
    if let Place::Taken(old) = &place
        && how.recursive
        && has_other_mounts(source, &given.share.host_path(old)).map_err(Error::host("mounts of the host"))?
    {
        place = Place::New(given.share.shelf().renew(identity, how, owner, old));
    }
    let (Place::New(name) | Place::Taken(name)) = &place;
    let (name, target) = (name.clone(), given.share.host_path(name));
    volumes.names.push(name.clone());
    if matches!(place, Place::New(_)) {
        if source.kind().is_dir() {
            fs::create_dir(&target).map_err(Error::host(target.display().to_string()))?;
        } else {
            File::create_new(&target).map_err(Error::host(target.display().to_string()))?;
        }
        // read-only also on the host: a guest that was taken over must not write
        tree::copy_of(source.as_fd(), path, &target, how)?;
    }
    if how.read_only == ReadOnly::Top {
        volumes.submounts.extend(submounts(&target, &mount.destination)?);
    }
    Ok(guest_path(&name))
}

/// The host has mounted something below a source since `copy` was made of it, or taken it off, and not where that is told
/// to the copy: a private mount tells nobody.
fn has_other_mounts(source: &Source, copy: &Path) -> std::io::Result<bool> {
    let mounts = cleanup::MountTable::read()?;
    let below = |folder: &Path| -> BTreeSet<PathBuf> {
        let points = mounts.points_below(folder);
        points.iter().filter_map(|point| Some(point.strip_prefix(folder).ok()?.to_owned())).collect()
    };
    let (mut here, mut there) = (below(&source.shown()?), below(copy));
    // the source itself may be a mount, and the copy is one
    for points in [&mut here, &mut there] {
        points.remove(Path::new(""));
    }
    Ok(here != there)
}

/// Where a container finds what is mounted below `target`, which it sees as `destination`.
fn submounts(target: &Path, destination: &str) -> Result<Vec<String>, Error> {
    let points = cleanup::mount_points(target).map_err(Error::host("mounts of the host"))?;
    let below = points.iter().filter_map(|point| point.strip_prefix(target).ok()?.to_str());
    Ok(below.filter(|path| !path.is_empty()).map(|path| format!("{destination}/{path}")).collect())
}
