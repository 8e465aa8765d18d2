//! The VMM driver that the configuration names.

use hypervisor::Hypervisor;
use hypervisor::qemu::{DiskDriver, DiskSettings, Qemu, QemuSettings, Wanted, quick_firmware};

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
        disks: disks(from.block),
        ..QemuSettings::default()
    }))
}

fn disks(from: config::BlockDevices) -> DiskSettings {
    DiskSettings {
        driver: match from.driver {
            config::BlockDriver::VirtioBlk => DiskDriver::Block,
            config::BlockDriver::VirtioScsi => DiskDriver::Scsi,
            config::BlockDriver::VirtioPmem => DiskDriver::Pmem,
        },
        aio: from.aio.as_str(),
        direct: from.cache_set && from.cache_direct,
        no_flush: from.cache_set && from.cache_noflush,
        logical_sector: from.logical_sector_size,
        physical_sector: from.physical_sector_size,
    }
}
