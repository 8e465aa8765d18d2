//! The keys of the VMM and of what the guest boots.

use crate::key::Table::Hypervisor;
use crate::key::{Key, Slot, WordAt};
use crate::root;
use crate::types::{self, FileSystem};
use crate::value::{is_absolute, quoted, text, truth};

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Hypervisor,
        "kernel",
        Slot::Path(|config| &mut config.hypervisor.kernel),
        "The guest's kernel: an ELF file with a PVH note, or a bzImage.",
    )
    .annotation("hypervisor.kernel"),
    Key::sets(
        Hypervisor,
        "initrd",
        Slot::OptionalPath(|config| &mut config.hypervisor.initrd),
        "The guest's initrd, with the agent as /init. A guest boots either an initrd or an image.",
    )
    .annotation("hypervisor.initrd"),
    Key::sets(
        Hypervisor,
        "image",
        Slot::OptionalPath(|config| &mut config.hypervisor.image),
        "The guest's disk image. Its first partition is the guest's root, mounted read-only, with the agent as /sbin/init. \
         configuration-image.toml is installed with the image instead of the initrd.",
    )
    .annotation("hypervisor.image"),
    Key::sets(
        Hypervisor,
        "rootfs_type",
        Slot::Word(&WordAt::<FileSystem>::new(|config| &mut config.hypervisor.rootfs_type)),
        "The file system of the image. The image's superblock is read at each start and decides when it says otherwise, which \
         is logged.",
    ),
    Key::sets(
        Hypervisor,
        "kernel_verity_params",
        Slot::Other {
            takes: "string, or \"\"",
            read: |config, entry| {
                config.hypervisor.kernel_verity_params = root::verity(entry)?;
                Ok(())
            },
            show: |_| "\"\"".into(),
        },
        "The dm-verity parameters of the image, whose hashes are its second partition: \
         \"root_hash=…,salt=…,data_blocks=…,data_block_size=…,hash_block_size=…\". The guest's kernel panics when it reads a block \
         of the image that was changed. \"\" boots the image without verification.",
    )
    .annotation("hypervisor.kernel_verity_params"),
    Key::sets(
        Hypervisor,
        "disable_image_nvdimm",
        // `root` looks at it together with the image and with the Rust runtime's key
        Slot::Other {
            takes: "true or false",
            read: |_, entry| truth(entry).map(drop),
            show: |config| (!config.hypervisor.image_is_memory).to_string(),
        },
        "How the guest gets the image: true as a virtio-blk disk, false as persistent memory (virtio-pmem), for which the image \
         must be a multiple of 2 MiB. Kata's default is false.",
    )
    .annotation("hypervisor.disable_image_nvdimm"),
    Key::sets(
        Hypervisor,
        "vm_rootfs_driver",
        Slot::Other {
            takes: "\"virtio-blk-pci\" or \"virtio-pmem\"",
            read: |_, entry| root::driver_is_memory(entry).map(drop),
            show: |config| {
                format!("{:?}", if config.hypervisor.image_is_memory { "virtio-pmem" } else { "virtio-blk-pci" })
            },
        },
        "The Rust runtime's key for disable_image_nvdimm: \"virtio-blk-pci\" is true, \"virtio-pmem\" is false.",
    ),
    Key::sets(
        Hypervisor,
        "path",
        Slot::Path(|config| &mut config.hypervisor.path),
        "The VMM's program.",
    )
    .annotation("hypervisor.path"),
    Key::sets(
        Hypervisor,
        "kernel_params",
        Slot::Line(|config| &mut config.hypervisor.kernel_params),
        "Parameters appended to the command line of the guest's kernel.",
    )
    .annotation("hypervisor.kernel_params"),
    Key::sets(
        Hypervisor,
        "firmware",
        Slot::OptionalPath(|config| &mut config.hypervisor.firmware),
        "The VM's firmware. \"\" selects the one that boots the kernel fastest.",
    )
    .annotation("hypervisor.firmware"),
    Key::sets(
        Hypervisor,
        "entropy_source",
        Slot::Other {
            takes: "absolute path, or \"\" for the default",
            read: |config, entry| {
                config.hypervisor.entropy_source = if text(entry)?.is_empty() {
                    types::Hypervisor::default().entropy_source
                } else {
                    is_absolute(entry)?
                };
                Ok(())
            },
            show: |config| quoted(&config.hypervisor.entropy_source),
        },
        "The file from which the guest's random numbers come (virtio-rng).",
    )
    .annotation("hypervisor.entropy_source"),
    Key::sets(
        Hypervisor,
        "enable_debug",
        Slot::Truth(|config| &mut config.hypervisor.enable_debug),
        "Writes the guest's console to the log.",
    ),
];
