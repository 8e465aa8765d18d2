//! Entries → [`Config`]: one arm a key. The Go runtime's names and meanings first, the Rust runtime's as aliases.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Error;
use crate::file::{Entry, Value};
use crate::types::{
    Accelerator, Agent, AgentChannel, BlockAio, BlockDevices, BlockDriver, Config, Factory, FsCache, Hypervisor,
    Internetworking, Runtime,
};
use crate::{known, merging, root, share};

/// The entries that stand, by key: later files win.
pub(crate) type Settings = BTreeMap<String, Entry>;

/// No VM is larger, whatever the host says.
pub(crate) const MOST_MEMORY_MIB: u64 = 16 << 20;

/// No pool is larger.
const MOST_READY: u64 = 256;

/// The Rust runtime's names beside the Go runtime's: of two in one file the latter counts.
const ALIASES: &[(&str, &str)] = &[
    ("hypervisor.qemu.seccomp_sandbox", "hypervisor.qemu.seccompsandbox"),
    ("agent.kata.reconnect_timeout_ms", "agent.kata.dial_timeout"),
    ("agent.kata.create_container_timeout", "runtime.create_container_timeout"),
];

pub(crate) fn apply(entries: Vec<Entry>, source: &Path) -> Result<(Config, Settings), Error> {
    let settings = merge(entries);
    let mut config = Config {
        hypervisor: Hypervisor::default(),
        agent: Agent::default(),
        runtime: Runtime::default(),
        factory: Factory::default(),
        source: source.to_owned(),
        warnings: Vec::new(),
    };
    // of several hypervisors' tables this name picks one, and the others mean nothing
    let picked = settings.get("runtime.hypervisor_name").is_some_and(|entry| entry.value == Value::Text("qemu".into()));
    for entry in settings.values() {
        if picked && entry.key.starts_with("hypervisor.") && !entry.key.starts_with("hypervisor.qemu.") {
            continue;
        }
        one(&mut config, entry)?;
    }
    root::choose(&mut config.hypervisor, &settings)?;
    limits(&mut config.hypervisor, &settings)?;
    blocks_fit(config.hypervisor.block, &settings)?;
    if let Some(entry) = settings.get("agent.kata.agent_channel")
        && (config.factory.enable_template || config.factory.vm_cache_number > 0)
        && config.agent.channel == AgentChannel::Vsock
    {
        return Err(refuse(
            entry,
            "clones and machines of a pool are reached by the serial port: set it to \"auto\" or \"serial\", or \
             enable_template to false and vm_cache_number to 0",
        ));
    }
    if let Some(entry) = settings.get("hypervisor.qemu.image")
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
    merging::fits(&config, &settings)?;
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
    Ok((config, settings))
}

/// What a machine that waits for a pod must be.
fn pool_fits(entry: &Entry, hypervisor: &Hypervisor) -> Result<(), Error> {
    if !matches!(hypervisor.shared_fs, crate::SharedFs::Auto | crate::SharedFs::VirtioFs) {
        return Err(refuse(
            entry,
            "a pool's machines have their folder by virtio-fs: set `shared_fs` to that, or this to 0",
        ));
    }
    if hypervisor.image.is_some() {
        return Err(refuse(entry, "a pool's machines boot an initrd: set `initrd` instead of `image`, or this to 0"));
    }
    Ok(())
}

/// Later files win key by key, under either of a key's names.
fn merge(entries: Vec<Entry>) -> Settings {
    let mut settings = Settings::new();
    for entry in entries {
        for (rust, go) in ALIASES {
            let other = match entry.key.as_str() {
                key if key == *rust => *go,
                key if key == *go => *rust,
                _ => continue,
            };
            if settings.get(other).is_some_and(|earlier| earlier.file != entry.file) {
                settings.remove(other);
            }
        }
        settings.insert(entry.key.clone(), entry);
    }
    for (rust, go) in ALIASES {
        if settings.contains_key(*go) {
            settings.remove(*rust);
        }
    }
    settings
}

