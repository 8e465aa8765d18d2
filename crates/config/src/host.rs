//! What only the host can tell: do the files exist, does the memory fit.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::file::{Entry, Value};
use crate::keys::{Settings, refuse};
use crate::types::Config;

pub(crate) fn check(config: &Config, settings: &Settings) -> Result<(), Error> {
    let hypervisor = &config.hypervisor;
    let setting = |key: &str, value: &Path| entry(config, settings, key, value);
    file(&setting("hypervisor.qemu.path", &hypervisor.path), &hypervisor.path, "install qemu-system-x86")?;
    file(&setting("hypervisor.qemu.kernel", &hypervisor.kernel), &hypervisor.kernel, "run `make guest install`")?;
    let initrd = hypervisor.initrd.clone().unwrap_or_default();
    let initrd_setting = setting("hypervisor.qemu.initrd", &initrd);
    let size = file(&initrd_setting, &initrd, "run `make guest install`")?;
    if let Some(daemon) = &hypervisor.virtio_fs_daemon {
        file(&setting("hypervisor.qemu.virtio_fs_daemon", daemon), daemon, "install virtiofsd or qemu-system-common")?;
    }
    if let Some(firmware) = &hypervisor.firmware {
        file(&setting("hypervisor.qemu.firmware", firmware), firmware, "remove the key for QEMU's own")?;
    }
    let memory = hypervisor.default_memory_mib;
    let host = host_memory_mib();
    if let Some(entry) = settings.get("hypervisor.qemu.default_memory")
        && memory > host
    {
        return Err(refuse(entry, format!("must be 128 to {host} MiB, this host's memory")));
    }
    if size >> 20 >= memory {
        return Err(refuse(&initrd_setting, format!("is larger than the VM's memory of {memory} MiB")));
    }
    Ok(())
}

/// `MemTotal` of proc_meminfo(5), MiB; unknown is unbounded.
pub(crate) fn host_memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib >> 10)
}

/// The setting, or what stands for it when it is a default.
fn entry(config: &Config, settings: &Settings, key: &str, value: &Path) -> Entry {
    settings.get(key).cloned().unwrap_or_else(|| Entry {
        key: key.to_owned(),
        value: Value::Text(value.display().to_string()),
        file: PathBuf::from(&config.source),
        line: 0,
    })
}

fn file(setting: &Entry, path: &Path, fix: &str) -> Result<u64, Error> {
    let meta = fs::metadata(path).map_err(|error| {
        let why = if error.kind() == std::io::ErrorKind::NotFound { "no such file".into() } else { error.to_string() };
        refuse(setting, format!("{why}: {fix}, or set another path"))
    })?;
    if !meta.is_file() {
        return Err(refuse(setting, "is not a regular file: set the path of a file"));
    }
    if meta.len() == 0 {
        return Err(refuse(setting, format!("is empty: {fix}")));
    }
    Ok(meta.len())
}
