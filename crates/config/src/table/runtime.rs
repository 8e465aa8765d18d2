//! The keys of `[runtime]`.

use crate::key::Table::{Agent, Runtime};
use crate::key::{Key, Slot, WordAt};
use crate::types::Internetworking;

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Runtime,
        "enable_debug",
        Slot::Truth(|config| &mut config.runtime.enable_debug),
        "Sets the shim's log level to debug.",
    ),
    Key::sets(
        Runtime,
        "disable_guest_seccomp",
        Slot::Truth(|config| &mut config.runtime.disable_guest_seccomp),
        "Drops the seccomp profiles of containers. Kata's default is true.",
    )
    .annotation("runtime.disable_guest_seccomp"),
    Key::sets(
        Runtime,
        "disable_guest_empty_dir",
        Slot::Truth(|config| &mut config.runtime.disable_guest_empty_dir),
        "Where emptyDir volumes on disk of a Kubernetes pod are. true: on the host, as with runc. false: in the guest's memory, no \
         more than half of it, which is faster; kubelet does not see what is in them.",
    ),
    Key::sets(
        Runtime,
        "internetworking_model",
        Slot::Word(&WordAt::<Internetworking>::new(|config| &mut config.runtime.internetworking)),
        "How the pod's network interfaces are connected to the VM: by a tap and traffic control, by a macvtap in passthru mode \
         (macvlan and ipvlan interfaces use traffic control all the same), or not at all.",
    )
    .annotation("runtime.internetworking_model"),
    Key::sets(
        Runtime,
        "disable_new_netns",
        Slot::Truth(|config| &mut config.runtime.disable_new_netns),
        "Ignores the pod's network namespace: the VM has a loopback interface only, and a pod in the host's network is not refused. \
         Needs internetworking_model = \"none\".",
    )
    .annotation("runtime.disable_new_netns"),
    Key::sets(
        Runtime,
        "sandbox_cgroup_only",
        Slot::Truth(|config| &mut config.runtime.sandbox_cgroup_only),
        "true: all threads of the VMM and its helpers run in the pod's cgroup on the host and under its limits. false: only the \
         vCPU threads do (where the host has cgroup v1); the rest runs in /kata_overhead/<id>.",
    )
    .annotation("runtime.sandbox_cgroup_only"),
    Key::sets(
        Runtime,
        "create_container_timeout",
        Slot::Seconds(86_400, |config| &mut config.runtime.create_container_timeout),
        "How long the creation of a container may take.",
    )
    .also(Agent, "create_container_timeout", None)
    .annotation("runtime.create_container_timeout"),
];
