//! Whether this guest runs under QEMU's translator (TCG), where each piece of kernel code costs a hundred times what it costs
//! a processor. What is standard elsewhere and expensive there is left until somebody asks for it.
#![allow(unsafe_code, reason = "CPUID")]

/// The leaf by which hypervisors say who they are, and what QEMU says there (target/i386/cpu.c).
#[cfg(target_arch = "x86_64")]
const LEAF: u32 = 0x4000_0000;
const SIGNATURE: [u8; 12] = *b"TCGTCGTCGTCG";

#[cfg(target_arch = "x86_64")]
pub(crate) fn is_there() -> bool {
    use std::arch::x86_64::__cpuid;
    /// In ECX of leaf 1: there is a hypervisor, so the leaf means something.
    const HYPERVISOR: u32 = 1 << 31;
    // SAFETY: every x86-64 processor has CPUID, and it only reads.
    #[allow(unused_unsafe, reason = "newer compilers know that it is safe")]
    let (features, name) = unsafe { (__cpuid(1), __cpuid(LEAF)) };
    features.ecx & HYPERVISOR != 0 && is_signature([name.ebx, name.ecx, name.edx])
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn is_there() -> bool {
    false
}

fn is_signature(registers: [u32; 3]) -> bool {
    registers.iter().flat_map(|register| register.to_le_bytes()).eq(SIGNATURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_translator_is_the_translator() {
        let registers = |name: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
            [word(0), word(4), word(8)]
        };
        assert!(is_signature(registers(b"TCGTCGTCGTCG")));
        assert!(!is_signature(registers(b"KVMKVMKVM\0\0\0")));
        assert!(!is_signature([0; 3]));
        // whatever runs the tests answers
        let _ = is_there();
    }
}
