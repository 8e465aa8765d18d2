//! What a pod's containers see of the host's files.

mod daemon;
mod kubelet;
mod local;
pub(crate) mod rootfs;
pub(crate) mod share;
mod shelf;
pub(crate) mod shm;
mod snapshot;
mod source;
pub(crate) mod tree;
pub(crate) mod volume;
mod watched;
