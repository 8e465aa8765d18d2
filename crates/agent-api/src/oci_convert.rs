//! OCI runtime specification (JSON types) → the agent's messages. The way back is not needed: the agent works on
//! messages.
//!
//! What the wire cannot carry is refused by name here, never dropped in silence.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime as spec;
use protobuf::MessageField;

use crate::oci;

/// A part of the specification that the guest cannot honour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported(pub String);

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is not supported in a virtual machine: remove it from the container's specification", self.0)
    }
}

impl std::error::Error for Unsupported {}

type Result<T> = std::result::Result<T, Unsupported>;

/// The whole specification.
///
/// # Errors
/// Names the first part that the wire has no place for.
pub fn spec(from: &spec::Spec) -> Result<oci::Spec> {
    Ok(oci::Spec {
        Version: from.version().clone(),
        Process: from.process().as_ref().map(process).transpose()?.into(),
        Root: from
            .root()
            .as_ref()
            .map(|root| oci::Root {
                Path: text(root.path()),
                Readonly: root.readonly().unwrap_or_default(),
                ..Default::default()
            })
            .into(),
        Hostname: from.hostname().clone().unwrap_or_default(),
        Mounts: many(from.mounts().as_ref(), mount)?,
        Hooks: from.hooks().as_ref().map(hooks).into(),
        Annotations: from.annotations().clone().unwrap_or_default(),
        Linux: from.linux().as_ref().map(linux).transpose()?.into(),
        ..Default::default()
    })
}

/// One process: a container's first or an exec.
///
/// # Errors
/// As [`spec`].
pub fn process(from: &spec::Process) -> Result<oci::Process> {
    refuse(from.io_priority().is_some(), "process.ioPriority")?;
    refuse(from.scheduler().is_some(), "process.scheduler")?;
    refuse(from.exec_cpu_affinity().is_some(), "process.execCPUAffinity")?;
    let user = from.user();
    Ok(oci::Process {
        Terminal: from.terminal().unwrap_or_default(),
        ConsoleSize: from
            .console_size()
            .as_ref()
            .map(|size| oci::Box { Height: size.height() as u32, Width: size.width() as u32, ..Default::default() })
            .into(),
        User: MessageField::some(oci::User {
            UID: user.uid(),
            GID: user.gid(),
            AdditionalGids: user.additional_gids().clone().unwrap_or_default(),
            Username: user.username().clone().unwrap_or_default(),
            Umask: user.umask(),
            ..Default::default()
        }),
        Args: from.args().clone().unwrap_or_default(),
        Env: from.env().clone().unwrap_or_default(),
        Cwd: text(from.cwd()),
        Capabilities: from.capabilities().as_ref().map(capabilities).into(),
        Rlimits: from
            .rlimits()
            .iter()
            .flatten()
            .map(|limit| oci::POSIXRlimit {
                Type: name(&limit.typ()),
                Hard: limit.hard(),
                Soft: limit.soft(),
                ..Default::default()
            })
            .collect(),
        NoNewPrivileges: from.no_new_privileges().unwrap_or_default(),
        ApparmorProfile: from.apparmor_profile().clone().unwrap_or_default(),
        OOMScoreAdj: i64::from(from.oom_score_adj().unwrap_or_default()),
        SelinuxLabel: from.selinux_label().clone().unwrap_or_default(),
        ..Default::default()
    })
}

