//! The VMM driver that the configuration names.

use config::Word as _;
use hypervisor::Hypervisor;
use hypervisor::qemu::{AcceleratorChoice, DiskDriver, DiskSettings, Qemu, QemuSettings, quick_firmware};

/// With the configuration's settings.
pub fn driver(config: &config::Config) -> Box<dyn Hypervisor> {
    match config.driver {
        config::Driver::Qemu => Box::new(Qemu::new(qemu(&config.hypervisor, &config.qemu))),
    }
}

fn qemu(from: &config::Hypervisor, own: &config::Qemu) -> QemuSettings {
    QemuSettings {
        path: from.path.clone(),
        machine: own.machine_type.clone(),
        accelerator: match own.accelerator {
            config::Accelerator::Auto => AcceleratorChoice::Auto,
            config::Accelerator::Kvm => AcceleratorChoice::Kvm,
            config::Accelerator::Tcg => AcceleratorChoice::Tcg,
        },
        cpu_features: own.cpu_features.clone(),
        tcg_buffer_mib: own.tcg_tb_size_mib,
        firmware: from.firmware.clone().or_else(quick_firmware),
        seccomp_sandbox: own.seccomp_sandbox.clone(),
        disks: disks(from.block),
        ..QemuSettings::default()
    }
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
