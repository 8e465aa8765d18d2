//! The keys of the folder that host and guest share.

use crate::key::Table::Hypervisor;
use crate::key::{Key, Slot, WordAt};
use crate::share;
use crate::types::{FsCache, SharedFs};
use crate::value;

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Hypervisor,
        "shared_fs",
        Slot::Word(&WordAt::<SharedFs> {
            at: |config| &mut config.hypervisor.shared_fs,
            refused: &[(
                &["virtio-fs-nydus", "inline-virtio-fs"],
                "is not supported: set \"virtio-fs\", \"virtio-9p\" or \"none\"",
            )],
        }),
        "How the guest gets files of the host: virtio-fs, virtio-9p (served by QEMU itself, slower), or none (block devices only). \
         \"auto\" is virtio-fs where there is a virtiofsd, else virtio-9p; Kata does not have it.",
    )
    .annotation("hypervisor.shared_fs"),
    Key::sets(
        Hypervisor,
        "msize_9p",
        Slot::Number { least: 4096, most: share::MOST_MSIZE, at: |config| &mut config.hypervisor.msize_9p },
        "Largest packet of virtio-9p in bytes. Kata's default is 8192.",
    )
    .annotation("hypervisor.msize_9p"),
    Key::sets(
        Hypervisor,
        "virtio_fs_daemon",
        Slot::OptionalPath(|config| &mut config.hypervisor.virtio_fs_daemon),
        "The virtiofsd program. \"\" looks for it where Debian, the Rust virtiofsd and QEMU install it.",
    )
    .annotation("hypervisor.virtio_fs_daemon"),
    Key::sets(
        Hypervisor,
        "virtio_fs_cache",
        Slot::Word(&WordAt::<FsCache>::new(|config| &mut config.hypervisor.virtio_fs_cache)),
        "What the guest may cache of shared files. \"metadata\" needs the Rust virtiofsd. virtiofsd keeps each file open that the \
         guest has cached; with \"never\" only files in use.",
    )
    .annotation("hypervisor.virtio_fs_cache"),
    Key::only(
        Hypervisor,
        "virtio_fs_cache_size",
        &["0"],
        "Size of virtio-fs' DAX window in MiB. No release of QEMU supports DAX windows.",
    )
    .refused_as("a DAX window of virtio-fs is supported by no release of QEMU: set it to 0")
    .annotation("hypervisor.virtio_fs_cache_size"),
    Key::sets(
        Hypervisor,
        "virtio_fs_queue_size",
        Slot::Other {
            takes: "power of two from 2 to 1024",
            read: |config, entry| {
                config.hypervisor.virtio_fs_queue_size = value::queue_size(entry)?;
                Ok(())
            },
            show: |config| config.hypervisor.virtio_fs_queue_size.to_string(),
        },
        "Entries of virtio-fs' request queue.",
    ),
    Key::sets(
        Hypervisor,
        "virtio_fs_extra_args",
        Slot::Other {
            takes: "list of strings",
            read: |config, entry| {
                config.hypervisor.virtio_fs_extra_args = share::daemon_args(value::list(entry)?);
                Ok(())
            },
            show: |config| format!("{:?}", config.hypervisor.virtio_fs_extra_args),
        },
        "Arguments appended to virtiofsd's command line. Submounts are always announced, so that argument may be left out.",
    )
    .annotation("hypervisor.virtio_fs_extra_args"),
];
