//! The host's specification → the guest's. Pure: what belongs to the host is taken out or refused here.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use agent_api::{oci, oci_convert};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::pod::Role;
use crate::{ContainerId, Error};

/// Largest `config.json` that is read, bytes. The biggest real ones, with long seccomp lists and hundreds of mounts, are
/// near 200 KiB; the guest's protocol ends at 4 MiB.
pub const CONFIG_LIMIT: u64 = 3 << 20;

const FILE: &str = "config.json";

/// What errors call the specification of a bundle.
pub(crate) fn name(bundle: &Path) -> String {
    bundle.join(FILE).display().to_string()
}

/// Reads `config.json` of a bundle.
pub(crate) fn read(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join(FILE);
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(CONFIG_LIMIT + 1).read_to_end(&mut text))
        .map_err(Error::host(path.display().to_string()))?;
    if text.len() as u64 > CONFIG_LIMIT {
        return Err(Error::Invalid(format!("{} is larger than {CONFIG_LIMIT} bytes: shorten it", path.display())));
    }
    let spec = super::json::spec(&text)
        .map_err(|error| Error::Invalid(format!("{} is not an OCI specification: {error}", path.display())))?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::Invalid(format!("{} has no process: nothing to run", path.display())))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::Invalid(format!("{}: process.args must not be empty", path.display())));
    }
    working_folder(process.cwd()).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?;
    Ok(spec)
}

/// The kernel would take another one as from the root, and runc refuses it.
pub(crate) fn working_folder(path: &Path) -> Result<(), Error> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Error::Invalid(format!("process.cwd {:.200?} must be an absolute path", path.display().to_string())))
}

/// What the configuration says of every container.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    /// A seccomp profile that was asked for is kept.
    pub(crate) keep_seccomp: bool,
    /// Nobody expects the network that was asked for, so it may be the host's.
    pub(crate) without_network: bool,
}

impl Policy {
    pub(crate) fn of(runtime: &config::Runtime) -> Self {
        Self { keep_seccomp: !runtime.disable_guest_seccomp, without_network: runtime.disable_new_netns }
    }
}

/// What the agent gets. `root` is the rootfs in the guest.
pub(crate) fn for_guest(
    spec: &Spec,
    id: &ContainerId,
    root: String,
    policy: Policy,
) -> Result<(oci::Spec, bool), Error> {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    let namespace = |wanted| namespaces.iter().find(|namespace| namespace.typ() == wanted);
    if Role::of_spec(spec)? == Role::Alone {
        namespaces.iter().try_for_each(is_its_own)?;
    }
    if namespace(LinuxNamespaceType::Network).is_none() && !policy.without_network {
        return Err(Error::Unsupported(
            "host network is not possible in a virtual machine: give the container a network namespace (no \
             hostNetwork, no --network host, no --net-host)"
                .into(),
        ));
    }
    if namespace(LinuxNamespaceType::Pid).is_none() {
        return Err(Error::Unsupported(
            "the host's processes cannot be shown in a virtual machine: give the container a PID namespace (no \
             hostPID, no --pid=host)"
                .into(),
        ));
    }
    if namespace(LinuxNamespaceType::Ipc).is_none() {
        return Err(Error::Unsupported(
            "the host's IPC objects cannot be reached from a virtual machine: give the container an IPC namespace (no \
             hostIPC, no --ipc=host)"
                .into(),
        ));
    }
    if let Some(hooks) = spec.hooks()
        && hooks.create_container().as_ref().is_some_and(|list| !list.is_empty())
    {
        return Err(Error::Unsupported(
            "a createContainer hook is a program of the host that would have to run in the virtual machine: use \
             createRuntime (on the host, with the container's files) or startContainer (in the container)"
                .into(),
        ));
    }
    // a path means: another container's processes in the same pod
    let shared_pids = namespace(LinuxNamespaceType::Pid).is_some_and(|namespace| namespace.path().is_some());

    let mut guest = oci_convert::spec(spec)?;
    guest.Annotations = oci_convert::guest_annotations(&guest.Annotations);
    if let Some(hooks) = guest.Hooks.take() {
        // the others are the host's
        guest.Hooks = Some(oci::Hooks { StartContainer: hooks.StartContainer, ..Default::default() }).into();
    }
    if let Some(rootfs) = guest.Root.as_mut() {
        rootfs.Path = root;
    }
    if let Some(process) = guest.Process.as_mut() {
        unlabel(process);
    }
    if let Some(linux) = guest.Linux.as_mut() {
        // the VM is the network, cgroup and time namespace; the others are made in the guest
        linux.Namespaces.retain(|namespace| {
            let kind = namespace.Type.as_str();
            let of_the_vm = ["network", "cgroup", "time"].contains(&kind) || (shared_pids && kind == "pid");
            !of_the_vm
        });
        for namespace in &mut linux.Namespaces {
            namespace.Path.clear();
        }
        linux.CgroupsPath = format!("/{id}");
        linux.MountLabel.clear();
        if !policy.keep_seccomp {
            linux.Seccomp.clear();
        }
        if let Some(resources) = linux.Resources.as_mut() {
            for_guest_resources(resources)?;
        }
    }
    Ok((guest, shared_pids))
}

