//! Kernel settings of a container or of its pod: which are allowed, and how they are written.

use std::collections::HashMap;
use std::fs;

use crate::error::words;

/// Writes them below `/proc/sys`. The error is in words, with the setting's name.
pub(crate) fn set(all: &HashMap<String, String>) -> Result<(), String> {
    for (name, value) in all {
        let path = path(name)?;
        fs::write(&path, value).map_err(|error| format!("write sysctl key {name}: {}", words(&error)))?;
    }
    Ok(())
}

/// Only what belongs to the container's namespaces, as with runc; the rest is the whole pod's.
fn path(name: &str) -> Result<String, String> {
    let own = ["net.", "fs.mqueue.", "kernel.shm", "kernel.msg"].iter().any(|prefix| name.starts_with(prefix))
        || ["kernel.sem", "kernel.domainname"].contains(&name);
    if !own || name.contains("..") || name.contains('/') {
        return Err(format!("sysctl {name:?} is not in a separate kernel namespace"));
    }
    Ok(format!("/proc/sys/{}", name.replace('.', "/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_settings() {
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), Ok("/proc/sys/net/ipv4/ip_forward"));
        for bad in ["vm.swappiness", "kernel.panic", "net.../x", "net./../kernel"] {
            path(bad).expect_err(bad);
        }
    }
}
