//! Calls that a profile's author could not know of. A program asks for a new call, and takes an old one when the kernel
//! says ENOSYS; a profile that denies what it does not name says EPERM, which it takes for a refusal. As runc does it, what
//! is above the newest call that a profile names does not exist: a few instructions before the filter's own.

use std::collections::BTreeMap;

use agent_api::oci;
use libc::{
    BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ERRNO, sock_filter,
};
use libseccomp::{ScmpArch, ScmpSyscall};

/// The first number of x32, whose calls have x86-64's architecture (asm/unistd.h).
const X32: u32 = 0x4000_0000;
/// Where linux/seccomp.h's `seccomp_data` has the call's number and the architecture.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// What a filter would be able to see of the machine's own architectures, by their numbers in linux/audit.h. Calls of others
/// cannot be made on it.
const ARCHITECTURES: [(ScmpArch, u32); 5] = [
    (ScmpArch::X86, 0x4000_0003),
    (ScmpArch::X8664, 0xc000_003e),
    (ScmpArch::X32, 0xc000_003e),
    (ScmpArch::Arm, 0x4000_0028),
    (ScmpArch::Aarch64, 0xc000_00b7),
];

/// The newest calls that are named, of one architecture's number.
#[derive(Debug, Default, PartialEq, Eq)]
struct Newest {
    plain: Option<u32>,
    x32: Option<u32>,
}

/// What has to be put before the filter; nothing where runc puts nothing.
pub(super) fn stub(profile: &oci::LinuxSeccomp, architectures: &[ScmpArch]) -> Vec<sock_filter> {
    let is_said_already = profile.DefaultErrnoRet == Some(libc::ENOSYS as u32);
    // one that does not deny has nothing to be mistaken for; a tracer answers for itself
    let denies = !matches!(profile.DefaultAction.as_str(), "SCMP_ACT_ALLOW" | "SCMP_ACT_LOG" | "SCMP_ACT_TRACE");
    if is_said_already || !denies {
        return Vec::new();
    }
    let mut newest: BTreeMap<u32, Newest> = BTreeMap::new();
    for (arch, number) in ARCHITECTURES.iter().filter(|(arch, _)| architectures.contains(arch)) {
        let names = profile.Syscalls.iter().flat_map(|rule| &rule.Names);
        let calls = names.filter_map(|name| ScmpSyscall::from_name_by_arch(name, *arch).ok());
        // those without a number there have negative ones
        let last = calls.filter_map(|call| u32::try_from(i32::from(call)).ok()).max();
        let of_number = newest.entry(*number).or_default();
        if *arch == ScmpArch::X32 { of_number.x32 = last } else { of_number.plain = last }
    }
    program(&newest)
}

fn program(newest: &BTreeMap<u32, Newest>) -> Vec<sock_filter> {
    let load = |offset| instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
    let jump = |kind, than, yes, no| instruction(BPF_JMP | kind | BPF_K, than, yes, no);
    let refuse = instruction(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | libc::ENOSYS as u32, 0, 0);
    let mut out = Vec::new();
    for (number, newest) in newest {
        // what runs when the architecture is this one; its last instruction falls through to what comes after it
        let checks = match (newest.plain, newest.x32) {
            (Some(plain), Some(x32)) => {
                vec![jump(BPF_JGE, X32, 0, 1), jump(BPF_JGT, x32, 1, 2), jump(BPF_JGT, plain, 0, 1), refuse]
            }
            (Some(last), None) | (None, Some(last)) => vec![jump(BPF_JGT, last, 0, 1), refuse],
            (None, None) => continue,
        };
        out.extend([load(ARCHITECTURE), jump(BPF_JEQ, *number, 0, checks.len() as u8 + 1), load(NUMBER)]);
        out.extend(checks);
    }
    out
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the filter's own instructions come after, or the errno.
    fn run(program: &[sock_filter], number: u32, architecture: u32) -> Option<u32> {
        let (mut at, mut value) = (0, 0);
        while let Some(one) = program.get(at) {
            at += 1;
            let code = u32::from(one.code);
            let taken = |is: bool| usize::from(if is { one.jt } else { one.jf });
            if code == BPF_LD | BPF_W | BPF_ABS {
                value = if one.k == NUMBER { number } else { architecture };
            } else if code == BPF_RET | BPF_K {
                return Some(one.k & 0xffff);
            } else if code == BPF_JMP | BPF_JEQ | BPF_K {
                at += taken(value == one.k);
            } else if code == BPF_JMP | BPF_JGT | BPF_K {
                at += taken(value > one.k);
            } else {
                assert_eq!(code, BPF_JMP | BPF_JGE | BPF_K);
                at += taken(value >= one.k);
            }
        }
        assert_eq!(at, program.len(), "it ends where the filter begins");
        None
    }

    fn profile(names: &[&str]) -> oci::LinuxSeccomp {
        let rule = oci::LinuxSyscall {
            Names: names.iter().map(ToString::to_string).collect(),
            Action: "SCMP_ACT_ALLOW".into(),
            ..Default::default()
        };
        oci::LinuxSeccomp { DefaultAction: "SCMP_ACT_ERRNO".into(), Syscalls: vec![rule], ..Default::default() }
    }

    #[test]
    fn what_is_newer_than_the_profile_does_not_exist() {
        const AMD64: u32 = 0xc000_003e;
        const I386: u32 = 0x4000_0003;
        // 281 and 319 there
        let profile = profile(&["read", "epoll_pwait", "not_a_call"]);
        let enosys = Some(libc::ENOSYS as u32);
        let one = stub(&profile, &[ScmpArch::X8664]);
        assert_eq!((run(&one, 281, AMD64), run(&one, 282, AMD64), run(&one, 0, AMD64)), (None, enosys, None));
        assert_eq!((run(&one, X32 + 1, AMD64), run(&one, u32::MAX, AMD64)), (enosys, enosys));
        assert_eq!(run(&one, 5000, I386), None, "another architecture is the filter's own business");
        let all = stub(&profile, &[ScmpArch::X8664, ScmpArch::X86, ScmpArch::X32, ScmpArch::Mips]);
        assert_eq!((run(&all, 281, AMD64), run(&all, 282, AMD64)), (None, enosys));
        assert_eq!((run(&all, X32 + 281, AMD64), run(&all, X32 + 282, AMD64)), (None, enosys));
        assert_eq!((run(&all, 319, I386), run(&all, 320, I386)), (None, enosys));
    }

    #[test]
    fn nothing_where_runc_has_nothing() {
        let mut profile = profile(&["read"]);
        assert!(!stub(&profile, &[ScmpArch::X8664]).is_empty());
        assert!(stub(&profile, &[]).is_empty());
        profile.DefaultErrnoRet = Some(libc::ENOSYS as u32);
        assert!(stub(&profile, &[ScmpArch::X8664]).is_empty());
        profile.DefaultErrnoRet = None;
        profile.DefaultAction = "SCMP_ACT_ALLOW".into();
        assert!(stub(&profile, &[ScmpArch::X8664]).is_empty());
        profile.DefaultAction = "SCMP_ACT_ERRNO".into();
        profile.Syscalls.clear();
        assert!(stub(&profile, &[ScmpArch::X8664]).is_empty());
    }
}
