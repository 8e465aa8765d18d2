//! What a pod's containers see of the host's files.

mod assemble;
pub(crate) mod block;
mod daemon;
pub(crate) mod disks;
mod kubelet;
mod late;
mod layers;
mod local;
mod loop_device;
pub(crate) mod open_files;
mod overlay;
mod raw;
pub(crate) mod rootfs;
pub(crate) mod share;
mod shelf;
pub(crate) mod shm;
mod snapshot;
mod source;
pub(crate) mod tree;
pub(crate) mod volume;
mod watched;
