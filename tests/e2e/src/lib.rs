//! The harness of the whole-product tests: a private containerd with the product's shim first in its PATH, an image
//! built from busybox, `ctr` as users run it, and a look at the machine before and after that finds what was left.
//!
//! Owns starting and ending all that; what is expected of the product stands in `tests/`, how fast it is in `bench`.

pub mod compile;
pub mod containerd;
pub mod containers;
pub mod cri;
pub mod ctr;
pub mod dead_fs;
pub mod docker;
pub mod events;
pub mod host;
pub mod image;
pub mod install;
pub mod inventory;
pub mod journal;
pub mod kubelet;
pub mod leaks;
pub mod mounts;
pub mod neighbour;
pub mod nerdctl;
pub mod node;
pub mod pod_network;
pub mod ports;
pub mod processes;
pub mod pty;
pub mod snapshotter;
pub mod tap;
pub mod task_api;
pub mod world;

pub use containerd::Containerd;
pub use containers::{BOTH, Runtime};
pub use ctr::Outcome;
pub use node::{Node, NodeSetup, every_containerd, with_every_containerd, with_node, with_node_setup};
