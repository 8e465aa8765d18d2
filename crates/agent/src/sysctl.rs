//! Kernel settings of a container or of its pod: which are allowed, and how they are written.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;

use crate::error::words;

/// Writes them below `/proc/sys`. The error is in runc's words, with the setting's path.
pub(crate) fn set(all: &HashMap<String, String>) -> Result<(), String> {
    for (name, value) in all {
        let path = path(name)?;
        // two steps: runc's error says which one failed
        let mut file = File::create(&path).map_err(|error| format!("open {path}: {}", words(&error)))?;
        file.write_all(value.as_bytes()).map_err(|error| format!("write {path}: {}", words(&error)))?;
    }
    Ok(())
}

/// The container's own beside the networks' and the message queues', as with runc; the rest is the whole pod's.
const OWN: [&str; 9] = [
    "kernel.domainname",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

/// Where a setting is, in either way to write its name (sysctl(8)): the first separator is the one between folders, and
/// the other one stands for a dot in a folder's name.
fn path(name: &str) -> Result<String, String> {
    let below = match name.find(['.', '/']) {
        Some(first) if name[first..].starts_with('.') => name.chars().map(swapped).collect(),
        _ => name.to_owned(),
    };
    let dotted: String = below.chars().map(swapped).collect();
    if dotted == "kernel.hostname" {
        return Err("sysctl: \"kernel.hostname\" is not allowed as it conflicts with the OCI \"hostname\" field".into());
    }
    let is_own =
        OWN.contains(&dotted.as_str()) || ["net/", "fs/mqueue/"].iter().any(|folder| below.starts_with(folder));
    let leads_out = below.split('/').any(|part| matches!(part, "" | "." | ".."));
    if !is_own || leads_out {
        return Err(format!("sysctl {dotted:?} is not in a separate kernel namespace"));
    }
    Ok(format!("/proc/sys/{below}"))
}

fn swapped(letter: char) -> char {
    match letter {
        '.' => '/',
        '/' => '.',
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_settings() {
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), Ok("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(path("net/ipv4/conf/eth0.7/rp_filter").as_deref(), Ok("/proc/sys/net/ipv4/conf/eth0.7/rp_filter"));
        assert_eq!(path("net.ipv4.conf.eth0/7.rp_filter").as_deref(), Ok("/proc/sys/net/ipv4/conf/eth0.7/rp_filter"));
        assert_eq!(path("kernel/shmmax").as_deref(), Ok("/proc/sys/kernel/shmmax"));
        let bad = ["vm.swappiness", "kernel.panic", "kernel.shmnope", "kernel.hostname", "net.../x", "net./../kernel"];
        for bad in bad.into_iter().chain(["net/../kernel/panic", "net//x", "net/", "/net/x", "net", ""]) {
            path(bad).expect_err(bad);
        }
    }
}