/// What a VM may grow to: the host's at 0 and above it, and never less than what it boots with.
fn limits(hypervisor: &mut Hypervisor, settings: &Settings) -> Result<(), Error> {
    let (cpus, memory) = (host_cpus(), crate::host::host_memory_mib());
    if !(1..=cpus).contains(&hypervisor.default_maxvcpus) {
        hypervisor.default_maxvcpus = cpus;
    }
    if !(1..=memory).contains(&hypervisor.default_maxmemory_mib) {
        hypervisor.default_maxmemory_mib = memory;
    }
    if hypervisor.default_maxvcpus < hypervisor.default_vcpus
        && let Some(entry) = settings.get("hypervisor.qemu.default_maxvcpus")
    {
        let least = hypervisor.default_vcpus;
        return Err(refuse(entry, format!("must be 0 or at least default_vcpus, which is {least}")));
    }
    if hypervisor.default_maxmemory_mib < hypervisor.default_memory_mib
        && let Some(entry) = settings.get("hypervisor.qemu.default_maxmemory")
        // more than the host has is the other key's fault
        && hypervisor.default_memory_mib <= memory
    {
        let least = hypervisor.default_memory_mib;
        return Err(refuse(entry, format!("must be 0 or at least default_memory, which is {least} MiB")));
    }
    Ok(())
}