/// A container that is in no pod with others has a machine of its own, and nobody else's namespaces are in it. The
/// network's is no such thing: its interfaces are brought into the machine.
fn is_its_own(namespace: &LinuxNamespace) -> Result<(), Error> {
    let (kind, path) = match (namespace.typ(), namespace.path()) {
        (LinuxNamespaceType::Network, _) | (_, None) => return Ok(()),
        (kind, Some(path)) if !path.as_os_str().is_empty() => (kind, path),
        _ => return Ok(()),
    };
    // as specifications write it
    let kind = if kind == LinuxNamespaceType::Mount { "mount".into() } else { kind.to_string() };
    Err(Error::Unsupported(format!(
        "the {kind} namespace {:.200} cannot be joined: it is another container's or the host's, and this container has \
         a virtual machine of its own: give it a {kind} namespace without a path (no --pid=container:, no \
         --ipc=container:, no --with-ns), or run both in one Kubernetes pod",
        path.display().to_string()
    )))
}

/// Takes out what names the host's processors and devices.
pub(crate) fn for_guest_resources(resources: &mut oci::LinuxResources) -> Result<(), Error> {
    if let Some(cpu) = resources.CPU.as_mut()
        && !(cpu.Cpus.is_empty() && cpu.Mems.is_empty())
    {
        tracing::warn!(
            cpus = cpu.Cpus,
            mems = cpu.Mems,
            "cpuset names the host's processors: not applied in the guest"
        );
        cpu.Cpus.clear();
        cpu.Mems.clear();
    }
    if let Some(block) = resources.BlockIO.as_ref() {
        let devices = block.WeightDevice.len()
            + block.ThrottleReadBpsDevice.len()
            + block.ThrottleWriteBpsDevice.len()
            + block.ThrottleReadIOPSDevice.len()
            + block.ThrottleWriteIOPSDevice.len();
        if devices > 0 {
            return Err(Error::Unsupported(
                "block I/O limits name the host's devices, which the guest does not have: remove them".into(),
            ));
        }
    }
    Ok(())
}

