//! Stand-ins for tests without a VM: an agent that speaks the real protocol and answers by a script.

pub(crate) mod agent;
