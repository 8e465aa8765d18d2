//! What a pod's containers see of the host's files.

mod daemon;
pub(crate) mod rootfs;
pub(crate) mod share;
pub(crate) mod shm;
pub(crate) mod tree;
pub(crate) mod volume;
