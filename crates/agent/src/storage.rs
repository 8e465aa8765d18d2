//! `Storage` messages: what the host gives the guest to mount, by driver (Kata's names).

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::agent::Storage;
use agent_api::storage::{CREATE_DIRECTORY, MORE_DEVICE, READ_ONLY};
use agent_api::{oci, paths};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::disk;
use crate::error::Error;
use crate::inside;
use crate::launcher::options;
use crate::ownership;

/// Names of the drivers.
pub(crate) const DRIVERS: [&str; 8] = ["virtio-fs", "9p", "ephemeral", "bind", "local", "blk", "scsi", "overlayfs"];

/// Mounts one and returns its mount point. A disk may take `patience` to appear.
pub(crate) async fn connect(storage: &Storage, patience: Duration) -> Result<String, Error> {
    let driver = storage.driver.as_str();
    if !["blk", "scsi"].contains(&driver) {
        return connect_now(storage);
    }
    let point = below_run(&storage.mount_point)?;
    fs::create_dir_all(point).map_err(Error::failed(point))?;
    let found = disk::find(driver, &storage.source, patience).await?;
    if storage.fstype == "erofs" || storage.options.iter().any(|option| option == READ_ONLY) {
        found.forbid_writing()?;
    }
    let path = found.path.display().to_string();
    let mut options = storage.options.clone();
    for address in driver_options(storage, MORE_DEVICE) {
        let more = disk::find(driver, address, patience).await?;
        more.forbid_writing()?;
        options.push(format!("device={}", more.path.display()));
    }
    let shown = format!("block device {}", storage.source);
    mount_on(point, &storage.fstype, &path, &shown, &options)?;
    if let Some(group) = storage.fs_group.as_ref()
        && let Err(error) = ownership::apply(point, group)
    {
        disconnect(point);
        return Err(Error::failed(format!("changing the group to {} on {shown}", group.group_id))(error));
    }
    Ok(point.to_owned())
}

/// Mounts one for which nothing has to come.
pub(crate) fn connect_now(storage: &Storage) -> Result<String, Error> {
    let point = below_run(&storage.mount_point)?;
    if storage.driver == "local" {
        return folder(point, &storage.options).map(|()| point.to_owned()).map_err(Error::failed(point));
    }
    fs::create_dir_all(point).map_err(Error::failed(point))?;
    let (kind, options) = match storage.driver.as_str() {
        "virtio-fs" => ("virtiofs", storage.options.clone()),
        "9p" => ("9p", storage.options.clone()),
        "ephemeral" if storage.fstype == "hugetlbfs" => {
            set_pages_aside(&storage.options)?;
            ("hugetlbfs", storage.options.clone())
        }
        "ephemeral" => ("tmpfs", within_memory(&storage.options)),
        "bind" => ("bind", [&["bind".to_owned()], storage.options.as_slice()].concat()),
        "overlayfs" => ("overlay", storage.options.clone()),
        other => return Err(Error::Unsupported(format!("the storage driver {other:?}"))),
    };
    make_folders(storage)?;
    mount_on(point, kind, &storage.source, &storage.source, &options)?;
    Ok(point.to_owned())
}

fn mount_on(point: &str, kind: &str, source: &str, shown: &str, options: &[String]) -> Result<(), Error> {
    let parsed = options::parse(options);
    mount(Some(source), point, Some(kind), parsed.flags, Some(parsed.data.as_str()))
        .map_err(Error::failed(format!("mount of {kind} {shown} on {point}")))
}

fn below_run(point: &str) -> Result<&str, Error> {
    if !point.starts_with("/run/") || point.split('/').any(|part| part == "..") {
        return Err(Error::Invalid(format!("mount point {point:?} of a storage must be below /run")));
    }
    Ok(point)
}

fn driver_options<'a>(storage: &'a Storage, name: &'a str) -> impl Iterator<Item = &'a str> {
    storage.driver_options.iter().filter_map(move |option| option.strip_prefix(name)?.strip_prefix('='))
}

/// Folders that a mount needs, each in a file system that a container may have written: no link is followed there.
fn make_folders(storage: &Storage) -> Result<(), Error> {
    for path in driver_options(storage, CREATE_DIRECTORY) {
        let path = below_run(path)?;
        match fs::create_dir(path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(Error::failed(path)(error)),
            _ => {}
        }
        if !fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
            return Err(Error::Failed(format!("{path} is not a folder")));
        }
    }
    Ok(())
}

