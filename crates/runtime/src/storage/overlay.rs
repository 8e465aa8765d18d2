//! Overlays of the host's folders that a specification asks for. The guest does not see the folders, so the host puts them
//! together in the share, and the guest binds the outcome.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use agent_api::{mount_options, oci};
use nix::mount::{MsFlags, mount};

use super::rootfs;
use super::share::{PodFolder, guest_path};
use super::source::{GuestWritable, Source};
use crate::host_work::Progress;
use crate::{ContainerId, Error};

/// The name of the file system.
const KIND: &str = "overlay";
/// As many layers as the kernel puts together (`OVL_MAX_STACK` of fs/overlayfs).
const LAYERS: usize = 500;

/// Whether this is one.
pub(super) fn is_one(mount: &oci::Mount) -> bool {
    mount.type_ == KIND && !mount.options.iter().any(|option| option == "bind" || option == "rbind")
}

/// Mounts it below the share and makes `mount` a bind mount of it. The name in the share comes back by `names` also when
/// the rest failed.
pub(super) fn connect(
    share: &PodFolder,
    id: &ContainerId,
    writable: &GuestWritable,
    mount: &mut oci::Mount,
    names: &mut Vec<String>,
    progress: &Progress,
) -> Result<(), Error> {
    let what = format!("the overlay mount on {}", mount.destination);
    share.must_serve(&what)?;
    let own = own_options(mount);
    let (flags, options) = rootfs::parse(&own);
    // held until it is mounted: the kernel is told of what was looked at, not of a path
    let mut layers = Vec::new();
    let data = options
        .into_iter()
        .map(|option| {
            progress.step(format!("{option} of {what}"))?;
            by_descriptors(option, &what, writable, &mut layers)
        })
        .collect::<Result<Vec<_>, _>>()?
        .join(",");
    progress.step(what.clone())?;
    let name = share.shelf().own(id.as_str());
    let target = share.host_path(&name);
    names.push(name.clone());
    std::fs::create_dir(&target).map_err(Error::host(target.display().to_string()))?;
    // for the guest alone, as every volume
    let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let data = CString::new(data).map_err(|_| Error::Invalid(format!("{what}: an option has a zero byte")))?;
    mount_overlay(&target, flags, &data).map_err(Error::host(what))?;
    mount.type_ = "bind".into();
    mount.source = guest_path(&name);
    mount.options.retain(|option| mount_options::NAMES.contains(&option.as_str()));
    mount.options.push("bind".into());
    Ok(())
}

fn mount_overlay(target: &Path, flags: MsFlags, data: &CString) -> std::io::Result<()> {
    Ok(mount(Some(KIND), target, Some(KIND), flags, Some(data.as_c_str()))?)
}

/// Those of the mount itself that the host needs, and the file system's.
fn own_options(mount: &oci::Mount) -> Vec<String> {
    let of_the_guest = |option: &String| mount_options::NAMES.contains(&option.as_str()) && option != "ro";
    mount.options.iter().filter(|option| !of_the_guest(option)).cloned().collect()
}

/// An option with its folders opened, and named by their descriptors.
fn by_descriptors(
    option: &str,
    what: &str,
    writable: &GuestWritable,
    layers: &mut Vec<Source>,
) -> Result<String, Error> {
    let Some((key, value)) = option.split_once('=') else { return Ok(option.to_owned()) };
    let paths = match key {
        "lowerdir" => split(value),
        "upperdir" | "workdir" => vec![Some(unescaped(value))],
        _ => return Ok(option.to_owned()),
    };
    let mut named = Vec::new();
    for path in paths {
        // two colons begin the layers that have data alone
        let Some(path) = path else {
            named.push(String::new());
            continue;
        };
        if !path.is_absolute() || layers.len() >= LAYERS {
            return Err(Error::Invalid(format!(
                "{what}: {key} {:.200?} must be absolute paths, {LAYERS} at most",
                value.chars().take(200).collect::<String>()
            )));
        }
        let layer =
            Source::open(&path, writable).map_err(Error::host(format!("{key} {} of {what}", path.display())))?;
        if layer.is_guests() {
            return Err(Error::Unsupported(format!(
                "{key} {} of {what} is in a folder that a virtual machine can write to: give it a folder of its own",
                path.display()
            )));
        }
        named.push(format!("/proc/self/fd/{}", layer.as_fd().as_raw_fd()));
        layers.push(layer);
    }
    Ok(format!("{key}={}", named.join(":")))
}

/// At colons that no backslash is before; `None` is between two of them.
fn split(value: &str) -> Vec<Option<PathBuf>> {
    let mut parts = vec![String::new()];
    let mut letters = value.chars();
    while let Some(letter) = letters.next() {
        match (letter, parts.last_mut()) {
            (':', _) => parts.push(String::new()),
            ('\\', Some(part)) => part.extend(letters.next()),
            (letter, Some(part)) => part.push(letter),
            (_, None) => {}
        }
    }
    parts.into_iter().map(|part| (!part.is_empty()).then(|| part.into())).collect()
}

fn unescaped(value: &str) -> PathBuf {
    let mut letters = value.chars();
    let mut out = String::new();
    while let Some(letter) = letters.next() {
        out.extend(if letter == '\\' { letters.next() } else { Some(letter) });
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_by_their_descriptors() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a:b");
        std::fs::create_dir(&path).expect("made");
        let (mut layers, none) = (Vec::new(), GuestWritable::default());
        let escaped = path.display().to_string().replace(':', "\\:");
        let mut named = |option: &str| by_descriptors(option, "it", &none, &mut layers);
        let lower = named(&format!("lowerdir={escaped}:{}", folder.path().display())).expect("opened");
        let parts: Vec<_> = lower.strip_prefix("lowerdir=").expect("kept").split(':').collect();
        assert_eq!(std::fs::read_link(parts[0]).expect("open"), path);
        assert_eq!(std::fs::read_link(parts[1]).expect("open"), folder.path());
        assert_eq!(named("index=off").expect("passed on"), "index=off");
        assert_eq!(named("userxattr").expect("passed on"), "userxattr");
        assert!(named("upperdir=x").expect_err("relative").to_string().contains("absolute"));
        assert!(named("workdir=/no/such").expect_err("missing").to_string().contains("workdir /no/such"));
    }

    #[test]
    fn what_is_the_guests_stays_the_guests() {
        let options = ["ro", "nosuid", "rprivate", "lowerdir=/a", "index=off"].map(String::from).into();
        let mount = oci::Mount { type_: "overlay".into(), options, ..Default::default() };
        assert!(is_one(&mount));
        assert_eq!(own_options(&mount), ["ro", "lowerdir=/a", "index=off"]);
    }
}
