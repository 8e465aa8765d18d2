//! Block devices of the host that a container has as they are: `volumeDevices` of Kubernetes, `ctr run --device`.
//!
//! A privileged container's specification names every device of the host, and means none. What was asked for has a rule by
//! its own number; and where one rule allows everything, it is there besides: by another path, or twice by the same.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceType, Spec};

use crate::Error;

/// One of them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RawDevice {
    /// Where the container has it.
    pub(crate) path: String,
    /// Where the host has it.
    pub(crate) host: PathBuf,
    /// No rule lets it be written.
    pub(crate) read_only: bool,
}

/// Those of a specification.
pub(crate) fn devices(oci: &Spec) -> Result<Vec<RawDevice>, Error> {
    let linux = oci.linux().as_ref();
    let nodes = linux.and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    let mut found: Vec<RawDevice> = Vec::new();
    for node in nodes.iter().filter(|node| node.typ() == LinuxDeviceType::B) {
        let (path, number) = (node.path().display().to_string(), (node.major(), node.minor()));
        let rule = allowed(oci, number);
        let twice =
            || nodes.iter().filter(|other| other.path() == node.path() && other.major() == number.0).count() > 1;
        if found.iter().any(|other| other.path == path) || (rule.is_none() && !is_elsewhere(&path, number) && !twice())
        {
            continue;
        }
        match host_path(&path, number) {
            // a node with nothing behind it, as runc makes it
            Err(_) if rule.is_none() => {}
            host => found.push(RawDevice { host: host?, path, read_only: rule == Some(true) }),
        }
    }
    Ok(found)
}

/// The host has it, and not by this path.
fn is_elsewhere(path: &str, number: (i64, i64)) -> bool {
    !fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device() && number_of(meta.rdev()) == number)
}

fn number_of(device: u64) -> (i64, i64) {
    (libc::major(device).into(), libc::minor(device).into())
}

/// Whether a rule names a device; `Some(true)` for reading only.
fn allowed(oci: &Spec, number: (i64, i64)) -> Option<bool> {
    let rules = oci.linux().as_ref()?.resources().as_ref()?.devices().as_ref()?;
    let own = rules.iter().filter(|rule| {
        let is_block = rule.typ().is_some_and(|kind| kind == LinuxDeviceType::B);
        rule.allow() && is_block && (rule.major(), rule.minor()) == (Some(number.0), Some(number.1))
    });
    let access: Vec<_> = own.map(|rule| rule.access().as_deref().unwrap_or("rwm")).collect();
    if access.is_empty() { None } else { Some(!access.iter().any(|letters| letters.contains('w'))) }
}

/// The host's node of a number: the container's path may be another.
fn host_path(path: &str, (major, minor): (i64, i64)) -> Result<PathBuf, Error> {
    let named = |what: String| Error::host(format!("device {path} ({major}:{minor}): {what}"));
    let sysfs = format!("/sys/dev/block/{major}:{minor}/uevent");
    let told = fs::read_to_string(&sysfs).map_err(named("the host has no such block device".into()))?;
    let name = told.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or_default();
    let node = Path::new("/dev").join(name);
    let meta = fs::metadata(&node).map_err(named(node.display().to_string()))?;
    if !meta.file_type().is_block_device() || number_of(meta.rdev()) != (major, minor) {
        return Err(Error::Invalid(format!("{} is not the block device {major}:{minor}", node.display())));
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(rules: &serde_json::Value) -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": {
                "devices": [{"path": "/dev/x", "type": "b", "major": 4095, "minor": 1},
                    {"path": "/dev/y", "type": "c", "major": 4095, "minor": 1}],
                "resources": {"devices": rules}}
        }))
        .expect("a specification")
    }

    #[test]
    fn only_what_a_rule_names_is_meant() {
        let all = serde_json::json!([{"allow": true, "access": "rwm"}]);
        assert_eq!(devices(&spec(&all)).expect("none"), []);
        assert_eq!(allowed(&spec(&all), (4095, 1)), None);
        let rule = |access: &str| serde_json::json!([{"allow": true, "type": "b", "major": 4095, "minor": 1, "access": access}]);
        assert_eq!(allowed(&spec(&rule("rwm")), (4095, 1)), Some(false));
        assert_eq!(allowed(&spec(&rule("rm")), (4095, 1)), Some(true));
        // without a rule, a node with nothing behind it is none of ours
        assert_eq!(devices(&spec(&serde_json::json!([]))).expect("none"), []);
        let error = devices(&spec(&rule("r"))).expect_err("the host has none").to_string();
        assert!(error.contains("/dev/x (4095:1)"), "{error}");
    }

    #[test]
    fn a_privileged_container_may_have_one_besides() {
        let Some((path, number)) = fs::read_dir("/dev").into_iter().flatten().flatten().find_map(|entry| {
            let meta = entry.metadata().ok().filter(|meta| meta.file_type().is_block_device())?;
            let number = number_of(meta.rdev());
            host_path("x", number).is_ok_and(|path| path == entry.path()).then(|| (entry.path(), number))
        }) else {
            return;
        };
        let own = path.display().to_string();
        let found = |paths: &[&str]| {
            let node =
                |path: &&str| serde_json::json!({"path": path, "type": "b", "major": number.0, "minor": number.1});
            let oci: Spec = serde_json::from_value(serde_json::json!({"ociVersion": "1.0.2", "linux": {
                "devices": paths.iter().map(node).collect::<Vec<_>>(),
                "resources": {"devices": [{"allow": true, "access": "rwm"}]}}}))
            .expect("a specification");
            devices(&oci).expect("found").into_iter().map(|device| device.path).collect::<Vec<_>>()
        };
        assert_eq!(found(&[&own]), Vec::<String>::new());
        assert_eq!(found(&["/dev/wanted", &own]), ["/dev/wanted"]);
        assert_eq!(found(&[&own, &own]), [own.as_str()]);
    }
}
