//! Stand-ins for tests without a VM: a driver whose VMs are idle processes, and an agent that speaks the real protocol and
//! answers by a script.

pub(crate) mod agent;
pub(crate) mod vm;
