//! How many processors and how much memory a sandbox's VM boots with. Pure.

use hypervisor::Size;
use oci_spec::runtime::Spec;

const MIB: u64 = 1 << 20;
/// A memory limit from here on is none: 2^60 bytes.
const NO_LIMIT_MIB: u64 = 1 << 40;

/// The configured size, plus what the container is limited to: a limit of 1 GiB means that the container may use 1 GiB,
/// so the VM must have that beside what the guest itself needs. (Kata's rule for a container without a pod.)
pub(crate) fn plan(config: &config::Hypervisor, spec: &Spec) -> Size {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let limit = resources.and_then(|all| all.memory().as_ref()).and_then(oci_spec::runtime::LinuxMemory::limit);
    let limit_mib = limit.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default().div_ceil(MIB);
    // "no limit" is written as a huge number by some clients (the largest multiple of a page, or of 64 bits)
    let limit_mib = if limit_mib >= NO_LIMIT_MIB { 0 } else { limit_mib };
    let memory_mib = (config.default_memory_mib + limit_mib).min(config.default_maxmemory_mib);

    let cpu = resources.and_then(|all| all.cpu().as_ref());
    let wanted = cpu.map_or(0, |cpu| match (cpu.quota(), cpu.period()) {
        (Some(quota), Some(period)) if quota > 0 && period > 0 => (quota as u64).div_ceil(period),
        _ => 0,
    });
    let vcpus = u64::from(config.default_vcpus).max(wanted).min(u64::from(config.default_maxvcpus.max(1)));
    Size { vcpus: u32::try_from(vcpus).unwrap_or(1).max(1), memory_mib }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(limit: i64) -> u64 {
        let config = config::Hypervisor { default_memory_mib: 512, default_maxmemory_mib: 2048, ..Default::default() };
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": { "resources": { "memory": { "limit": limit } } },
        });
        plan(&config, &serde_json::from_value(spec).expect("a specification")).memory_mib
    }

    #[test]
    fn a_limit_is_added_up_to_the_most_and_no_limit_is_none() {
        assert_eq!(memory(256 << 20), 768);
        assert_eq!(memory(4 << 30), 2048);
        for none in [0, -1, i64::MAX, 9_223_372_036_854_771_712] {
            assert_eq!(memory(none), 512, "{none}");
        }
    }
}
