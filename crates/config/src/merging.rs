//! `merge_guest_memory`: pages that are equal in several guests are kept once by the host's kernel (KSM). Owns where that
//! can work, and on which hosts.

use std::fs;
use std::path::Path;

use crate::Error;
use crate::checks::Set;
use crate::types::{Config, SharedFs};
use crate::value::refuse;

const KEY: &str = "merge_guest_memory";

/// The kernel's folder for it.
pub(crate) const KSM: &str = "/sys/kernel/mm/ksm";

/// Refuses it where the guest's memory is shared with another process: the kernel passes that over in silence.
pub(crate) fn fits(config: &Config, set: &Set<'_>) -> Result<(), Error> {
    let Some(entry) = set.vm(KEY).filter(|_| config.hypervisor.merge_guest_memory) else { return Ok(()) };
    if !matches!(config.hypervisor.shared_fs, SharedFs::VirtioNineP | SharedFs::None) {
        let why = "works with shared_fs = \"virtio-9p\" or \"none\" only, because memory that is shared with virtiofsd is not merged: set that too, or this to false";
        return Err(refuse(entry, why));
    }
    if config.factory.enable_template && config.hypervisor.reclaim_guest_freed_memory {
        let why = "does not work with enable_template and reclaim_guest_freed_memory together, because such clones have shared memory: set one of the three to false";
        return Err(refuse(entry, why));
    }
    Ok(())
}

/// Refuses it where the kernel cannot, and says so where it is switched off.
pub(crate) fn check(config: &mut Config, set: &Set<'_>, ksm: &Path) -> Result<(), Error> {
    let Some(entry) = set.vm(KEY).filter(|_| config.hypervisor.merge_guest_memory) else { return Ok(()) };
    let (switch, key) = (ksm.join("run"), &entry.key);
    match fs::read_to_string(&switch).as_deref().map(str::trim) {
        Ok("1") => {}
        Ok(_) => config
            .warnings
            .push(format!("{key}: this host merges no pages while {} is not 1: echo 1 > {0}", switch.display())),
        Err(_) => {
            return Err(refuse(entry, "this host's kernel has no KSM (CONFIG_KSM): remove the key or set it to false"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::Settings;

    fn parsed(text: &str) -> Result<(Config, Settings), Error> {
        let source = Path::new("/etc/c.toml");
        crate::apply::apply(crate::file::parse(text, source)?, source, &|_| false)
    }

    #[test]
    fn only_private_memory_can_be_merged() {
        let merged = "[hypervisor.qemu]\nmerge_guest_memory = true\n";
        for text in [merged.to_owned(), format!("{merged}shared_fs = \"virtio-fs\"\n")] {
            let error = parsed(&text).map(drop).expect_err("virtiofsd shares it").to_string();
            assert!(error.contains(":2: ") && error.ends_with("set that too, or this to false"), "{error}");
        }
        let alone = format!("{merged}shared_fs = \"none\"\nreclaim_guest_freed_memory = true\n");
        parsed(&alone).expect("private");
        let error = parsed(&format!("{alone}[factory]\nenable_template = true\n")).map(drop).expect_err("shared");
        assert!(error.to_string().ends_with("set one of the three to false"), "{error}");
        parsed("[hypervisor.qemu]\nmerge_guest_memory = false\n").expect("the default");
    }

    #[test]
    fn the_host_must_be_able_to() {
        let text = "[hypervisor.qemu]\nmerge_guest_memory = true\nshared_fs = \"none\"\n";
        let (mut config, settings) = parsed(text).expect("right");
        let set = Set::new(&settings, config.driver);
        let ksm = tempfile::tempdir().expect("a folder");
        let error = check(&mut config, &set, ksm.path()).expect_err("no KSM").to_string();
        assert!(error.contains("CONFIG_KSM"), "{error}");
        for (state, warnings) in [("1\n", 0), ("0\n", 1)] {
            fs::write(ksm.path().join("run"), state).expect("written");
            check(&mut config, &set, ksm.path()).expect("a kernel with it");
            assert_eq!(config.warnings.len(), warnings, "{:?}", config.warnings);
        }
    }
}
