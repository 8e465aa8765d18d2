//! What of several keys fits together, and the limits that follow from the host.

use std::path::Path;

use crate::apply::Settings;
use crate::file::{Entry, Value};
use crate::key::Table;
use crate::types::{AgentChannel, BlockAio, BlockDevices, BlockDriver, Config, Hypervisor, Internetworking, SharedFs};
use crate::value::{host_cpus, refuse};
use crate::{Driver, Error, merging, root};

/// Refuses what does not fit together, and fills in what follows from other keys.
pub(crate) fn fit(config: &mut Config, settings: &Settings) -> Result<(), Error> {
    let set = Set::new(settings, config.driver);
    root::choose(&mut config.hypervisor, &set)?;
    limits(&mut config.hypervisor, &set)?;
    blocks_fit(config.hypervisor.block, &set)?;
    if let Some(entry) = settings.get("agent.kata.agent_channel")
        && (config.factory.enable_template || config.factory.vm_cache_number > 0)
        && config.agent.channel == AgentChannel::Vsock
    {
        return Err(refuse(
            entry,
            "clones and VMs of the pool are reached by the serial port: set it to \"auto\" or \"serial\", or enable_template to \
             false and vm_cache_number to 0",
        ));
    }
    if let Some(entry) = set.vm("image")
        && config.factory.enable_template
        && config.hypervisor.image.is_some()
    {
        return Err(refuse(
            entry,
            "a template is a guest that booted an initrd: set `initrd` instead, or enable_template to false",
        ));
    }
    if let Some(entry) = settings.get("factory.vm_cache_number")
        && config.factory.vm_cache_number > 0
    {
        pool_fits(entry, &config.hypervisor)?;
    }
    merging::fits(config, &set)?;
    // as Kata: with a model the pod's interfaces are wanted, and they are in the namespace
    if let Some(entry) = settings.get("runtime.disable_new_netns")
        && config.runtime.disable_new_netns
        && config.runtime.internetworking != Internetworking::None
    {
        return Err(refuse(
            entry,
            "works with internetworking_model = \"none\" only: set that too, or remove this key",
        ));
    }
    Ok(())
}

/// The settings, of which those of the VM are in the chosen driver's table.
pub(crate) struct Set<'a> {
    settings: &'a Settings,
    /// The driver's table.
    table: String,
}

impl<'a> Set<'a> {
    pub(crate) fn new(settings: &'a Settings, driver: Driver) -> Self {
        Self { settings, table: Table::Hypervisor.header(driver) }
    }

    /// A key of the driver's table.
    pub(crate) fn vm(&self, name: &str) -> Option<&Entry> {
        self.settings.get(&format!("{}.{name}", self.table))
    }

    /// The same, or what stands for it in an error when it is a default.
    pub(crate) fn vm_or(&self, name: &str, shown: &str, source: &Path) -> Entry {
        self.vm(name).cloned().unwrap_or_else(|| Entry {
            key: format!("{}.{name}", self.table),
            value: Value::Other(format!("{shown} (the default)")),
            file: source.to_owned(),
            line: 0,
        })
    }
}

/// What a VM that waits for a pod must be.
fn pool_fits(entry: &Entry, hypervisor: &Hypervisor) -> Result<(), Error> {
    if !matches!(hypervisor.shared_fs, SharedFs::Auto | SharedFs::VirtioFs) {
        return Err(refuse(
            entry,
            "VMs of the pool share files by virtio-fs: set `shared_fs` to \"virtio-fs\" or \"auto\", or this to 0",
        ));
    }
    if hypervisor.image.is_some() {
        return Err(refuse(entry, "VMs of the pool boot an initrd: set `initrd` instead of `image`, or this to 0"));
    }
    Ok(())
}

/// What a VM may grow to: the host's at 0 and above it, and never less than what it boots with.
fn limits(hypervisor: &mut Hypervisor, set: &Set<'_>) -> Result<(), Error> {
    let (cpus, memory) = (host_cpus(), crate::host::host_memory_mib());
    if !(1..=cpus).contains(&hypervisor.default_maxvcpus) {
        hypervisor.default_maxvcpus = cpus;
    }
    if !(1..=memory).contains(&hypervisor.default_maxmemory_mib) {
        hypervisor.default_maxmemory_mib = memory;
    }
    if hypervisor.default_maxvcpus < hypervisor.default_vcpus
        && let Some(entry) = set.vm("default_maxvcpus")
    {
        let least = hypervisor.default_vcpus;
        return Err(refuse(entry, format!("must be 0 or at least default_vcpus, which is {least}")));
    }
    if hypervisor.default_maxmemory_mib < hypervisor.default_memory_mib
        && let Some(entry) = set.vm("default_maxmemory")
        // more than the host has is the other key's fault
        && hypervisor.default_memory_mib <= memory
    {
        let least = hypervisor.default_memory_mib;
        return Err(refuse(entry, format!("must be 0 or at least default_memory, which is {least} MiB")));
    }
    Ok(())
}

/// What of block devices fits together.
fn blocks_fit(block: BlockDevices, set: &Set<'_>) -> Result<(), Error> {
    if block.driver == BlockDriver::VirtioPmem {
        let has_sectors = block.logical_sector_size > 0 || block.physical_sector_size > 0;
        for (name, is_set) in [
            ("cache_direct", block.cache_set && block.cache_direct),
            ("cache_noflush", block.cache_set && block.cache_noflush),
            ("logical_sector_size", has_sectors),
            ("physical_sector_size", has_sectors),
        ] {
            if let Some(entry) = set.vm(&format!("block_device_{name}")).filter(|_| is_set) {
                let why = "cannot be combined with block_device_driver = \"virtio-pmem\", which maps the host's page cache: remove it, or \
                           set \"virtio-blk\"";
                return Err(refuse(entry, why));
            }
        }
    }
    if block.aio == BlockAio::Native
        && !(block.cache_set && block.cache_direct)
        && let Some(entry) = set.vm("block_device_aio")
    {
        return Err(refuse(
            entry,
            "works with block_device_cache_set = true and block_device_cache_direct = true only: set those too, or \
             \"threads\"",
        ));
    }
    // QEMU's own are 512
    if block.logical_sector_size > block.physical_sector_size.max(512)
        && let Some(entry) = set.vm("block_device_logical_sector_size")
    {
        return Err(refuse(entry, "must not be more than block_device_physical_sector_size: set that too"));
    }
    Ok(())
}