/// Labels of the host's security modules mean nothing to the guest's kernel; the VM is the boundary.
pub(crate) fn unlabel(process: &mut oci::Process) {
    process.ApparmorProfile.clear();
    process.SelinuxLabel.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Policy = Policy { keep_seccomp: true, without_network: false };

    fn spec(namespaces: &serde_json::Value) -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/", "apparmorProfile": "p"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": namespaces, "cgroupsPath": "/a/b", "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
                "resources": {"cpu": {"cpus": "7", "shares": 5}}}
        }))
        .expect("a specification")
    }

    fn id() -> ContainerId {
        ContainerId::try_from("c1").expect("an id")
    }

    #[test]
    fn the_hosts_part_is_taken_out() {
        let spec = spec(&serde_json::json!([{"type": "pid"}, {"type": "network", "path": "/n"}, {"type": "ipc"}]));
        let (guest, shared_pids) = for_guest(&spec, &id(), "/r".into(), KEEP).expect("converted");
        assert!(!shared_pids);
        let types: Vec<_> = guest.Linux.Namespaces.iter().map(|namespace| namespace.Type.as_str()).collect();
        assert_eq!(types, ["pid", "ipc"]);
        assert_eq!((guest.Root.Path.as_str(), guest.Linux.CgroupsPath.as_str()), ("/r", "/c1"));
        assert_eq!(guest.Process.ApparmorProfile, "");
        assert!(guest.Linux.Resources.CPU.Cpus.is_empty() && guest.Linux.Resources.CPU.Shares == 5);
        assert!(guest.Linux.Seccomp.is_some());
        let (guest, _) =
            for_guest(&spec, &id(), "/r".into(), Policy { keep_seccomp: false, ..KEEP }).expect("converted");
        assert!(guest.Linux.Seccomp.is_none());
    }

    #[test]
    fn the_hosts_network_and_processes_are_refused() {
        let error =
            for_guest(&spec(&serde_json::json!([{"type": "pid"}])), &id(), "/r".into(), KEEP).expect_err("host");
        assert!(error.to_string().contains("host network"), "{error}");
        let error =
            for_guest(&spec(&serde_json::json!([{"type": "network"}])), &id(), "/r".into(), KEEP).expect_err("host");
        assert!(error.to_string().contains("PID"), "{error}");
        let without_ipc = serde_json::json!([{"type": "network"}, {"type": "pid"}]);
        let error = for_guest(&spec(&without_ipc), &id(), "/r".into(), KEEP).expect_err("host");
        assert!(error.to_string().contains("IPC"), "{error}");
    }

    #[test]
    fn namespaces_of_others_are_refused_outside_of_a_pod() {
        for kind in ["pid", "ipc", "uts", "mount"] {
            let mut all: Vec<_> =
                ["network", "pid", "ipc", "uts", "mount"].map(|kind| serde_json::json!({"type": kind})).into();
            all.retain(|one| one["type"] != kind);
            all.push(serde_json::json!({"type": kind, "path": "/proc/7/ns/x"}));
            let mut from = spec(&all.into());
            let error = for_guest(&from, &id(), "/r".into(), KEEP).expect_err(kind).to_string();
            assert!(error.contains(&format!("the {kind} namespace /proc/7/ns/x")), "{error}");
            let of_a_pod = [("container-type", "container"), ("sandbox-id", "s1")];
            from.set_annotations(Some(
                of_a_pod.map(|(name, value)| (format!("io.kubernetes.cri.{name}"), value.to_owned())).into(),
            ));
            let (_, shared_pids) = for_guest(&from, &id(), "/r".into(), KEEP).expect("its pod's");
            assert_eq!(shared_pids, kind == "pid");
        }
    }

    #[test]
    fn bad_bundles_are_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("config.json");
        assert!(read(dir.path()).expect_err("missing").to_string().contains("config.json"));
        for (text, part) in [
            ("{", "not an OCI specification"),
            (r#"{"ociVersion":"1.0.2"}"#, "no process"),
            (r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":[],"cwd":"/"}}"#, "process.args"),
            (
                r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["x"],"cwd":"a"}}"#,
                r#"process.cwd "a""#,
            ),
            (
                r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["x"],"cwd":""}}"#,
                r#"process.cwd """#,
            ),
        ] {
            std::fs::write(&path, text).expect("written");
            let error = read(dir.path()).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        }
        std::fs::write(&path, vec![b' '; 20 << 20]).expect("written");
        assert!(read(dir.path()).expect_err("large").to_string().contains("larger"));
    }
}
