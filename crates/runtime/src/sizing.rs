//! How many processors and how much memory a sandbox's VM boots with. Pure.

use hypervisor::Size;
use oci_spec::runtime::Spec;

const MIB: u64 = 1 << 20;

/// The configured size, plus what the container is limited to: a limit of 1 GiB means that the container may use 1 GiB,
/// so the VM must have that beside what the guest itself needs. (Kata's rule for a container without a pod.)
pub(crate) fn plan(config: &config::Hypervisor, spec: &Spec) -> Size {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let limit = resources.and_then(|all| all.memory().as_ref()).and_then(oci_spec::runtime::LinuxMemory::limit);
    let limit_mib = limit.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default().div_ceil(MIB);
    // "no limit" is written as a huge number by some clients
    let room = config.default_maxmemory_mib.saturating_sub(config.default_memory_mib);
    let memory_mib = config.default_memory_mib + if limit_mib > room { 0 } else { limit_mib };

    let cpu = resources.and_then(|all| all.cpu().as_ref());
    let wanted = cpu.map_or(0, |cpu| match (cpu.quota(), cpu.period()) {
        (Some(quota), Some(period)) if quota > 0 && period > 0 => (quota as u64).div_ceil(period),
        _ => 0,
    });
    let vcpus = u64::from(config.default_vcpus).max(wanted).min(u64::from(config.default_maxvcpus.max(1)));
    Size { vcpus: u32::try_from(vcpus).unwrap_or(1).max(1), memory_mib }
}
