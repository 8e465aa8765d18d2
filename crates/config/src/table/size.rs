//! The keys of the VM's processors and memory.

use crate::key::Table::Hypervisor;
use crate::key::{Key, Slot};
use crate::value;

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Hypervisor,
        "default_vcpus",
        Slot::Other {
            takes: "number",
            read: |config, entry| {
                config.hypervisor.default_vcpus = value::vcpus(entry)?;
                Ok(())
            },
            show: |config| config.hypervisor.default_vcpus.to_string(),
        },
        "vCPUs of a VM at boot. Fractions are rounded up, 0 is 1, and a negative number is all of the host's processors.",
    )
    .annotation("hypervisor.default_vcpus"),
    Key::sets(
        Hypervisor,
        "default_maxvcpus",
        Slot::Number { least: 0, most: u32::MAX, at: |config| &mut config.hypervisor.default_maxvcpus },
        "Most vCPUs of a VM. 0, or more than the host has, is as many as the host has.",
    )
    .annotation("hypervisor.default_max_vcpus"),
    Key::sets(
        Hypervisor,
        "default_memory",
        Slot::Other {
            takes: "MiB, 128 to the host's memory",
            read: |config, entry| {
                config.hypervisor.default_memory_mib = value::memory(entry)?;
                Ok(())
            },
            show: |config| config.hypervisor.default_memory_mib.to_string(),
        },
        "Memory of a VM at boot, to which the memory limit of the pod is added. Where the pod's cgroup on the host allows less, the \
         VM gets less, and the pod is refused if that is not enough to boot. Kata's default is 2048: the guest writes 64 bytes of \
         memory map for each page at boot, which costs each pod time and resident memory.",
    )
    .annotation("hypervisor.default_memory"),
    Key::sets(
        Hypervisor,
        "default_maxmemory",
        Slot::Mib(|config| &mut config.hypervisor.default_maxmemory_mib),
        "Most memory of a VM. 0, or more than the host has, is as much as the host has.",
    ),
    Key::sets(
        Hypervisor,
        "reclaim_guest_freed_memory",
        Slot::Truth(|config| &mut config.hypervisor.reclaim_guest_freed_memory),
        "Returns memory that the guest has freed to the host within some seconds, in blocks of 2 MiB (free page reporting).",
    )
    .annotation("hypervisor.reclaim_guest_freed_memory"),
    Key::sets(
        Hypervisor,
        "merge_guest_memory",
        Slot::Truth(|config| &mut config.hypervisor.merge_guest_memory),
        "Lets the host's kernel keep equal pages of several VMs once (KSM, which must be switched on: echo 1 > \
         /sys/kernel/mm/ksm/run). This saves memory and takes processor time. The risk: a program in one VM can find out from the \
         time of a write whether another VM has a certain page, and a memory error of the host reaches several VMs. Use it only \
         for VMs of one owner. It needs shared_fs = \"virtio-9p\" or \"none\", because memory that is shared with virtiofsd is not \
         merged. Not a key of Kata.",
    ),
];
