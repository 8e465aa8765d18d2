//! Names and paths in the guest, as Kata lays them out.

/// virtio-fs or 9p tag of the pod's shared folder.
pub const SHARE_TAG: &str = "kataShared";
/// Bundles and sandbox state of the agent.
pub const CONTAINERS: &str = "/run/kata-containers";
/// Where the shared folder is mounted.
pub const SHARED: &str = "/run/kata-containers/shared/containers";
/// The pod's `/dev/shm`.
pub const SANDBOX_SHM: &str = "/run/kata-containers/sandbox/shm";
