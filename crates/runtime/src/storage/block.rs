//! What a container has on disks of the VM: its root file system, raw devices, direct volumes. Found and opened before
//! anything is made; told to the guest when the disks have their places.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_api::agent as api;
use agent_api::paths;
use agent_api::storage::{CREATE_DIRECTORY, MORE_DEVICE, READ_ONLY};
use hypervisor::{Address, Fault, Vm};
use oci_spec::runtime::Spec;

use super::layers::{self, Part};
use super::raw;
use crate::direct_volume::{Store, VolumeInfo};
use crate::host_work::Progress;
use crate::{ContainerSpec, Error};

/// A file or a block device of the host's, open.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) file: OwnedFd,
    pub(crate) bytes: u64,
    pub(crate) key: Key,
    /// Others may write it too.
    pub(crate) shared: bool,
}

/// Two of the same key are one disk in the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    /// Of a file: its file system and inode; of a device: zero and its number.
    identity: (u64, u64),
    pub(crate) read_only: bool,
}

impl Key {
    /// However it is opened.
    pub(crate) fn is_same_file(self, other: Self) -> bool {
        self.identity == other.identity
    }
}

impl Source {
    pub(crate) fn open(path: &Path, read_only: bool, shared: bool) -> Result<Self, Error> {
        let named = |error| Error::host(format!("block device {}", path.display()))(error);
        // a named pipe would wait for its writer
        let kind = fs::metadata(path).map_err(named)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Invalid(format!("{} is neither a block device nor a regular file", path.display())));
        }
        let mut file = File::options().read(true).write(!read_only).open(path).map_err(named)?;
        let meta = file.metadata().map_err(named)?;
        let identity = if meta.file_type().is_block_device() { (0, meta.rdev()) } else { (meta.dev(), meta.ino()) };
        let bytes = file.seek(SeekFrom::End(0)).map_err(named)?;
        if bytes == 0 {
            return Err(Error::Invalid(format!("block device {} has no bytes: nothing is behind it", path.display())));
        }
        Ok(Self { path: path.to_owned(), file: file.into(), bytes, key: Key { identity, read_only }, shared })
    }
}

/// Disks that a container needs, and for what. Numbers are places in `sources`.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    pub(crate) sources: Vec<Source>,
    uses: Uses,
}

#[derive(Debug, Default)]
struct Uses {
    rootfs: Option<Vec<Layer>>,
    nodes: Vec<(String, usize)>,
    volumes: Vec<Volume>,
}

/// A part of the root file system; of one that is a disk, which, and on which others it is.
#[derive(Debug)]
struct Layer {
    part: Part,
    disk: Option<usize>,
    more: Vec<usize>,
}

impl Layer {
    /// For the guest, where it has the earlier ones on `points`, and finds a disk by `at`.
    fn storage(
        &self,
        points: &[String],
        place: String,
        at: impl Fn(usize) -> Result<(&'static str, String), Error>,
    ) -> Result<api::Storage, Error> {
        let part = self.part.filled(points)?;
        let (driver, source, driver_options);
        if let Some(disk) = self.disk {
            (driver, source) = at(disk)?;
            let more = self.more.iter().map(|disk| at(*disk).map(|(_, path)| option(MORE_DEVICE, &path)));
            driver_options = more.collect::<Result<_, _>>()?;
        } else {
            driver = if part.kind == "bind" { "bind" } else { "overlayfs" };
            source = part.source;
            driver_options = part.folders.iter().map(|path| option(CREATE_DIRECTORY, path)).collect();
        }
        Ok(api::Storage {
            driver: driver.into(),
            source,
            fstype: part.kind,
            options: part.options,
            driver_options,
            mount_point: place,
            ..Default::default()
        })
    }
}

/// A direct volume.
#[derive(Debug)]
struct Volume {
    /// Which of the specification's mounts.
    mount: usize,
    path: PathBuf,
    info: VolumeInfo,
    disk: usize,
}

impl Blocks {
    /// Those of a container; `in_guest` is false where its root file system is to be mounted by the host.
    pub(crate) fn of(from: &ContainerSpec, oci: &Spec, in_guest: bool, progress: &Progress) -> Result<Self, Error> {
        let mut own = Self::default();
        let shown: Vec<_> = from.rootfs.iter().map(|one| one.source.as_str()).collect();
        progress.step(format!("the container's rootfs ({})", shown.join(", ")))?;
        if let Some(parts) = layers::understand(&from.rootfs)?.filter(|parts| in_guest && fits_the_guest(parts)) {
            own.uses.rootfs = Some(parts.into_iter().map(|part| own.layer(part, progress)).collect::<Result<_, _>>()?);
        }
        for device in raw::devices(oci)? {
            let disk = own.open(&device.host, device.read_only, true, progress)?;
            own.uses.nodes.push((device.path, disk));
        }
        own.volumes(oci, progress)?;
        Ok(own)
    }