/// Unmounts what [`connect`] mounted. What was written to a disk is on it afterwards, even if somebody still uses it.
pub(crate) fn disconnect(point: &str) {
    if point.starts_with(paths::DISKS)
        && let Ok(folder) = File::open(point)
        && let Err(errno) = nix::unistd::syncfs(&folder)
    {
        crate::log::warn(&format!("syncing {point}: {errno}"));
    }
    if let Err(errno) = umount2(point, MntFlags::MNT_DETACH) {
        crate::log::debug(&format!("unmounting {point}: {errno}"));
    }
    if point.starts_with(paths::DISKS) {
        // stays while something else is mounted there
        let _ = fs::remove_dir(point);
    }
}

/// Has the guest's kernel ask the host again before it believes what it knows of files, and forget what it knows of the
/// share itself that nobody uses. A remount does both: the first by `guest/kernel/patches/0017`, with virtio-fs. By 9p
/// nothing is known for longer than it is used.
pub(crate) fn renew() {
    let done = mount(None::<&str>, paths::SHARED, None::<&str>, MsFlags::MS_REMOUNT, None::<&str>);
    // a pod with disks alone has no share
    if let Err(errno) = done
        && ![Errno::EINVAL, Errno::ENOENT].contains(&errno)
    {
        crate::log::warn(&format!("remounting the shared folder: {errno}; the guest may see changes on the host late"));
    }
}

/// The volumes in the share that containers have, and how many have each.
///
/// The guest's kernel makes a file system of a mount in the share when somebody goes there, another one in each
/// namespace. So the agent goes there before a container has a namespace of its own, and all containers get the same
/// one, with its locks and memory maps.
#[derive(Debug, Default)]
pub(crate) struct Entered(Mutex<HashMap<String, usize>>);

impl Entered {
    /// For a container with this specification; returns its volumes.
    pub(crate) fn enter(&self, spec: &oci::Spec) -> Vec<String> {
        let sources = shared_sources(spec);
        for source in &sources {
            *self.counts().entry(source.clone()).or_default() += 1;
            // who binds it tells what is wrong with it
            let _ = fs::metadata(source);
        }
        for mount in spec.Mounts.iter().filter(|mount| is_shareable(&mount.source)) {
            let follows = ["shared", "rshared", "slave", "rslave"];
            if mount.options.iter().any(|option| follows.contains(&option.as_str())) {
                // what is no mount by itself, as a file, has nothing mounted below it
                let kind = MsFlags::MS_SHARED | MsFlags::MS_REC;
                let _ = nix::mount::mount(None::<&str>, mount.source.as_str(), None::<&str>, kind, None::<&str>);
            }
        }
        sources
    }

