//! Machines: virtual machines whose agent answers, wherever they come from.
//!
//! Owns the one bring-up (`bring_up`): a machine of the `pool`, else a clone of a `template`, else one that boots. Knows what a
//! machine needs on the host (its folder, its place in the pod's cgroup), and nothing of the containers that come into it.

mod bring_up;
#[cfg(test)]
pub(crate) mod fake;
mod guest;
pub mod pool;
mod relay;
mod spec;
pub mod template;
#[cfg(test)]
mod tests;

use hypervisor::Hypervisor;

pub(crate) use self::bring_up::{HostPart, Machine, Origin, Request, bring_up};
pub(crate) use self::guest::while_served;
pub(crate) use self::spec::plain_spec;

/// What a machine needs from outside.
pub struct Env {
    /// The parsed configuration.
    pub config: config::Config,
    /// The VMM driver.
    pub hypervisor: Box<dyn Hypervisor>,
}
