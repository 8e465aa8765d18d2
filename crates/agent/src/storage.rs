//! `Storage` messages: what the host gives the guest to mount, by driver (Kata's names).

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use agent_api::agent::Storage;
use agent_api::{oci, paths};
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::Error;
use crate::inside;
use crate::launcher::options;

/// Mounts one and returns its mount point.
pub(crate) fn connect(storage: &Storage) -> Result<String, Error> {
    let point = storage.mount_point.as_str();
    if !point.starts_with("/run/") || point.split('/').any(|part| part == "..") {
        return Err(Error::Invalid(format!("mount point {point:?} of a storage is not below /run")));
    }
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

    /// What nobody has any more must not be kept in use on the host.
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
        return Err(Error::Invalid(format!("options {options:?} of huge pages lack pagesize and size in bytes")));
    };
    let file = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", page / 1024);
    let count = || -> std::io::Result<u64> { fs::read_to_string(&file)?.trim().parse().map_err(std::io::Error::other) };
    let had = count().map_err(Error::failed(format!("huge pages of {page} bytes: {file}")))?;
    let wanted = had.saturating_add(size.div_ceil(page));
    fs::write(&file, wanted.to_string()).map_err(Error::failed(file.as_str()))?;
    let has = count().map_err(Error::failed(file.as_str()))?;
    if has < wanted {
        // what cannot be used as a whole is given back
        let _ = fs::write(&file, had.to_string());
        return Err(Error::Failed(format!(
            "the virtual machine has memory for {} of {} huge pages of {page} bytes: raise default_memory",
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
}