    fn open(&mut self, path: &Path, read_only: bool, shared: bool, progress: &Progress) -> Result<usize, Error> {
        progress.step(format!("block device {}", path.display()))?;
        let source = Source::open(path, read_only, shared)?;
        if let Some(place) = self.sources.iter().position(|one| one.key == source.key) {
            return Ok(place);
        }
        self.sources.push(source);
        Ok(self.sources.len() - 1)
    }

    fn layer(&mut self, mut part: Part, progress: &Progress) -> Result<Layer, Error> {
        if !part.is_disk {
            return Ok(Layer { part, disk: None, more: Vec::new() });
        }
        let read_only = part.is_read_only();
        let disk = self.open(Path::new(&part.source), read_only, false, progress)?;
        let others: Vec<PathBuf> = part.more().map(PathBuf::from).collect();
        let more = others.iter().map(|path| self.open(path, true, false, progress)).collect::<Result<_, _>>()?;
        part.options.retain(|option| !option.starts_with("device="));
        Ok(Layer { part, disk: Some(disk), more })
    }

    fn volumes(&mut self, oci: &Spec, progress: &Progress) -> Result<(), Error> {
        let store = Store::default();
        for (mount, one) in oci.mounts().iter().flatten().enumerate() {
            let is_bind = |option: &String| option == "bind" || option == "rbind";
            let bound = one.typ().as_deref() == Some("bind") || one.options().iter().flatten().any(is_bind);
            let Some(source) = one.source().as_ref().filter(|_| bound) else { continue };
            if let Some(info) = store.find(source)? {
                let read_only = info.options.iter().any(|option| option == "ro");
                let disk = self.open(&info.device, read_only, false, progress)?;
                self.uses.volumes.push(Volume { mount, path: source.clone(), info, disk });
            }
        }
        Ok(())
    }

    /// With the disks in the VM, by their names there.
    pub(crate) fn placed(self, ids: Vec<String>) -> Placed {
        let disks = self.sources.into_iter().map(|source| (source.path, source.key.read_only)).unzip();
        let (paths, read_only) = disks;
        Placed { ids, paths, read_only, uses: self.uses }
    }
}

/// Disks in the VM, and for what a container has them.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    pub(crate) ids: Vec<String>,
    paths: Vec<PathBuf>,
    read_only: Vec<bool>,
    uses: Uses,
}

/// A direct volume that the guest has.
#[derive(Debug, Clone)]
pub(crate) struct MountedVolume {
    /// What it is called.
    pub(crate) path: PathBuf,
    /// The host's device or file.
    pub(crate) device: PathBuf,
    /// The disk's name in the VM.
    pub(crate) disk: String,
    /// Where the guest has it mounted.
    pub(crate) point: String,
}

/// What the guest is told, and what it takes from the host's way.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) storages: Vec<api::Storage>,
    pub(crate) devices: Vec<api::Device>,
    /// Where the guest has the root file system.
    pub(crate) rootfs: Option<String>,
    /// Where it has the specification's mounts.
    pub(crate) volumes: HashMap<usize, String>,
    /// Direct volumes that the container uses.
    pub(crate) direct: Vec<MountedVolume>,
    /// The disks' names in the VM, for taking them away with the container.
    pub(crate) disks: Vec<String>,
    /// What the guest calls a disk, and what it is on the host: for errors.
    pub(crate) names: Vec<(String, String)>,
}

impl Placed {
    /// An error about a disk, with what the disk is on the host.
    pub(crate) fn explain(&self, error: Error) -> Error {
        match error {
            Error::VmGone { fault: Some(Fault::DiskInUse { id }), .. } => self.in_use(&id),
            Error::VmGone { fault: Some(Fault::Disk { id, why }), .. } => self.refused(&id, why),
            Error::Vm(error) => self.unplugged(error),
            other => other,
        }
    }

    fn path(&self, id: &str) -> &Path {
        let place = self.ids.iter().position(|one| one == id).and_then(|place| self.paths.get(place));
        place.map_or(Path::new(""), PathBuf::as_path)
    }

