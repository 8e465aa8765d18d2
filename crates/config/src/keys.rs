//! Entries → [`Config`]: one arm a key. The Go runtime's names and meanings first, the Rust runtime's as aliases.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Error;
use crate::file::{Entry, Value};
use crate::known;
use crate::types::{Accelerator, Agent, Config, FsCache, Hypervisor, Runtime};

/// The entries that stand, by key: later files win.
pub(crate) type Settings = BTreeMap<String, Entry>;

pub(crate) fn apply(entries: Vec<Entry>, source: &Path) -> Result<(Config, Settings), Error> {
    let settings: Settings = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
    let mut config = Config {
        hypervisor: Hypervisor::default(),
        agent: Agent::default(),
        runtime: Runtime::default(),
        source: source.to_owned(),
        warnings: Vec::new(),
    };
    for entry in settings.values() {
        one(&mut config, entry)?;
    }
    if settings.contains_key("hypervisor.qemu.image") && !settings.contains_key("hypervisor.qemu.initrd") {
        config.hypervisor.initrd = None;
    }
    let hypervisor = &mut config.hypervisor;
    if hypervisor.default_maxvcpus == 0 {
        hypervisor.default_maxvcpus = host_cpus();
    }
    if hypervisor.default_maxmemory_mib == 0 {
        hypervisor.default_maxmemory_mib = crate::host::host_memory_mib();
    }
    Ok((config, settings))
}

