//! What only the host can tell: do the files exist, does the memory fit.

use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::Error;
use crate::checks::Set;
use crate::file::Entry;
use crate::key::Word as _;
use crate::superblock;
use crate::types::{Config, Hypervisor, SharedFs};
use crate::value::{MOST_MEMORY_MIB, quoted, refuse};

pub(crate) fn check(config: &mut Config, set: &Set<'_>) -> Result<(), Error> {
    if let Some(image) = config.hypervisor.image.clone() {
        let source = config.source.clone();
        let setting = |name: &str, shown: &str| set.vm_or(name, shown, &source);
        check_image(&config.hypervisor, &setting("image", &quoted(&image)), &image)?;
        let said = setting("rootfs_type", &format!("{:?}", config.hypervisor.rootfs_type.as_str()));
        superblock::decide(config, &said, &image)?;
    }
    let hypervisor = &config.hypervisor;
    let setting = |name: &str, shown: &str| set.vm_or(name, shown, &config.source);
    let of_path = |name: &str, path: &Path| setting(name, &quoted(path));

    program(&of_path("path", &hypervisor.path), &hypervisor.path, "install qemu-system-x86")?;
    check_kernel(&of_path("kernel", &hypervisor.kernel), &hypervisor.kernel)?;
    if let Some(daemon) = &hypervisor.virtio_fs_daemon
        // Kata's configurations name it whoever serves the files
        && matches!(hypervisor.shared_fs, SharedFs::Auto | SharedFs::VirtioFs)
    {
        program(&of_path("virtio_fs_daemon", daemon), daemon, "install virtiofsd or qemu-system-common")?;
    }
    if let Some(firmware) = &hypervisor.firmware {
        file(&of_path("firmware", firmware), firmware, "remove the key to use QEMU's own")?;
    }
    let source = of_path("entropy_source", &hypervisor.entropy_source);
    if exists(&source, &hypervisor.entropy_source, "remove the key to use /dev/urandom")?.is_dir() {
        return Err(refuse(&source, "is a directory: remove the key to use /dev/urandom"));
    }

    let memory = hypervisor.default_memory_mib;
    if memory > host_memory_mib() {
        return Err(refuse(&setting("default_memory", &memory.to_string()), memory_range()));
    }
    if hypervisor.image.is_some() {
        return Ok(());
    }
    let initrd = hypervisor.initrd.clone().unwrap_or_default();
    let initrd_setting = of_path("initrd", &initrd);
    let size = file(&initrd_setting, &initrd, "run `make install`")?.len();
    if size >= memory << 20 {
        let why = format!("has {} MiB, which must be less than default_memory, {memory} MiB", size.div_ceil(1 << 20));
        return Err(refuse(&initrd_setting, why));
    }
    Ok(())
}

/// With another file QEMU ends, and what it says is about something else.
fn check_kernel(setting: &Entry, path: &Path) -> Result<(), Error> {
    /// `HdrS` of Linux' boot protocol, by its place.
    const HEADER: std::ops::Range<usize> = 0x202..0x206;
    file(setting, path, "run `make install`")?;
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(HEADER.end as u64).read_to_end(&mut head))
        .map_err(|error| refuse(setting, format!("{error}: run `make install`, or set another path")))?;
    if head.starts_with(b"\x7fELF") || head.get(HEADER) == Some(b"HdrS") {
        return Ok(());
    }
    Err(refuse(setting, "is not a kernel (ELF or bzImage): run `make install`, or set another path"))
}

fn check_image(hypervisor: &Hypervisor, setting: &Entry, image: &Path) -> Result<(), Error> {
    let size = file(setting, image, "run `make install`")?.len();
    if let Some(verity) = &hypervisor.kernel_verity_params {
        let data = verity.data_blocks.saturating_mul(verity.data_block_size);
        if data > size {
            let why = format!(
                "has {size} bytes, fewer than the {data} of kernel_verity_params: set the parameters of this image"
            );
            return Err(refuse(setting, why));
        }
    }
    if hypervisor.image_is_memory && !size.is_multiple_of(MEMORY_BLOCK) {
        let why = format!(
            "has {size} bytes, but persistent memory must be a multiple of 2 MiB: enlarge it with `truncate -s %2M`, or set disable_image_nvdimm to true"
        );
        return Err(refuse(setting, why));
    }
    Ok(())
}

/// What the guest's kernel makes a disk of persistent memory in.
const MEMORY_BLOCK: u64 = 2 << 20;

/// `MemTotal` of proc_meminfo(5), MiB; unknown is unbounded.
pub(crate) fn host_memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    kib.map_or(MOST_MEMORY_MIB, |kib| kib >> 10)
}

/// What `default_memory` may be, in words.
pub(crate) fn memory_range() -> String {
    format!("must be a whole number from 128 to {}, MiB (this host's memory)", host_memory_mib())
}

fn exists(setting: &Entry, path: &Path, fix: &str) -> Result<Metadata, Error> {
    fs::metadata(path).map_err(|error| {
        let why = if error.kind() == ErrorKind::NotFound { "no such file".into() } else { error.to_string() };
        refuse(setting, format!("{why}: {fix}, or set another path"))
    })
}

fn file(setting: &Entry, path: &Path, fix: &str) -> Result<Metadata, Error> {
    let meta = exists(setting, path, fix)?;
    if meta.is_dir() {
        return Err(refuse(setting, "is a directory: set the path of a file"));
    }
    if !meta.is_file() {
        return Err(refuse(setting, "is not a regular file: set the path of a file"));
    }
    if meta.len() == 0 {
        return Err(refuse(setting, format!("is empty: {fix}, or set another path")));
    }
    Ok(meta)
}

fn program(setting: &Entry, path: &Path, fix: &str) -> Result<(), Error> {
    if file(setting, path, fix)?.permissions().mode() & 0o111 == 0 {
        return Err(refuse(setting, format!("is not a program: {fix}, or make it executable")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_memory() {
        assert!((128..MOST_MEMORY_MIB).contains(&host_memory_mib()));
        assert!(memory_range().contains(&host_memory_mib().to_string()));
    }
}
