//! The VMM driver that the configuration names.

use hypervisor::Hypervisor;
use hypervisor::qemu::{Qemu, QemuSettings, Wanted, quick_firmware};

/// With the configuration's settings.
pub fn driver(config: &config::Config) -> Box<dyn Hypervisor> {
    let from = &config.hypervisor;
    Box::new(Qemu::new(QemuSettings {
        path: from.path.clone(),
        machine: from.machine_type.clone(),
        wanted: match from.accelerator {
            config::Accelerator::Auto => Wanted::Auto,
            config::Accelerator::Kvm => Wanted::Kvm,
            config::Accelerator::Tcg => Wanted::Tcg,
        },
        cpu_features: from.cpu_features.clone(),
        tcg_buffer_mib: from.tcg_tb_size_mib,
        firmware: from.firmware.clone().or_else(quick_firmware),
        seccomp_sandbox: from.seccomp_sandbox.clone(),
        ..QemuSettings::default()
    }))
}