fn one(config: &mut Config, entry: &Entry) -> Result<(), Error> {
    let Config { hypervisor, agent, runtime, factory, .. } = config;
    match entry.key.as_str() {
        "hypervisor.qemu.path" => hypervisor.path = path(entry)?,
        "hypervisor.qemu.kernel" => hypervisor.kernel = path(entry)?,
        // templates of many makers set the one that is not meant to nothing
        "hypervisor.qemu.initrd" => hypervisor.initrd = optional_path(entry)?,
        "hypervisor.qemu.image" => hypervisor.image = optional_path(entry)?,
        "hypervisor.qemu.rootfs_type" => {
            hypervisor.rootfs_type = one_of(entry, &["ext4", "xfs", "erofs"].map(|name| (name, name.to_owned())))?;
        }
        "hypervisor.qemu.kernel_verity_params" => hypervisor.kernel_verity_params = root::verity(entry)?,
        // looked at with the image: `root`
        "hypervisor.qemu.disable_image_nvdimm" => drop(truth(entry)?),
        "hypervisor.qemu.vm_rootfs_driver" => drop(line(entry)?),
        "hypervisor.qemu.machine_type" => only(entry, "q35", &["pc", "virt", "microvm", "pseries", "s390-ccw-virtio"])?,
        "hypervisor.qemu.accelerator" => {
            hypervisor.accelerator =
                one_of(entry, &[("auto", Accelerator::Auto), ("kvm", Accelerator::Kvm), ("tcg", Accelerator::Tcg)])?;
        }
        "hypervisor.qemu.kernel_params" => hypervisor.kernel_params = line(entry)?,
        "hypervisor.qemu.firmware" => hypervisor.firmware = optional_path(entry)?,
        "hypervisor.qemu.cpu_features" => hypervisor.cpu_features = line(entry)?,
        "hypervisor.qemu.default_vcpus" => hypervisor.default_vcpus = vcpus(entry)?,
        "hypervisor.qemu.default_maxvcpus" => hypervisor.default_maxvcpus = number(entry, 0, u32::MAX.into())? as u32,
        "hypervisor.qemu.default_memory" => hypervisor.default_memory_mib = memory(entry)?,
        "hypervisor.qemu.default_maxmemory" => hypervisor.default_maxmemory_mib = number(entry, 0, u32::MAX.into())?,
        "hypervisor.qemu.network_queues" => hypervisor.network_queues = number(entry, 1, 256)? as u32,
        "hypervisor.qemu.disable_vhost_net" => hypervisor.disable_vhost_net = truth(entry)?,
        "hypervisor.qemu.tcg_tb_size" => hypervisor.tcg_tb_size_mib = number(entry, 0, 1024)? as u32,
        "hypervisor.qemu.shared_fs" => hypervisor.shared_fs = share::kind(entry)?,
        "hypervisor.qemu.msize_9p" => hypervisor.msize_9p = share::msize(entry)?,
        "hypervisor.qemu.virtio_fs_cache_size" => share::window(entry)?,
        "hypervisor.qemu.virtio_fs_daemon" => hypervisor.virtio_fs_daemon = optional_path(entry)?,
        "hypervisor.qemu.virtio_fs_cache" => {
            let all = [FsCache::Never, FsCache::Metadata, FsCache::Auto, FsCache::Always];
            hypervisor.virtio_fs_cache = one_of(entry, &all.map(|cache| (cache.as_str(), cache)))?;
        }
        "hypervisor.qemu.virtio_fs_queue_size" => {
            let size = number(entry, 2, 1024).ok().filter(|size| size.is_power_of_two());
            let size = size.ok_or_else(|| refuse(entry, "must be a power of two from 2 to 1024"))?;
            hypervisor.virtio_fs_queue_size = size as u32;
        }
        "hypervisor.qemu.virtio_fs_extra_args" => hypervisor.virtio_fs_extra_args = share::daemon_args(list(entry)?),
        "hypervisor.qemu.reclaim_guest_freed_memory" => hypervisor.reclaim_guest_freed_memory = truth(entry)?,
        "hypervisor.qemu.merge_guest_memory" => hypervisor.merge_guest_memory = truth(entry)?,
        "hypervisor.qemu.disable_block_device_use" => hypervisor.disable_block_device_use = truth(entry)?,
        key if key.starts_with("hypervisor.qemu.block_device_") && SUPPORTED.contains(&key) => {
            block(&mut hypervisor.block, entry)?;
        }
        "hypervisor.qemu.entropy_source" => {
            // Kata's word for the default
            hypervisor.entropy_source = optional_path(entry)?.unwrap_or_else(|| Hypervisor::default().entropy_source);
        }
        "hypervisor.qemu.seccompsandbox" | "hypervisor.qemu.seccomp_sandbox" => {
            hypervisor.seccomp_sandbox = line(entry)?;
        }
        "hypervisor.qemu.enable_debug" => hypervisor.enable_debug = truth(entry)?,
        "agent.kata.enable_debug" => agent.enable_debug = truth(entry)?,
        "agent.kata.agent_channel" => {
            let all = [("auto", AgentChannel::Auto), ("serial", AgentChannel::Serial), ("vsock", AgentChannel::Vsock)];
            agent.channel = one_of(entry, &all)?;
        }
        "agent.kata.dial_timeout" => agent.dial_timeout = Duration::from_secs(number(entry, 1, 3600)?),
        // the Rust runtime's budget for all tries together is what the Go runtime calls dial_timeout
        "agent.kata.reconnect_timeout_ms" => agent.dial_timeout = Duration::from_millis(number(entry, 1, 3_600_000)?),
        // the time between tries: nothing is tried again here, the agent says when it is up
        "agent.kata.dial_timeout_ms" => drop(number(entry, 0, 3_600_000)?),
        "agent.kata.create_container_timeout" | "runtime.create_container_timeout" => {
            runtime.create_container_timeout = Duration::from_secs(number(entry, 1, 86_400)?);
        }
        "runtime.enable_debug" => runtime.enable_debug = truth(entry)?,
        "runtime.sandbox_cgroup_only" => runtime.sandbox_cgroup_only = truth(entry)?,
        "runtime.internetworking_model" => {
            let models = [
                ("tcfilter", Internetworking::TcFilter),
                ("macvtap", Internetworking::MacVtap),
                ("none", Internetworking::None),
            ];
            runtime.internetworking = one_of(entry, &models)?;
        }
        "runtime.disable_new_netns" => runtime.disable_new_netns = truth(entry)?,
        "runtime.disable_guest_empty_dir" => runtime.disable_guest_empty_dir = truth(entry)?,
        "runtime.disable_guest_seccomp" => runtime.disable_guest_seccomp = truth(entry)?,
        "factory.enable_template" | "hypervisor.qemu.factory.enable_template" => {
            factory.enable_template = truth(entry)?;
        }
        "factory.template_path" | "hypervisor.qemu.factory.template_path" => factory.template_path = path(entry)?,
        "factory.make_template_on_demand" => factory.make_template_on_demand = truth(entry)?,
        "factory.vm_cache_number" => factory.vm_cache_number = number(entry, 0, MOST_READY)? as u32,
        "factory.vm_cache_endpoint" => factory.vm_cache_endpoint = endpoint(entry)?,
        _ => known::other(entry, &mut config.warnings)?,
    }
    Ok(())
}

