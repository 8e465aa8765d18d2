//! The keys of `[factory]`.

use crate::key::Table::{Factory, Hypervisor};
use crate::key::{Key, Slot};
use crate::value::{endpoint, quoted};

/// No pool is larger.
const MOST_READY: u32 = 256;

pub(super) static ROWS: &[Key] = &[
    Key::sets(
        Factory,
        "enable_template",
        Slot::Truth(|config| &mut config.factory.enable_template),
        "Clones a pod's VM from a template, a VM that was saved right after its boot, instead of booting it.",
    )
    .also(Hypervisor, "factory.enable_template", None),
    Key::sets(
        Factory,
        "template_path",
        Slot::Path(|config| &mut config.factory.template_path),
        "The folder of the templates, each about 40 MiB. Use a tmpfs: on a disk, each start of a pod reads from the disk.",
    )
    .also(Hypervisor, "factory.template_path", None),
    Key::sets(
        Factory,
        "make_template_on_demand",
        Slot::Truth(|config| &mut config.factory.make_template_on_demand),
        "Makes a missing template in the background when a pod could have used it; that pod boots. false: only \
         `kata-runtime factory init` makes templates. Not a key of Kata.",
    ),
    Key::sets(
        Factory,
        "vm_cache_number",
        Slot::Number { least: 0, most: MOST_READY, at: |config| &mut config.factory.vm_cache_number },
        "How many VMs of the configured size `kata-runtime factory init` keeps ready for pods, about 80 MiB each; it keeps running \
         to do so. 0 is no pool. VMs of the pool boot an initrd and use virtio-fs.",
    ),
    Key::sets(
        Factory,
        "vm_cache_endpoint",
        Slot::Other {
            takes: "absolute path of at most 107 bytes",
            read: |config, entry| {
                config.factory.vm_cache_endpoint = endpoint(entry)?;
                Ok(())
            },
            show: |config| quoted(&config.factory.vm_cache_endpoint),
        },
        "The socket at which the pool hands out its VMs.",
    ),
];
