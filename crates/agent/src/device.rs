//! Disks that a container has as raw devices: the specification says the host's numbers, the guest's kernel chose others.

use std::time::Duration;

use agent_api::agent::Device;
use agent_api::oci;
use agent_api::storage::READ_ONLY;

use crate::disk::{self, Disk};
use crate::error::Error;

/// Gives the specification the guest's numbers: its nodes, and the rules of who may open them.
pub(crate) async fn translate(devices: &[Device], spec: &mut oci::Spec, patience: Duration) -> Result<(), Error> {
    let mut found = Vec::with_capacity(devices.len());
    for device in devices {
        let disk = disk::find(&device.type_, &device.id, patience).await?;
        if device.options.iter().any(|option| option == READ_ONLY) {
            disk.forbid_writing()?;
        }
        found.push((device.container_path.as_str(), disk));
    }
    if found.is_empty() {
        return Ok(());
    }
    let linux = spec
        .Linux
        .as_mut()
        .ok_or_else(|| Error::Invalid("the specification has devices but no linux section".into()))?;
    rewrite(&found, linux)
}

fn rewrite(found: &[(&str, Disk)], linux: &mut oci::Linux) -> Result<(), Error> {
    // all at once: one disk's number on the host may be another's in the guest
    let mut numbers = Vec::new();
    for (path, disk) in found {
        let mut nodes = linux.Devices.iter_mut().filter(|node| node.Path == *path && node.Type == "b");
        let node = nodes
            .next()
            .ok_or_else(|| Error::Invalid(format!("device {path:.200?} is not in the container's specification")))?;
        let (major, minor) = (disk.major as i64, disk.minor as i64);
        numbers.push(((node.Major, node.Minor), (major, minor)));
        (node.Major, node.Minor) = (major, minor);
    }
    let Some(resources) = linux.Resources.as_mut() else { return Ok(()) };
    for rule in resources.Devices.iter_mut().filter(|rule| rule.Type == "b") {
        if let Some((_, new)) = numbers.iter().find(|(old, _)| *old == (rule.Major, rule.Minor)) {
            (rule.Major, rule.Minor) = *new;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(minor: u64) -> Disk {
        Disk { path: "/dev/vdx".into(), major: 254, minor }
    }

    #[test]
    fn nodes_and_rules_get_the_guests_numbers() {
        let node = |path: &str, major, minor| oci::LinuxDevice {
            Path: path.into(),
            Type: "b".into(),
            Major: major,
            Minor: minor,
            ..Default::default()
        };
        let rule = |kind: &str, major, minor| oci::LinuxDeviceCgroup {
            Allow: true,
            Type: kind.into(),
            Major: major,
            Minor: minor,
            ..Default::default()
        };
        let mut linux = oci::Linux {
            // the second has in the guest what is the first's on the host
            Devices: vec![node("/dev/a", 254, 16), node("/dev/b", 7, 3)],
            Resources: Some(oci::LinuxResources {
                Devices: vec![rule("b", 7, 3), rule("b", 254, 16), rule("c", 7, 3), rule("b", -1, -1)],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        rewrite(&[("/dev/a", disk(0)), ("/dev/b", disk(16))], &mut linux).expect("translated");
        let nodes: Vec<_> = linux.Devices.iter().map(|node| (node.Major, node.Minor)).collect();
        assert_eq!(nodes, [(254, 0), (254, 16)]);
        let rules: Vec<_> = linux.Resources.Devices.iter().map(|rule| (rule.Major, rule.Minor)).collect();
        assert_eq!(rules, [(254, 16), (254, 0), (7, 3), (-1, -1)]);
        rewrite(&[("/dev/c", disk(0))], &mut linux).expect_err("no such node");
    }
}
