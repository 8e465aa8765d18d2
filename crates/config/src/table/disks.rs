//! The keys of block devices.

use crate::key::Table::Hypervisor;
use crate::key::{Key, Slot, WordAt};
use crate::types::{BlockAio, BlockDriver};
use crate::value;

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Hypervisor,
        "disable_block_device_use",
        Slot::Truth(|config| &mut config.hypervisor.disable_block_device_use),
        "How a guest gets a container's root file system that is a block device or a disk image on the host (containerd's \
         snapshotters devmapper, blockfile and erofs). false: as a disk of the VM, which the host does not mount. true: the host \
         mounts it and shares its files. Kata's files set true.",
    )
    .annotation("hypervisor.disable_block_device_use"),
    Key::sets(
        Hypervisor,
        "block_device_driver",
        Slot::Word(&WordAt::<BlockDriver> {
            at: |config| &mut config.hypervisor.block.driver,
            refused: &[
                (
                    &["nvdimm"],
                    "is not supported: persistent memory is a PCI device here, not an ACPI one: set \"virtio-pmem\", which \
                     the guest has as /dev/pmem0 too",
                ),
                (
                    &["virtio-mmio", "virtio-blk-mmio", "virtio-blk-ccw"],
                    "is not supported: must be \"virtio-blk\" or \"virtio-scsi\" or \"virtio-pmem\"",
                ),
            ],
        }),
        "How the guest gets disks. \"virtio-blk\" (or \"virtio-blk-pci\") has room for about 30 disks in a VM. \"virtio-scsi\" has \
         room for 256 and is slower. \"virtio-pmem\" is persistent memory (/dev/pmem0 in the guest; Kata's \"nvdimm\"), up to 4 in a \
         VM, which stay until the pod ends. A disk that is no multiple of 2 MiB, a fifth one, and one with which all together \
         exceed eight times the VM's memory and 256 GiB, use virtio-blk instead, which is logged.",
    )
    .annotation("hypervisor.block_device_driver"),
    Key::sets(
        Hypervisor,
        "block_device_aio",
        Slot::Word(&WordAt::<BlockAio>::new(|config| &mut config.hypervisor.block.aio)),
        "How the VMM reads and writes disks. \"native\" needs block_device_cache_set and block_device_cache_direct.",
    )
    .annotation("hypervisor.block_device_aio"),
    Key::sets(
        Hypervisor,
        "block_device_cache_set",
        Slot::Truth(|config| &mut config.hypervisor.block.cache_set),
        "Applies block_device_cache_direct and block_device_cache_noflush, which are ignored otherwise.",
    )
    .annotation("hypervisor.block_device_cache_set"),
    Key::sets(
        Hypervisor,
        "block_device_cache_direct",
        Slot::Truth(|config| &mut config.hypervisor.block.cache_direct),
        "Bypasses the host's page cache for disks (O_DIRECT).",
    )
    .annotation("hypervisor.block_device_cache_direct"),
    Key::sets(
        Hypervisor,
        "block_device_cache_noflush",
        Slot::Truth(|config| &mut config.hypervisor.block.cache_noflush),
        "Ignores flushes of the guest. Files are lost when the host crashes.",
    )
    .annotation("hypervisor.block_device_cache_noflush"),
    Key::sets(
        Hypervisor,
        "block_device_logical_sector_size",
        Slot::Other {
            takes: SECTOR,
            read: |config, entry| {
                config.hypervisor.block.logical_sector_size = value::sector(entry)?;
                Ok(())
            },
            show: |config| config.hypervisor.block.logical_sector_size.to_string(),
        },
        "Logical sector size of disks in bytes. 0 is the VMM's default, 512.",
    )
    .annotation("hypervisor.blk_logical_sector_size"),
    Key::sets(
        Hypervisor,
        "block_device_physical_sector_size",
        Slot::Other {
            takes: SECTOR,
            read: |config, entry| {
                config.hypervisor.block.physical_sector_size = value::sector(entry)?;
                Ok(())
            },
            show: |config| config.hypervisor.block.physical_sector_size.to_string(),
        },
        "Physical sector size of disks in bytes, not less than the logical one. 0 is the VMM's default, 512.",
    )
    .annotation("hypervisor.blk_physical_sector_size"),
];

const SECTOR: &str = "0, or a power of two from 512 to 32768";
