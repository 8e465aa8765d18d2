//! A pod: its VM, its containers, what they share with the host, and the way back to a clean host.
//!
//! Owns [`Sandbox`]: the one handle through which the shim asks for anything. Knows neither containerd nor its protocol;
//! talks to the guest through the agent's protocol and to VMMs through the `hypervisor` crate.

mod agent_channel;
mod agent_client;
pub mod anchor;
mod cgroup;
pub mod cleanup;
mod container;
pub mod direct_volume;
mod driver;
mod error;
#[cfg(test)]
mod fakes;
mod host_network;
mod host_work;
mod id;
mod machine;
pub mod management;
mod network;
pub mod pod;
mod request;
mod sandbox;
mod sizing;
mod storage;
pub mod trace;

pub use agent_api;
pub use container::spec::CONFIG_LIMIT;
pub use container::{ExecSpec, Exit, ProcessRef, ProcessView, Status, hooks, process_from_json};
pub use driver::driver;
pub use error::Error;
pub use hypervisor::Size;
pub use id::{ContainerId, ExecId};
pub use machine::{Env, pool, template};
pub use request::{ContainerSpec, RootfsMount, Stdio};
pub use sandbox::{Deleted, Event, FailedStart, Sandbox, SandboxSpec, Started};
