//! The keys of the VM's network cards.

use crate::key::Table::Hypervisor;
use crate::key::{Key, Slot};

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Hypervisor,
        "network_queues",
        Slot::Number { least: 1, most: 256, at: |config| &mut config.hypervisor.network_queues },
        "Queue pairs of each network card.",
    )
    .annotation("hypervisor.network_queues"),
    Key::sets(
        Hypervisor,
        "disable_vhost_net",
        Slot::Truth(|config| &mut config.hypervisor.disable_vhost_net),
        "Lets the VMM copy network frames itself, even where the host has /dev/vhost-net.",
    )
    .annotation("hypervisor.disable_vhost_net"),
];
