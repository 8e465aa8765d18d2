//! The keys of `[agent.kata]`.

use crate::key::Table::Agent;
use crate::key::{Key, Slot, WordAt};
use crate::types::AgentChannel;

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Agent,
        "enable_debug",
        Slot::Truth(|config| &mut config.agent.enable_debug),
        "Sets the agent's log level to debug and writes the agent's log to the shim's.",
    ),
    Key::sets(
        Agent,
        "agent_channel",
        Slot::Word(&WordAt::<AgentChannel>::new(|config| &mut config.agent.channel)),
        "How the shim reaches the agent: \"vsock\" needs /dev/vhost-vsock on the host and is the only way that Kata's own guest \
         images know; \"serial\" is a virtio-serial port, which only our agent knows. \"auto\" is vsock where the host has it, else \
         serial. Not a key of Kata.",
    ),
    Key::sets(
        Agent,
        "dial_timeout",
        Slot::Seconds(3600, |config| &mut config.agent.dial_timeout),
        "How long the agent may take to connect after the VM was started.",
    )
    .also(
        Agent,
        "reconnect_timeout_ms",
        // the Rust runtime's budget for all attempts together is what the Go runtime calls dial_timeout
        Some(Slot::Milliseconds(3_600_000, |config| &mut config.agent.dial_timeout)),
    ),
];