    /// What nobody has any more must not be kept in use on the host: of a container whose mounts are gone.
    pub(crate) fn leave(&self, sources: &[String]) {
        let mut counts = self.counts();
        for source in sources {
            let Some(count) = counts.get_mut(source) else { continue };
            *count -= 1;
            if *count == 0 {
                counts.remove(source);
                disconnect(source);
            }
        }
        // the places that they had in the share are known until then, and open in the host's daemon
        renew();
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The agent has a mount of its own of it, which containers may share.
pub(crate) fn is_shareable(source: &str) -> bool {
    let has_mount =
        [paths::SHARED, paths::SANDBOX_EPHEMERAL].iter().any(|folder| Path::new(source).starts_with(folder));
    // in a part containers make the links
    has_mount && volume_and_rest(source).is_none()
}

fn shared_sources(spec: &oci::Spec) -> Vec<String> {
    let all = spec.Mounts.iter().map(|mount| &mount.source);
    all.filter(|source| Path::new(source).starts_with(paths::SHARED)).cloned().collect()
}

/// Opens a part of a volume of the guest's own, in which containers make the links; `None` for any other path.
pub(crate) fn open_part(path: &str) -> nix::Result<Option<OwnedFd>> {
    let Some((volume, rest)) = volume_and_rest(path) else { return Ok(None) };
    let root =
        nix::fcntl::open(volume, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?;
    inside::open_in(&root, rest, OFlag::O_PATH).map(Some)
}

/// `…/sandbox/ephemeral/NAME` and what is below it.
fn volume_and_rest(path: &str) -> Option<(&str, &str)> {
    let kinds = [paths::SANDBOX_EPHEMERAL, paths::SANDBOX_LOCAL];
    let rest = kinds.iter().find_map(|kind| path.strip_prefix(kind)?.strip_prefix('/'))?;
    let (name, rest) = rest.split_once('/')?;
    Some((path.get(..path.len() - rest.len() - 1)?, rest)).filter(|_| !name.is_empty() && !rest.is_empty())
}

/// A folder in the guest. One that is there keeps what it is: containers may have changed it.
fn folder(point: &str, options: &[String]) -> std::io::Result<()> {
    let Some((volume, rest)) = volume_and_rest(point) else {
        if Path::new(point).is_dir() {
            return Ok(());
        }
        fs::create_dir_all(point)?;
        return own(point, options);
    };
    if open_part(point).is_ok_and(|found| found.is_some()) {
        return Ok(());
    }
    let made = inside::make_folders(&OwnedFd::from(File::open(volume)?), rest)?;
    own(&format!("/proc/self/fd/{}", made.as_raw_fd()), options)
}

/// Kata's `mode`, and `uid` and `gid` as tmpfs(5) has them.
fn own(path: &str, options: &[String]) -> std::io::Result<()> {
    let number = |name: &str, radix| {
        let value = options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
        value.and_then(|value| u32::from_str_radix(value, radix).ok())
    };
    chown(path, number("uid", 10), number("gid", 10))?;
    fs::set_permissions(path, fs::Permissions::from_mode(number("mode", 8).unwrap_or(0o777) & 0o7777))
}

/// A tmpfs that may grow beyond the guest's memory would end the pod instead of being full: such a size is the kernel's
/// own, half of the memory.
fn within_memory(options: &[String]) -> Vec<String> {
    let memory = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
    let is_too_large = |option: &String| {
        option.strip_prefix("size=").and_then(|size| size.parse::<u64>().ok()).is_some_and(|size| size > memory)
    };
    options.iter().filter(|option| !is_too_large(option)).cloned().collect()
}

/// The guest has huge pages when somebody asks for them.
fn set_pages_aside(options: &[String]) -> Result<(), Error> {
    let number = |name: &str| -> Option<u64> {
        options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    };
    let (Some(page), Some(size)) = (number("pagesize").filter(|page| *page >= 1024), number("size")) else {
        return Err(Error::Invalid(format!(
            "options {options:?} of a hugetlbfs mount must have pagesize and size in bytes"
        )));
    };
    let file = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", page / 1024);
    let count = || -> std::io::Result<u64> { fs::read_to_string(&file)?.trim().parse().map_err(std::io::Error::other) };
    let had = count().map_err(Error::failed(format!("reserving huge pages of {page} bytes: {file}")))?;
    let wanted = had.saturating_add(size.div_ceil(page));
    fs::write(&file, wanted.to_string()).map_err(Error::failed(file.as_str()))?;
    let has = count().map_err(Error::failed(file.as_str()))?;
    if has < wanted {
        // what cannot be used as a whole is given back
        let _ = fs::write(&file, had.to_string());
        return Err(Error::Failed(format!(
            "the VM has memory for {} of {} huge pages of {page} bytes: raise default_memory in [hypervisor]",
            has.saturating_sub(had),
            wanted - had
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_volumes_are_told() {
        let path = |rest: &str| format!("{}/{rest}", paths::SANDBOX_LOCAL);
        let (whole, part) = (path("scratch"), path("scratch/a/b"));
        assert_eq!(volume_and_rest(&part), Some((whole.as_str(), "a/b")));
        for other in [whole.as_str(), &path(""), &path("scratch/"), &path("/a"), paths::SANDBOX_SHM, "/a/b"] {
            assert_eq!(volume_and_rest(other), None, "{other}");
        }
    }

    #[test]
    fn sizes_beyond_the_memory_are_left_out() {
        let options = |size: u64| within_memory(&["mode=0700".to_owned(), format!("size={size}")]);
        assert_eq!(options(4096), ["mode=0700", "size=4096"]);
        assert_eq!(options(1 << 60), ["mode=0700"]);
    }

    #[test]
    fn mount_points_are_the_agents() {
        below_run("/run/kata-containers/disks/disk1").expect("ours");
        for point in ["/etc", "/run/../etc", "run/x", ""] {
            below_run(point).expect_err(point);
        }
    }

    #[test]
    fn driver_options_have_names() {
        let driver_options = ["a.device=02/02", "a.devices=x", "a.device"].map(String::from).into();
        let storage = Storage { driver_options, ..Default::default() };
        assert_eq!(super::driver_options(&storage, "a.device").collect::<Vec<_>>(), ["02/02"]);
    }
}
