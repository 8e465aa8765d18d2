//! Boots virtual machines for anyone.
//!
//! Owns the border to VMMs: the traits [`Hypervisor`] and [`Vm`] with their optional parts, what a VM is made of ([`VmSpec`]),
//! what a driver can do ([`Capabilities`]), and a folder a driver. Knows nothing of containers, OCI, containerd or the agent's
//! protocol. Outside a driver's folder nothing is said that is true of one VMM only (`cargo run -p xtask tidy` checks it).
//!
//! A VM is described as data, then launched: there is no half-made VM to be configured. What the host gives to the VMM
//! (sockets, the guest's channel) it gives as open file descriptors, so that the VMM opens nothing by path that could
//! be passed.

mod capabilities;
pub mod console;
mod driver;
mod error;
mod guest_kernel;
pub mod helper;
mod holes;
pub mod pidfd;
pub mod qemu;
mod spec;
mod vm;
mod vsock;

pub use self::capabilities::{Capabilities, ChannelKind, DaemonSocket, DeviceKind, SharingKind};
pub use self::console::Console;
pub use self::driver::{Adoption, ChannelNames, Hypervisor, Lent, LentProcess};
pub use self::error::Error;
pub use self::holes::next_data;
pub use self::spec::{
    Address, Begin, Boot, Channel, CloneMemory, DaemonEnd, Device, Disk, FileServer, Hello, HostDevice, Image,
    NetDevice, Root, SharedDir, Size, Snapshot, Verity, VmSpec,
};
pub use self::vm::{Fault, HandOver, HotPlug, Rescan, Resize, Snapshots, Vm, VmExit};
