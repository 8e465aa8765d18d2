//! Names and paths in the guest, as Kata lays them out.

/// virtio-fs or 9p tag of the pod's shared folder.
pub const SHARE_TAG: &str = "kataShared";
/// Bundles and sandbox state of the agent.
pub const CONTAINERS: &str = "/run/kata-containers";
/// Where the shared folder is mounted.
pub const SHARED: &str = "/run/kata-containers/shared/containers";
/// The pod's `/dev/shm`.
pub const SANDBOX_SHM: &str = "/run/kata-containers/sandbox/shm";
/// The pod's volumes in memory; a folder each.
pub const SANDBOX_EPHEMERAL: &str = "/run/kata-containers/sandbox/ephemeral";
/// The pod's other volumes that are the VM's own; a folder each.
pub const SANDBOX_LOCAL: &str = "/run/kata-containers/sandbox/local";
/// Copies of small volumes that the host keeps up to date; a folder each.
pub const SANDBOX_WATCHED: &str = "/run/kata-containers/sandbox/watched";
/// Below it: what is mounted from disks of the VM.
pub const DISKS: &str = "/run/kata-containers/disks";
