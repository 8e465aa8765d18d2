//! What QEMU's translator (TCG) needs and a processor with KVM does not. The driver asks here once it knows that the guest
//! runs under TCG; nothing of it reaches a guest under KVM.

mod tsc;

pub(super) use self::tsc::rate;

use super::cmdline::Memory;
use crate::Size;
use crate::helper::Pages;

/// The processor model, without the features that it must not have: with these, kernel and C library copy and clear by
/// `rep movsb` and `rep stosb`, of which QEMU does a byte at a time; without, they take eight bytes.
pub(super) const CPU_MODEL: &str = "max,erms=off,fsrm=off";

/// A packet that has been sent is taken back with the next one, not by an interrupt of its own, which under a translator costs
/// as much as the packet (with two processors, another takes it meanwhile). A socket then does not know what of its own is
/// still in the card's queue, as with the veth of a container; memory that a program lends (`MSG_ZEROCOPY`) is copied
/// (drivers/net/virtio_net.c, and our kernel's patch 0014).
const NO_WORD_OF_THE_SENT: &str = " virtio_net.napi_tx=0";

/// What the kernel must not use of QEMU's translator: before QEMU 8.0 a `cmpxchg16b` that does not find what it expects leaves
/// garbage in the flags (target/i386, helper_cmpxchg16b works with a stale CC_OP), and an interrupt right after it brings
/// them back by IRET. In the kernel's allocator that was a double fault, once in some fifty guests busy with a network.
/// Programs still find the instruction in CPUID.
const BROKEN: &str = "cx16";

/// QEMU's own choice of a buffer when it is told none, at most, MiB.
const DEFAULT_BUFFER_MIB: u32 = 1024;

/// For `-accel`; 0 leaves the size of the translation buffer to QEMU.
pub(super) fn option(buffer_mib: u32) -> String {
    if buffer_mib > 0 { format!("tcg,tb-size={buffer_mib}") } else { "tcg".into() }
}

/// What its translated code takes of the host's memory at most, MiB.
pub(super) fn overhead_mib(buffer_mib: u32) -> u64 {
    u64::from(if buffer_mib == 0 { DEFAULT_BUFFER_MIB } else { buffer_mib })
}

/// Whether the guest does without a local timer: the translator has no deadline timer, so the kernel would measure the local
/// timer for 100 ms; one processor does as well with the machine's own (HPET), and that sleeps longer than the old one.
pub(super) fn has_no_local_timer(size: Size) -> bool {
    size.vcpus == 1
}

/// What a processor does in passing and a translator has to translate or to execute step by step. The user's own value of
/// one of these counts instead (`cgroup_disable=none` is nothing).
///
/// `mitigations=off`: QEMU's translator speculates nothing by itself, and its code has no addresses of the guest's.
/// `noreplace-smp`: with one processor the kernel would take the LOCK prefixes out of its code, for nothing here.
/// `cgroup.memory=nosocket`: to count the buffers of sockets into a container's memory costs a tenth of what passes through
/// one. `cgroup_disable=pressure`: the stall times of a single container (`cpu.pressure` and its like) are kept at every
/// change of tasks; `/proc/pressure` is there.
const CHEAPER: [&str; 4] = ["mitigations=off", "noreplace-smp", "cgroup.memory=nosocket", "cgroup_disable=pressure"];

/// Kernel parameters, each with a blank before it. `tsc_khz` is the rate of the guest's counter, where the host knows it;
/// `configured` are the user's.
pub(super) fn kernel_params(size: Size, tsc_khz: Option<u64>, configured: &str) -> String {
    let key = |parameter: &'static str| parameter.split_inclusive('=').next().unwrap_or(parameter);
    let cheaper = CHEAPER.iter().filter(|ours| !configured.contains(key(ours)));
    let cheaper = cheaper.fold(String::new(), |all, ours| all + " " + ours);
    let timer = if has_no_local_timer(size) { " noapictimer" } else { "" };
    let tsc = tsc_khz.map(|rate| format!(" tsc_early_khz={rate}")).unwrap_or_default();
    let sent = if size.vcpus == 1 { NO_WORD_OF_THE_SENT } else { "" };
    format!("{timer}{tsc}{sent}{cheaper}")
}

/// The configured parameters, with what is broken left out. The kernel takes the last of several lists, so there must be one.
pub(super) fn without_broken(configured: &str) -> String {
    const KEY: &str = "clearcpuid=";
    match configured.rsplit_once(KEY) {
        Some((before, after)) => format!("{before}{KEY}{BROKEN},{after}"),
        None => format!("{KEY}{BROKEN} {configured}"),
    }
}

/// The translator asks for huge pages for its code, and QEMU for a table that is nearly empty: 4 MiB of a pod that nobody
/// needs, and no program in it was slower without (docs/design/003-memory.md). A clone with copied memory is there for its
/// speed: small pages cost it 3 %.
pub(super) fn pages(memory: &Memory) -> Pages {
    match memory {
        Memory::File { is_shared: true, .. } => Pages::AsHost,
        Memory::File { .. } | Memory::Anonymous => Pages::Small,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The user decides each of them.
    const ALL: &str = "mitigations=auto noreplace-smp cgroup.memory=nobpf cgroup_disable=none";

    #[test]
    fn what_is_configured_counts() {
        let of = |configured| kernel_params(Size { vcpus: 2, memory_mib: 512 }, None, configured);
        assert_eq!(of("a"), " mitigations=off noreplace-smp cgroup.memory=nosocket cgroup_disable=pressure");
        assert_eq!(of("mitigations=auto"), " noreplace-smp cgroup.memory=nosocket cgroup_disable=pressure");
        assert_eq!(of("cgroup.memory=nobpf cgroup_disable=none"), " mitigations=off noreplace-smp");
        assert_eq!(of(ALL), "");
    }

    #[test]
    fn one_processor_has_parameters_of_its_own() {
        let of = |vcpus| kernel_params(Size { vcpus, memory_mib: 512 }, Some(2_000_000), ALL);
        assert_eq!(of(1), " noapictimer tsc_early_khz=2000000 virtio_net.napi_tx=0");
        assert_eq!(of(2), " tsc_early_khz=2000000");
    }

    #[test]
    fn what_is_broken_is_left_out_beside_what_is_configured() {
        assert_eq!(without_broken("a=1"), "clearcpuid=cx16 a=1");
        assert_eq!(without_broken("clearcpuid=x a clearcpuid=avx2 b"), "clearcpuid=x a clearcpuid=cx16,avx2 b");
    }

    #[test]
    fn the_buffer_counts() {
        assert_eq!((option(0).as_str(), overhead_mib(0)), ("tcg", 1024));
        assert_eq!((option(32).as_str(), overhead_mib(32)), ("tcg,tb-size=32", 32));
    }
}