/// The keys `block_device_*`.
fn block(block: &mut BlockDevices, entry: &Entry) -> Result<(), Error> {
    match entry.key.trim_start_matches("hypervisor.qemu.block_device_") {
        "driver" => {
            // the Go runtime's names and the Rust runtime's
            let drivers = [
                ("virtio-blk", BlockDriver::VirtioBlk),
                ("virtio-blk-pci", BlockDriver::VirtioBlk),
                ("virtio-scsi", BlockDriver::VirtioScsi),
                ("virtio-pmem", BlockDriver::VirtioPmem),
            ];
            match text(entry)? {
                "nvdimm" => {
                    return Err(refuse(
                        entry,
                        "is not supported: persistent memory is a PCI device here, not an ACPI one: set \
                         \"virtio-pmem\", which the guest has as /dev/pmem0 too",
                    ));
                }
                "virtio-mmio" | "virtio-blk-mmio" | "virtio-blk-ccw" => {
                    let why = "is not supported: must be \"virtio-blk\" or \"virtio-scsi\" or \"virtio-pmem\"";
                    return Err(refuse(entry, why));
                }
                _ => {}
            }
            block.driver = one_of(entry, &drivers)?;
        }
        "aio" => {
            let all = [BlockAio::Threads, BlockAio::Native, BlockAio::IoUring];
            block.aio = one_of(entry, &all.map(|aio| (aio.as_str(), aio)))?;
        }
        "cache_set" => block.cache_set = truth(entry)?,
        "cache_direct" => block.cache_direct = truth(entry)?,
        "cache_noflush" => block.cache_noflush = truth(entry)?,
        "logical_sector_size" => block.logical_sector_size = sector(entry)?,
        _ => block.physical_sector_size = sector(entry)?,
    }
    Ok(())
}

/// Bytes; QEMU's limits.
fn sector(entry: &Entry) -> Result<u32, Error> {
    match number(entry, 0, 32 << 10) {
        Ok(size) if size == 0 || (size >= 512 && size.is_power_of_two()) => Ok(size as u32),
        _ => Err(refuse(entry, "must be 0 or a power of two from 512 to 32768")),
    }
}

/// What of block devices fits together.
fn blocks_fit(block: BlockDevices, settings: &Settings) -> Result<(), Error> {
    if block.driver == BlockDriver::VirtioPmem {
        let has_sectors = block.logical_sector_size > 0 || block.physical_sector_size > 0;
        for (name, is_set) in [
            ("cache_direct", block.cache_set && block.cache_direct),
            ("cache_noflush", block.cache_set && block.cache_noflush),
            ("logical_sector_size", has_sectors),
            ("physical_sector_size", has_sectors),
        ] {
            if let Some(entry) = settings.get(&format!("hypervisor.qemu.block_device_{name}")).filter(|_| is_set) {
                let why = "cannot be with block_device_driver = \"virtio-pmem\", where the guest has the host's page cache \
                           for a disk, in pages: remove it, or set \"virtio-blk\"";
                return Err(refuse(entry, why));
            }
        }
    }
    if block.aio == BlockAio::Native
        && !(block.cache_set && block.cache_direct)
        && let Some(entry) = settings.get("hypervisor.qemu.block_device_aio")
    {
        return Err(refuse(
            entry,
            "works with block_device_cache_set = true and block_device_cache_direct = true only: set those too, or \
             \"threads\"",
        ));
    }
    // QEMU's own are 512
    if block.logical_sector_size > block.physical_sector_size.max(512)
        && let Some(entry) = settings.get("hypervisor.qemu.block_device_logical_sector_size")
    {
        return Err(refuse(entry, "must not be more than block_device_physical_sector_size: set that too"));
    }
    Ok(())
}