    fn in_use(&self, id: &str) -> Error {
        let path = self.path(id).display();
        Error::WrongState(format!("block device {path} is in use: a virtual machine has locked it"))
    }

    fn refused(&self, id: &str, why: String) -> Error {
        Error::Host { what: format!("block device {}", self.path(id).display()), source: std::io::Error::other(why) }
    }

    /// The same for one that was to be plugged.
    pub(crate) fn unplugged(&self, error: hypervisor::Error) -> Error {
        use hypervisor::Error::{Disk, InUse, NoSlot, TooManyDevices};
        match error {
            InUse { device } => self.in_use(&device),
            Disk { device, why } => self.refused(&device, why),
            NoSlot { .. } | TooManyDevices { .. } => Error::Unsupported(error.to_string()),
            other => other.into(),
        }
    }

    pub(crate) fn plan(&self, vm: &dyn Vm, container: &str) -> Result<Plan, Error> {
        let at = |disk: usize| {
            let id = self.ids.get(disk).map_or("", String::as_str);
            match vm.address(id) {
                Some(Address::Pci(path)) => Ok(("blk", path)),
                Some(Address::Scsi { id, lun }) => Ok(("scsi", format!("{id}:{lun}"))),
                None => Err(Error::NotFound(format!("disk {id} of container {container}"))),
            }
        };
        let point = |disk: usize| format!("{}/{}", paths::DISKS, self.ids.get(disk).map_or("", String::as_str));
        let mut plan = Plan { disks: self.ids.clone(), ..Plan::default() };
        for (disk, path) in self.paths.iter().enumerate() {
            plan.names.push((format!("block device {}", at(disk)?.1), path.display().to_string()));
        }
        if let Some(layers) = &self.uses.rootfs {
            // no disk is called that, whatever a container is
            let target = format!("{}/rootfs@{container}", paths::DISKS);
            let mut points = Vec::new();
            for (number, layer) in layers.iter().enumerate() {
                let place = match layer.disk {
                    Some(disk) if number + 1 < layers.len() => point(disk),
                    _ => target.clone(),
                };
                plan.storages.push(layer.storage(&points, place.clone(), at)?);
                points.push(place);
            }
            plan.rootfs = Some(target);
        }
        for (path, disk) in &self.uses.nodes {
            let (kind, id) = at(*disk)?;
            let (type_, container_path) = (kind.to_owned(), path.clone());
            let options = self.read_only.get(*disk).filter(|read_only| **read_only).map(|_| READ_ONLY.to_owned());
            let options = options.into_iter().collect();
            plan.devices.push(api::Device { id, type_, container_path, options, ..Default::default() });
        }
        for volume in &self.uses.volumes {
            let (driver, source) = at(volume.disk)?;
            let place = point(volume.disk);
            plan.volumes.insert(volume.mount, place.clone());
            plan.direct.push(MountedVolume {
                path: volume.path.clone(),
                device: volume.info.device.clone(),
                disk: self.ids.get(volume.disk).cloned().unwrap_or_default(),
                point: place.clone(),
            });
            if plan.storages.iter().any(|storage| storage.mount_point == place) {
                continue;
            }
            let is_read_only = volume.info.options.iter().any(|option| option == "ro");
            plan.storages.push(api::Storage {
                driver: driver.into(),
                source,
                fstype: volume.info.fs_type.clone(),
                options: volume.info.options.clone(),
                mount_point: place,
                // nobody's files change owner on what is read-only
                fs_group: (!is_read_only).then(|| fs_group(&volume.info)).flatten().into(),
                ..Default::default()
            });
        }
        Ok(plan)
    }
}

/// The guest can put them together: each is a disk, but the last, which may build on the others.
fn fits_the_guest(parts: &[Part]) -> bool {
    parts.split_last().is_some_and(|(last, rest)| {
        rest.iter().all(|part| part.is_disk) && (last.is_disk || (!rest.is_empty() && last.is_within()))
    })
}

fn option(name: &str, value: &str) -> String {
    format!("{name}={value}")
}

fn fs_group(info: &VolumeInfo) -> Option<api::FSGroup> {
    let group_id = info.metadata.get("fsGroup")?.parse().ok()?;
    let policy = match info.metadata.get("fsGroupChangePolicy").map(String::as_str) {
        Some("OnRootMismatch") => agent_api::types::FSGroupChangePolicy::OnRootMismatch,
        _ => agent_api::types::FSGroupChangePolicy::Always,
    };
    Some(api::FSGroup { group_id, group_change_policy: policy.into(), ..Default::default() })
}