fn one(config: &mut Config, entry: &Entry) -> Result<(), Error> {
    let Config { hypervisor, agent, runtime, .. } = config;
    match entry.key.as_str() {
        "hypervisor.qemu.path" => hypervisor.path = path(entry)?,
        "hypervisor.qemu.kernel" => hypervisor.kernel = path(entry)?,
        "hypervisor.qemu.initrd" => hypervisor.initrd = Some(path(entry)?),
        "hypervisor.qemu.machine_type" => hypervisor.machine_type = one_of(entry, &[("q35", "q35".to_owned())])?,
        "hypervisor.qemu.accelerator" => {
            hypervisor.accelerator =
                one_of(entry, &[("auto", Accelerator::Auto), ("kvm", Accelerator::Kvm), ("tcg", Accelerator::Tcg)])?;
        }
        "hypervisor.qemu.kernel_params" => hypervisor.kernel_params = line(entry)?,
        "hypervisor.qemu.firmware" => hypervisor.firmware = optional_path(entry)?,
        "hypervisor.qemu.cpu_features" => hypervisor.cpu_features = line(entry)?,
        "hypervisor.qemu.default_vcpus" => hypervisor.default_vcpus = vcpus(entry)?,
        "hypervisor.qemu.default_maxvcpus" => hypervisor.default_maxvcpus = number(entry, 0, 4096)? as u32,
        "hypervisor.qemu.default_memory" => hypervisor.default_memory_mib = number(entry, 128, 16 << 20)?,
        "hypervisor.qemu.default_maxmemory" => hypervisor.default_maxmemory_mib = number(entry, 0, 16 << 20)?,
        "hypervisor.qemu.tcg_tb_size" => hypervisor.tcg_tb_size_mib = number(entry, 0, 1024)? as u32,
        "hypervisor.qemu.shared_fs" => {
            one_of(entry, &[("virtio-fs", ())])?;
        }
        "hypervisor.qemu.virtio_fs_daemon" => hypervisor.virtio_fs_daemon = optional_path(entry)?,
        "hypervisor.qemu.virtio_fs_cache" => {
            let all = [FsCache::Never, FsCache::Metadata, FsCache::Auto, FsCache::Always];
            hypervisor.virtio_fs_cache = one_of(entry, &all.map(|cache| (cache.as_str(), cache)))?;
        }
        "hypervisor.qemu.virtio_fs_queue_size" => {
            let size = number(entry, 2, 1024)?;
            if !size.is_power_of_two() {
                return Err(refuse(entry, "must be a power of two up to 1024"));
            }
            hypervisor.virtio_fs_queue_size = size as u32;
        }
        "hypervisor.qemu.virtio_fs_extra_args" => hypervisor.virtio_fs_extra_args = list(entry)?,
        "hypervisor.qemu.entropy_source" => hypervisor.entropy_source = path(entry)?,
        "hypervisor.qemu.seccompsandbox" | "hypervisor.qemu.seccomp_sandbox" => {
            hypervisor.seccomp_sandbox = line(entry)?;
        }
        "hypervisor.qemu.enable_debug" => hypervisor.enable_debug = truth(entry)?,
        "agent.kata.enable_debug" => agent.enable_debug = truth(entry)?,
        "agent.kata.dial_timeout" => agent.dial_timeout = Duration::from_secs(number(entry, 1, 3600)?),
        // the Rust runtime's budget for all tries together is what the Go runtime calls dial_timeout
        "agent.kata.reconnect_timeout_ms" => agent.dial_timeout = Duration::from_millis(number(entry, 1, 3_600_000)?),
        // the time between tries: nothing is tried again here, the agent says when it is up
        "agent.kata.dial_timeout_ms" => drop(number(entry, 0, 3_600_000)?),
        "agent.kata.create_container_timeout" | "runtime.create_container_timeout" => {
            runtime.create_container_timeout = Duration::from_secs(number(entry, 1, 86_400)?);
        }
        "runtime.enable_debug" => runtime.enable_debug = truth(entry)?,
        "runtime.disable_guest_seccomp" => runtime.disable_guest_seccomp = truth(entry)?,
        _ => known::other(entry, &mut config.warnings)?,
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
fn line(entry: &Entry) -> Result<String, Error> {
    let text = text(entry)?;
    if text.chars().any(char::is_control) || text.len() > 2048 {
        return Err(refuse(entry, "must be one line of at most 2048 bytes"));
    }
    Ok(text.to_owned())
}

fn path(entry: &Entry) -> Result<PathBuf, Error> {
    let path = PathBuf::from(line(entry)?);
    if path.is_absolute() { Ok(path) } else { Err(refuse(entry, "must be an absolute path")) }
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

fn number(entry: &Entry, least: u64, most: u64) -> Result<u64, Error> {
    match entry.value {
        Value::Integer(number) if u64::try_from(number).is_ok_and(|number| (least..=most).contains(&number)) => {
            Ok(number as u64)
        }
        _ => Err(refuse(entry, format!("must be a whole number from {least} to {most}"))),
    }
}

/// Kata allows fractions, which are rounded up; 0 is 1; negative is all of the host's.
fn vcpus(entry: &Entry) -> Result<u32, Error> {
    let number = match entry.value {
        Value::Integer(number) => number as f64,
        Value::Float(number) if number.is_finite() => number,
        _ => return Err(refuse(entry, "must be a number of processors")),
    };
    let host = host_cpus();
    Ok(if number < 0.0 || number > f64::from(host) { host } else { (number.ceil() as u32).max(1) })
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

fn list(entry: &Entry) -> Result<Vec<String>, Error> {
    match &entry.value {
        Value::List(list) => Ok(list.clone()),
        _ => Err(refuse(entry, "must be a list of strings")),
    }
}

fn one_of<T: Clone>(entry: &Entry, allowed: &[(&str, T)]) -> Result<T, Error> {
    let text = text(entry)?;
    allowed.iter().find(|(name, _)| *name == text).map(|(_, value)| value.clone()).ok_or_else(|| {
        let names: Vec<_> = allowed.iter().map(|(name, _)| format!("{name:?}")).collect();
        refuse(entry, format!("must be {}", names.join(" or ")))
    })
}

/// Keys of [`one`], for finding the nearest to a misspelt one.
pub(crate) const SUPPORTED: &[&str] = &[
    "hypervisor.qemu.path",
    "hypervisor.qemu.kernel",
    "hypervisor.qemu.initrd",
    "hypervisor.qemu.machine_type",
    "hypervisor.qemu.accelerator",
    "hypervisor.qemu.kernel_params",
    "hypervisor.qemu.firmware",
    "hypervisor.qemu.cpu_features",
    "hypervisor.qemu.default_vcpus",
    "hypervisor.qemu.default_maxvcpus",
    "hypervisor.qemu.default_memory",
    "hypervisor.qemu.default_maxmemory",
    "hypervisor.qemu.tcg_tb_size",
    "hypervisor.qemu.shared_fs",
    "hypervisor.qemu.virtio_fs_daemon",
    "hypervisor.qemu.virtio_fs_cache",
    "hypervisor.qemu.virtio_fs_queue_size",
    "hypervisor.qemu.virtio_fs_extra_args",
    "hypervisor.qemu.entropy_source",
    "hypervisor.qemu.seccompsandbox",
    "hypervisor.qemu.enable_debug",
    "agent.kata.enable_debug",
    "agent.kata.dial_timeout",
    "runtime.create_container_timeout",
    "runtime.enable_debug",
    "runtime.disable_guest_seccomp",
];