/// Limits, at the start and for an update.
///
/// # Errors
/// As [`spec`].
pub fn resources(from: &spec::LinuxResources) -> Result<oci::LinuxResources> {
    refuse(from.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()), "linux.resources.rdma")?;
    Ok(oci::LinuxResources {
        Devices: from.devices().iter().flatten().map(device_rule).collect(),
        Memory: from
            .memory()
            .as_ref()
            .map(|memory| oci::LinuxMemory {
                Limit: memory.limit().unwrap_or_default(),
                Reservation: memory.reservation().unwrap_or_default(),
                Swap: memory.swap().unwrap_or_default(),
                Kernel: memory.kernel().unwrap_or_default(),
                KernelTCP: memory.kernel_tcp().unwrap_or_default(),
                Swappiness: memory.swappiness().unwrap_or_default(),
                DisableOOMKiller: memory.disable_oom_killer().unwrap_or_default(),
                ..Default::default()
            })
            .into(),
        CPU: from.cpu().as_ref().map(cpu).transpose()?.into(),
        Pids: from.pids().as_ref().map(|pids| oci::LinuxPids { Limit: pids.limit(), ..Default::default() }).into(),
        BlockIO: from.block_io().as_ref().map(block_io).into(),
        HugepageLimits: from
            .hugepage_limits()
            .iter()
            .flatten()
            .map(|limit| oci::LinuxHugepageLimit {
                Pagesize: limit.page_size().clone(),
                Limit: limit.limit() as u64,
                ..Default::default()
            })
            .collect(),
        Unified: from.unified().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn cpu(from: &spec::LinuxCpu) -> Result<oci::LinuxCPU> {
    refuse(from.idle().is_some_and(|idle| idle != 0), "linux.resources.cpu.idle")?;
    refuse(from.burst().is_some_and(|burst| burst != 0), "linux.resources.cpu.burst")?;
    Ok(oci::LinuxCPU {
        Shares: from.shares().unwrap_or_default(),
        Quota: from.quota().unwrap_or_default(),
        Period: from.period().unwrap_or_default(),
        RealtimeRuntime: from.realtime_runtime().unwrap_or_default(),
        RealtimePeriod: from.realtime_period().unwrap_or_default(),
        Cpus: from.cpus().clone().unwrap_or_default(),
        Mems: from.mems().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn block_io(from: &spec::LinuxBlockIo) -> oci::LinuxBlockIO {
    let throttle = |devices: &Option<Vec<spec::LinuxThrottleDevice>>| {
        devices
            .iter()
            .flatten()
            .map(|device| oci::LinuxThrottleDevice {
                Major: device.major(),
                Minor: device.minor(),
                Rate: device.rate(),
                ..Default::default()
            })
            .collect()
    };
    oci::LinuxBlockIO {
        Weight: from.weight().unwrap_or_default().into(),
        LeafWeight: from.leaf_weight().unwrap_or_default().into(),
        WeightDevice: from
            .weight_device()
            .iter()
            .flatten()
            .map(|device| oci::LinuxWeightDevice {
                Major: device.major(),
                Minor: device.minor(),
                Weight: device.weight().unwrap_or_default().into(),
                LeafWeight: device.leaf_weight().unwrap_or_default().into(),
                ..Default::default()
            })
            .collect(),
        ThrottleReadBpsDevice: throttle(from.throttle_read_bps_device()),
        ThrottleWriteBpsDevice: throttle(from.throttle_write_bps_device()),
        ThrottleReadIOPSDevice: throttle(from.throttle_read_iops_device()),
        ThrottleWriteIOPSDevice: throttle(from.throttle_write_iops_device()),
        ..Default::default()
    }
}

fn linux(from: &spec::Linux) -> Result<oci::Linux> {
    refuse(from.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()), "linux.timeOffsets")?;
    refuse(from.personality().is_some(), "linux.personality")?;
    refuse(from.memory_policy().is_some(), "linux.memoryPolicy")?;
    refuse(from.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()), "linux.netDevices")?;
    refuse(from.intel_rdt().is_some(), "linux.intelRdt")?;
    Ok(oci::Linux {
        UIDMappings: from.uid_mappings().iter().flatten().map(id_mapping).collect(),
        GIDMappings: from.gid_mappings().iter().flatten().map(id_mapping).collect(),
        Sysctl: from.sysctl().clone().unwrap_or_default(),
        Resources: from.resources().as_ref().map(resources).transpose()?.into(),
        CgroupsPath: from.cgroups_path().as_ref().map(|path| text(path)).unwrap_or_default(),
        Namespaces: from
            .namespaces()
            .iter()
            .flatten()
            .map(|namespace| oci::LinuxNamespace {
                Type: name(&namespace.typ()),
                Path: namespace.path().as_ref().map(|path| text(path)).unwrap_or_default(),
                ..Default::default()
            })
            .collect(),
        Devices: from
            .devices()
            .iter()
            .flatten()
            .map(|device| oci::LinuxDevice {
                Path: text(device.path()),
                Type: name(&device.typ()),
                Major: device.major(),
                Minor: device.minor(),
                FileMode: device.file_mode().unwrap_or(0o666),
                UID: device.uid().unwrap_or_default(),
                GID: device.gid().unwrap_or_default(),
                ..Default::default()
            })
            .collect(),
        Seccomp: from.seccomp().as_ref().map(seccomp).transpose()?.into(),
        RootfsPropagation: from.rootfs_propagation().clone().unwrap_or_default(),
        MaskedPaths: from.masked_paths().clone().unwrap_or_default(),
        ReadonlyPaths: from.readonly_paths().clone().unwrap_or_default(),
        MountLabel: from.mount_label().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn seccomp(from: &spec::LinuxSeccomp) -> Result<oci::LinuxSeccomp> {
    refuse(from.listener_path().is_some(), "linux.seccomp.listenerPath")?;
    Ok(oci::LinuxSeccomp {
        DefaultAction: name(&from.default_action()),
        DefaultErrnoRet: from.default_errno_ret(),
        Architectures: from.architectures().iter().flatten().map(name).collect(),
        Flags: from.flags().iter().flatten().map(name).collect(),
        Syscalls: from
            .syscalls()
            .iter()
            .flatten()
            .map(|call| oci::LinuxSyscall {
                Names: call.names().clone(),
                Action: name(&call.action()),
                ErrnoRet: call.errno_ret().map(oci::linux_syscall::ErrnoRet::Errnoret),
                Args: call
                    .args()
                    .iter()
                    .flatten()
                    .map(|arg| oci::LinuxSeccompArg {
                        Index: arg.index() as u64,
                        Value: arg.value(),
                        ValueTwo: arg.value_two().unwrap_or_default(),
                        Op: name(&arg.op()),
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    })
}

fn mount(from: &spec::Mount) -> Result<oci::Mount> {
    refuse(
        from.uid_mappings().as_ref().is_some_and(|map| !map.is_empty())
            || from.gid_mappings().as_ref().is_some_and(|map| !map.is_empty()),
        "mounts[].uidMappings",
    )?;
    Ok(oci::Mount {
        destination: text(from.destination()),
        source: from.source().as_ref().map(|path| text(path)).unwrap_or_default(),
        type_: from.typ().clone().unwrap_or_default(),
        options: from.options().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn hooks(from: &spec::Hooks) -> oci::Hooks {
    #[allow(deprecated, reason = "prestart is deprecated in the specification and still used")]
    let prestart = from.prestart();
    oci::Hooks {
        Prestart: hook_list(prestart.as_ref()),
        Poststart: hook_list(from.poststart().as_ref()),
        Poststop: hook_list(from.poststop().as_ref()),
        CreateRuntime: hook_list(from.create_runtime().as_ref()),
        CreateContainer: hook_list(from.create_container().as_ref()),
        StartContainer: hook_list(from.start_container().as_ref()),
        ..Default::default()
    }
}

fn hook_list(from: Option<&Vec<spec::Hook>>) -> Vec<oci::Hook> {
    from.into_iter()
        .flatten()
        .map(|hook| oci::Hook {
            Path: text(hook.path()),
            Args: hook.args().clone().unwrap_or_default(),
            Env: hook.env().clone().unwrap_or_default(),
            Timeout: hook.timeout().unwrap_or_default(),
            ..Default::default()
        })
        .collect()
}

fn capabilities(from: &spec::LinuxCapabilities) -> oci::LinuxCapabilities {
    let set = |caps: &Option<spec::Capabilities>| caps.iter().flatten().map(name).collect();
    oci::LinuxCapabilities {
        Bounding: set(from.bounding()),
        Effective: set(from.effective()),
        Inheritable: set(from.inheritable()),
        Permitted: set(from.permitted()),
        Ambient: set(from.ambient()),
        ..Default::default()
    }
}

fn device_rule(from: &spec::LinuxDeviceCgroup) -> oci::LinuxDeviceCgroup {
    oci::LinuxDeviceCgroup {
        Allow: from.allow(),
        Type: from.typ().as_ref().map(name).unwrap_or_default(),
        // the specification leaves a wildcard out, the wire says it with -1
        Major: from.major().unwrap_or(-1),
        Minor: from.minor().unwrap_or(-1),
        Access: from.access().clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn id_mapping(from: &spec::LinuxIdMapping) -> oci::LinuxIDMapping {
    oci::LinuxIDMapping {
        HostID: from.host_id(),
        ContainerID: from.container_id(),
        Size: from.size(),
        ..Default::default()
    }
}

fn many<A, B>(from: Option<&Vec<A>>, convert: impl Fn(&A) -> Result<B>) -> Result<Vec<B>> {
    from.into_iter().flatten().map(convert).collect()
}

fn refuse(present: bool, what: &str) -> Result<()> {
    if present { Err(Unsupported(what.to_owned())) } else { Ok(()) }
}

/// The name that the specification gives an enum's value: what serde writes.
fn name<T: serde::Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// Paths of a specification are JSON strings, so this loses nothing.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Annotations that the agent reads; the host's own are not its business.
pub fn guest_annotations(all: &HashMap<String, String>) -> HashMap<String, String> {
    all.iter()
        .filter(|(key, _)| key.starts_with("io.katacontainers.") || key.starts_with("cdi.k8s.io/"))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: serde_json::Value) -> spec::Spec {
        serde_json::from_value(json).expect("a specification")
    }

    #[test]
    fn carries_process_and_seccomp() {
        let from = parse(serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"terminal": true, "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [5]},
                "args": ["sh"], "cwd": "/", "capabilities": {"bounding": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 8}], "noNewPrivileges": true},
            "root": {"path": "rootfs", "readonly": true},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 7}},
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                        "args": [{"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]}]}}
        }));
        let to = spec(&from).expect("convertible");
        let process = &to.Process;
        assert_eq!((process.User.UID, process.User.Umask), (1, Some(18)));
        assert_eq!(process.Capabilities.Bounding, ["CAP_KILL"]);
        assert_eq!(process.Rlimits[0].Type, "RLIMIT_NOFILE");
        let linux = &to.Linux;
        assert_eq!(linux.Namespaces[1].Type, "network");
        assert_eq!(linux.Resources.Devices[0].Major, -1);
        assert_eq!(linux.Seccomp.DefaultAction, "SCMP_ACT_ERRNO");
        assert_eq!(linux.Seccomp.DefaultErrnoRet, Some(38));
        assert_eq!(linux.Seccomp.Architectures, ["SCMP_ARCH_X86_64"]);
        assert_eq!(linux.Seccomp.Syscalls[0].Args[0].Op, "SCMP_CMP_EQ");
    }

    #[test]
    fn names_what_it_cannot_carry() {
        let from = parse(serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": {"timeOffsets": {"monotonic": {"secs": 1}}}
        }));
        assert_eq!(spec(&from), Err(Unsupported("linux.timeOffsets".into())));
    }
}