pub(crate) fn refuse(entry: &Entry, allowed: impl Into<String>) -> Error {
    Error::Value {
        file: entry.file.clone(),
        line: entry.line,
        key: entry.key.clone(),
        value: entry.value.to_string(),
        allowed: allowed.into(),
    }
}

fn text(entry: &Entry) -> Result<&str, Error> {
    match &entry.value {
        Value::Text(text) => Ok(text),
        _ => Err(refuse(entry, "must be a string")),
    }
}

/// A string that ends up in one argument: no line breaks.
pub(crate) fn line(entry: &Entry) -> Result<String, Error> {
    let text = text(entry)?;
    if !is_line(text) {
        return Err(refuse(entry, "must be one line of at most 2048 bytes"));
    }
    Ok(text.to_owned())
}

fn is_line(text: &str) -> bool {
    text.len() <= 2048 && !text.chars().any(char::is_control)
}

fn path(entry: &Entry) -> Result<PathBuf, Error> {
    let path = PathBuf::from(line(entry)?);
    if path.is_absolute() { Ok(path) } else { Err(refuse(entry, "must be an absolute path")) }
}

/// A socket's path has room for 107 bytes (unix(7)).
fn endpoint(entry: &Entry) -> Result<PathBuf, Error> {
    let path = path(entry)?;
    if path.as_os_str().len() <= 107 { Ok(path) } else { Err(refuse(entry, "must be at most 107 bytes long")) }
}

fn optional_path(entry: &Entry) -> Result<Option<PathBuf>, Error> {
    if text(entry)?.is_empty() { Ok(None) } else { path(entry).map(Some) }
}

fn truth(entry: &Entry) -> Result<bool, Error> {
    match entry.value {
        Value::Bool(truth) => Ok(truth),
        _ => Err(refuse(entry, "must be true or false")),
    }
}

pub(crate) fn number(entry: &Entry, least: u64, most: u64) -> Result<u64, Error> {
    match entry.value {
        Value::Integer(number) if u64::try_from(number).is_ok_and(|number| (least..=most).contains(&number)) => {
            Ok(number as u64)
        }
        _ => Err(refuse(entry, format!("must be a whole number from {least} to {most}"))),
    }
}

/// MiB; whether the host has as much is for `host` to tell.
fn memory(entry: &Entry) -> Result<u64, Error> {
    number(entry, 128, MOST_MEMORY_MIB).map_err(|_| refuse(entry, crate::host::memory_range()))
}

