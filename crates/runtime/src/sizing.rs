//! How many processors and how much memory a sandbox's VM boots with. Pure.
//!
//! `docs/design/014-pod-memory.md` has the measurements behind the numbers.

use hypervisor::Size;

use crate::Error;
use crate::cgroup::MemoryLimit;
use crate::pod::Limits;

const MIB: u64 = 1 << 20;
/// A memory limit from here on is none: 2^60 bytes.
const NO_LIMIT_MIB: u64 = 1 << 40;
/// The least memory of a VM that a pod's limit may lead to: the guest takes half of it for itself.
const LEAST_MIB: u64 = 96;
/// What a guest takes of its memory before a container gets any.
const GUEST_MIB: u64 = 64;

/// What of the host's memory there is for the pod.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    /// For all of the pod.
    pub(crate) limit: MemoryLimit,
    /// What the VMM and its helpers take of it beside the guest's memory, MiB.
    pub(crate) vmm_mib: u64,
}

impl Room {
    /// What `overhead.podFixed.memory` of the RuntimeClass should be.
    fn overhead_mib(&self) -> u64 {
        self.vmm_mib + GUEST_MIB
    }

    /// The limit, who set it, and what to do about it.
    pub(crate) fn remedy(&self) -> String {
        format!(
            "the pod's memory limit on the host is {} MiB ({}); raise the memory limit of its containers, or set \
             overhead.podFixed.memory of its RuntimeClass to {}Mi or more",
            self.limit.bytes / MIB,
            self.limit.file.display(),
            self.overhead_mib()
        )
    }
}

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

/// Not more than the host lets the pod have: a guest uses all of its memory in time. Where the host's limit is met first, the
/// host kills the whole VM, while a guest that is full ends one process of one container and tells whose.
///
/// # Errors
/// [`Error::Invalid`]: there is no room for a guest.
pub(crate) fn fit(size: Size, room: &Room) -> Result<Size, Error> {
    let fits = (room.limit.bytes / MIB).saturating_sub(room.vmm_mib);
    let least = LEAST_MIB.min(size.memory_mib);
    if fits < least {
        return Err(Error::Invalid(format!(
            "no room for a VM, which needs at least {} MiB: {}",
            least + room.vmm_mib,
            room.remedy()
        )));
    }
    Ok(Size { memory_mib: size.memory_mib.min(fits), ..size })
}

/// Refuses limits for a container that its VM cannot give, as an update asks for them. What it has had from its start is no
/// wish for more: clients send all limits with each that changes.
///
/// # Errors
/// [`Error::Invalid`] with what there is.
pub(crate) fn check_update(size: Size, had: Limits, wanted: Limits) -> Result<(), Error> {
    let has = size.memory_mib.saturating_mul(MIB);
    if wanted.memory > has.max(had.memory) && wanted.memory / MIB < NO_LIMIT_MIB {
        return Err(Error::Invalid(format!(
            "memory limit {} is larger than the VM's memory, {has} bytes, which does not grow while the VM runs: start the container with this limit instead",
            wanted.memory
        )));
    }
    if wanted.vcpus > u64::from(size.vcpus).max(had.vcpus) {
        return Err(Error::Invalid(format!(
            "a limit of {} vCPUs is larger than the VM's number, {}, which does not grow while the VM runs: start the container with this limit instead",
            wanted.vcpus, size.vcpus
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Role;

    fn config() -> config::Hypervisor {
        config::Hypervisor { default_memory_mib: 512, default_maxmemory_mib: 2048, ..Default::default() }
    }

    fn memory(limit: i64) -> u64 {
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": { "resources": { "memory": { "limit": limit } } },
        });
        let spec = serde_json::from_value(spec).expect("a specification");
        plan(&config(), Limits::of(&spec, &Role::Alone)).memory_mib
    }

    #[test]
    fn a_limit_is_added_up_to_the_most_and_no_limit_is_none() {
        assert_eq!(memory(256 << 20), 768);
        assert_eq!(memory(4 << 30), 2048);
        for none in [0, -1, i64::MAX, 9_223_372_036_854_771_712] {
            assert_eq!(memory(none), 512, "{none}");
        }
    }

    #[test]
    fn the_guest_fits_into_what_the_host_lets_the_pod_have() {
        let fits = |host_mib: u64| {
            let limit = MemoryLimit { bytes: host_mib * MIB, file: "/c/memory.max".into() };
            let limits = Limits { memory: 64 * MIB, vcpus: 0 };
            fit(plan(&config(), limits), &Room { limit, vmm_mib: 60 }).map(|size| size.memory_mib)
        };
        assert_eq!(fits(4096).expect("room"), 576);
        assert_eq!(fits(224).expect("room"), 164);
        assert_eq!(fits(156).expect("room"), 96);
        let error = fits(64).expect_err("no room").to_string();
        for word in ["64 MiB", "/c/memory.max", "156 MiB", "overhead.podFixed.memory", "124Mi"] {
            assert!(error.contains(word), "{word}: {error}");
        }
        // who configures a smaller one knows what he does
        let small = config::Hypervisor { default_memory_mib: 80, ..config() };
        let limit = MemoryLimit { bytes: 150 * MIB, file: "/c".into() };
        let size = fit(plan(&small, Limits::default()), &Room { limit, vmm_mib: 60 });
        assert_eq!(size.expect("room").memory_mib, 80);
    }

    #[test]
    fn an_update_gets_what_there_is() {
        let size = Size { vcpus: 2, memory_mib: 512 };
        let check = |memory: u64, vcpus: u64| {
            check_update(size, Limits { memory: 1 << 30, vcpus: 3 }, Limits { memory, vcpus })
        };
        check(1 << 30, 3).expect("what it had");
        check(0, 0).expect("nothing");
        check(i64::MAX as u64, 0).expect("no limit");
        let error = check((1 << 30) + 1, 0).expect_err("more").to_string();
        assert!(error.contains("1073741825") && error.contains("536870912"), "{error}");
        let error = check(0, 4).expect_err("more").to_string();
        assert!(error.contains("4 vCPUs") && error.contains("number, 2,"), "{error}");
    }
}
