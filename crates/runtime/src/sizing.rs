//! How many processors and how much memory a sandbox's VM boots with. Pure.

use hypervisor::Size;

use crate::pod::Limits;

const MIB: u64 = 1 << 20;
/// A memory limit from here on is none: 2^60 bytes.
const NO_LIMIT_MIB: u64 = 1 << 40;

/// The configured size, plus what the pod is limited to: a limit of 1 GiB means that its containers may use 1 GiB, so the
/// VM must have that beside what the guest itself needs. (Kata's rule.)
pub(crate) fn plan(config: &config::Hypervisor, limits: Limits) -> Size {
    let limit_mib = limits.memory.div_ceil(MIB);
    // "no limit" is written as a huge number by some clients (the largest multiple of a page, or of 64 bits)
    let limit_mib = if limit_mib >= NO_LIMIT_MIB { 0 } else { limit_mib };
    let memory_mib = (config.default_memory_mib + limit_mib).min(config.default_maxmemory_mib);
    let most = u64::from(config.default_maxvcpus.max(1));
    let vcpus = u64::from(config.default_vcpus).max(limits.vcpus).min(most);
    Size { vcpus: u32::try_from(vcpus).unwrap_or(1).max(1), memory_mib }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Role;

    fn memory(limit: i64) -> u64 {
        let config = config::Hypervisor { default_memory_mib: 512, default_maxmemory_mib: 2048, ..Default::default() };
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": { "resources": { "memory": { "limit": limit } } },
        });
        let spec = serde_json::from_value(spec).expect("a specification");
        plan(&config, Limits::of(&spec, &Role::Alone)).memory_mib
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