/// Kata allows fractions, which are rounded up; 0 is 1; negative and more than the host has are all of the host's.
fn vcpus(entry: &Entry) -> Result<u32, Error> {
    let host = host_cpus();
    match entry.value {
        Value::Integer(number) => Ok(u32::try_from(number).map_or(host, |number| number.clamp(1, host))),
        Value::Float(number) if number.is_finite() && number < 0.0 => Ok(host),
        Value::Float(number) if number.is_finite() => Ok((number.ceil() as u32).clamp(1, host)),
        _ => Err(refuse(entry, format!("must be a number of processors: 1 to {host}, or -1 for all of this host's"))),
    }
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

fn list(entry: &Entry) -> Result<Vec<String>, Error> {
    match &entry.value {
        Value::List(list) if list.iter().all(|item| is_line(item)) => Ok(list.clone()),
        Value::List(_) => Err(refuse(entry, "must be strings of one line of at most 2048 bytes")),
        _ => Err(refuse(entry, "must be a list of strings")),
    }
}

pub(crate) fn one_of<T: Clone>(entry: &Entry, allowed: &[(&str, T)]) -> Result<T, Error> {
    let text = text(entry)?;
    allowed.iter().find(|(name, _)| *name == text).map(|(_, value)| value.clone()).ok_or_else(|| {
        let names: Vec<_> = allowed.iter().map(|(name, _)| format!("{name:?}")).collect();
        refuse(entry, format!("must be {}", names.join(" or ")))
    })
}

/// For a key with one value that works so far: Kata's others are refused in other words than mistakes.
fn only(entry: &Entry, works: &str, later: &[&str]) -> Result<(), Error> {
    match text(entry)? {
        text if text == works => Ok(()),
        text if later.contains(&text) => Err(refuse(entry, format!("is not supported yet: must be {works:?}"))),
        _ => Err(refuse(entry, format!("must be {works:?}"))),
    }
}

/// Keys of [`one`], for finding the nearest to a misspelt one.
pub(crate) const SUPPORTED: &[&str] = &[
    "hypervisor.qemu.path",
    "hypervisor.qemu.kernel",
    "hypervisor.qemu.initrd",
    "hypervisor.qemu.image",
    "hypervisor.qemu.rootfs_type",
    "hypervisor.qemu.kernel_verity_params",
    "hypervisor.qemu.disable_image_nvdimm",
    "hypervisor.qemu.vm_rootfs_driver",
    "hypervisor.qemu.machine_type",
    "hypervisor.qemu.accelerator",
    "hypervisor.qemu.kernel_params",
    "hypervisor.qemu.firmware",
    "hypervisor.qemu.cpu_features",
    "hypervisor.qemu.default_vcpus",
    "hypervisor.qemu.default_maxvcpus",
    "hypervisor.qemu.default_memory",
    "hypervisor.qemu.default_maxmemory",
    "hypervisor.qemu.network_queues",
    "hypervisor.qemu.disable_vhost_net",
    "hypervisor.qemu.tcg_tb_size",
    "hypervisor.qemu.shared_fs",
    "hypervisor.qemu.msize_9p",
    "hypervisor.qemu.virtio_fs_cache_size",
    "hypervisor.qemu.virtio_fs_daemon",
    "hypervisor.qemu.virtio_fs_cache",
    "hypervisor.qemu.virtio_fs_queue_size",
    "hypervisor.qemu.virtio_fs_extra_args",
    "hypervisor.qemu.reclaim_guest_freed_memory",
    "hypervisor.qemu.merge_guest_memory",
    "hypervisor.qemu.disable_block_device_use",
    "hypervisor.qemu.block_device_driver",
    "hypervisor.qemu.block_device_aio",
    "hypervisor.qemu.block_device_cache_set",
    "hypervisor.qemu.block_device_cache_direct",
    "hypervisor.qemu.block_device_cache_noflush",
    "hypervisor.qemu.block_device_logical_sector_size",
    "hypervisor.qemu.block_device_physical_sector_size",
    "hypervisor.qemu.entropy_source",
    "hypervisor.qemu.seccompsandbox",
    "hypervisor.qemu.seccomp_sandbox",
    "hypervisor.qemu.enable_debug",
    "agent.kata.enable_debug",
    "agent.kata.agent_channel",
    "agent.kata.dial_timeout",
    "agent.kata.dial_timeout_ms",
    "agent.kata.reconnect_timeout_ms",
    "agent.kata.create_container_timeout",
    "runtime.create_container_timeout",
    "runtime.enable_debug",
    "runtime.disable_guest_empty_dir",
    "runtime.disable_guest_seccomp",
    "runtime.internetworking_model",
    "runtime.disable_new_netns",
    "runtime.sandbox_cgroup_only",
    "factory.enable_template",
    "factory.template_path",
    "factory.make_template_on_demand",
    "factory.vm_cache_number",
    "factory.vm_cache_endpoint",
    "hypervisor.qemu.factory.enable_template",
    "hypervisor.qemu.factory.template_path",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supported_keys_are_those_that_are_read() {
        for key in SUPPORTED {
            let source = Path::new("/c.toml");
            let value = Value::Other("1979-05-27".into());
            let entry = Entry { key: (*key).to_owned(), value, file: source.to_owned(), line: 7 };
            let error = apply(vec![entry], source).expect_err("no key takes a date").to_string();
            assert!(error.starts_with(&format!("/c.toml:7: {key} = 1979-05-27: must be ")), "{error}");
        }
    }
}
