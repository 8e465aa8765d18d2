//! QEMU's own settings.

use super::Driver;
use crate::key::{Key, Slot, Table, Word, WordAt};
use crate::value::only;

/// `[hypervisor.qemu]`: what only QEMU has.
#[derive(Debug, Clone, PartialEq)]
pub struct Qemu {
    /// `-machine`.
    pub machine_type: String,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// Added to the processor model.
    pub cpu_features: String,
    /// Size of TCG's translation buffer, MiB. QEMU's own default grows to 1 GiB a VM.
    pub tcg_tb_size_mib: u32,
    /// `-sandbox`; empty is none.
    pub seccomp_sandbox: String,
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            machine_type: "q35".into(),
            accelerator: Accelerator::Auto,
            cpu_features: String::new(),
            tcg_tb_size_mib: 26,
            seccomp_sandbox: String::new(),
        }
    }
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accelerator {
    /// KVM where a guest really runs under it, else TCG.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Word for Accelerator {
    const WORDS: &'static [(&'static str, Self)] = &[("auto", Self::Auto), ("kvm", Self::Kvm), ("tcg", Self::Tcg)];
}

const SECCOMP: Slot = Slot::Line(|config| &mut config.qemu.seccomp_sandbox);

pub(super) static ROWS: &[Key] = &[
    row(
        "machine_type",
        Slot::Other {
            takes: "\"q35\"",
            read: |config, entry| {
                only(entry, "q35", &["pc", "virt", "microvm", "pseries", "s390-ccw-virtio"])?;
                config.qemu.machine_type = "q35".into();
                Ok(())
            },
            show: |config| format!("{:?}", config.qemu.machine_type),
        },
        "QEMU's machine type. Only q35 is supported.",
    )
    .annotation("hypervisor.machine_type"),
    row(
        "accelerator",
        Slot::Word(&WordAt::<Accelerator>::new(|config| &mut config.qemu.accelerator)),
        "What runs the guest's instructions: KVM, or QEMU's translator (TCG). \"auto\" uses KVM if a test guest runs under it, \
         else TCG. Not a key of Kata.",
    ),
    row(
        "cpu_features",
        Slot::Line(|config| &mut config.qemu.cpu_features),
        "Features appended to QEMU's CPU model, separated by commas, for example \"pmu=off\".",
    )
    .annotation("hypervisor.cpu_features"),
    row(
        "tcg_tb_size",
        Slot::Number { least: 0, most: 1024, at: |config| &mut config.qemu.tcg_tb_size_mib },
        "Size of TCG's translation buffer in MiB. 0 is QEMU's default, which grows up to 1 GiB for each VM. Without effect under \
         KVM. Not a key of Kata.",
    ),
    row(
        "seccompsandbox",
        SECCOMP,
        "Value of QEMU's -sandbox option, for example \"on,obsolete=deny,spawn=deny,resourcecontrol=deny\". \"\" starts QEMU \
         without a seccomp filter.",
    )
    .also(Table::Hypervisor, "seccomp_sandbox", None),
];

const fn row(name: &'static str, slot: Slot, doc: &'static str) -> Key {
    Key::sets(Table::Hypervisor, name, slot, doc).of(Driver::QEMU)
}
