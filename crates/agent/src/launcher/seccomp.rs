//! The container's system call filter: made by libseccomp, loaded with what comes before it.
#![allow(unsafe_code, reason = "seccomp(2)")]

use std::fs::File;
use std::io::{self, Read, Seek};

use agent_api::oci;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};

use super::child::{Outcome, named};
use super::enosys;

/// A filter that was built and not yet loaded.
pub(super) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    pub(super) fn new(profile: &oci::LinuxSeccomp) -> Outcome<Self> {
        let errno = profile.DefaultErrnoRet.unwrap_or(libc::EPERM as u32);
        let default = action(&profile.DefaultAction, errno)?;
        let mut filter = ScmpFilterContext::new(default).map_err(named("seccomp"))?;
        let mut architectures = Vec::new();
        for name in &profile.Architectures {
            let bare = name.strip_prefix("SCMP_ARCH_").unwrap_or(name);
            let arch: ScmpArch = bare
                .to_lowercase()
                .parse()
                .or_else(|_| name.parse())
                .map_err(named(format!("seccomp architecture {name}")))?;
            filter.add_arch(arch).map_err(named(format!("seccomp architecture {name}")))?;
            architectures.push(arch);
        }
        let mut flags = 0;
        for flag in &profile.Flags {
            match flag.as_str() {
                "SECCOMP_FILTER_FLAG_TSYNC" => {}
                "SECCOMP_FILTER_FLAG_LOG" => flags |= libc::SECCOMP_FILTER_FLAG_LOG,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => flags |= libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                other => return Err(format!("seccomp flag {other} is not supported")),
            }
        }
        for rule in &profile.Syscalls {
            add(&mut filter, rule, default)?;
        }
        let mut program = enosys::stub(profile, &architectures);
        program.extend(exported(&filter).map_err(named("seccomp"))?);
        Ok(Self { program, flags })
    }

    pub(super) fn load(&self) -> Outcome<()> {
        let len = u16::try_from(self.program.len()).map_err(named("the seccomp filter is too long"))?;
        let program = libc::sock_fprog { len, filter: self.program.as_ptr().cast_mut() };
        // SAFETY: a program with its length, which the kernel copies and does not write (seccomp(2)).
        let done =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &raw const program) };
        if done < 0 { Err(named("loading the seccomp filter")(io::Error::last_os_error())) } else { Ok(()) }
    }
}

/// The instructions that libseccomp would load.
fn exported(filter: &ScmpFilterContext) -> io::Result<Vec<libc::sock_filter>> {
    let mut file = File::from(nix::sys::memfd::memfd_create(c"seccomp", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?);
    filter.export_bpf(&file).map_err(io::Error::other)?;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    // as linux/filter.h has them
    Ok(bytes
        .chunks_exact(size_of::<libc::sock_filter>())
        .map(|one| libc::sock_filter {
            code: u16::from_ne_bytes([one[0], one[1]]),
            jt: one[2],
            jf: one[3],
            k: u32::from_ne_bytes([one[4], one[5], one[6], one[7]]),
        })
        .collect())
}

fn add(filter: &mut ScmpFilterContext, rule: &oci::LinuxSyscall, default: ScmpAction) -> Outcome<()> {
    let errno = match &rule.ErrnoRet {
        Some(oci::linux_syscall::ErrnoRet::Errnoret(number)) => *number,
        _ => libc::EPERM as u32,
    };
    let action = action(&rule.Action, errno)?;
    // it would change nothing, and libseccomp refuses it
    if action == default {
        return Ok(());
    }
    let compares = rule
        .Args
        .iter()
        .map(|arg| {
            let (op, value) = match arg.Op.as_str() {
                "SCMP_CMP_NE" => (ScmpCompareOp::NotEqual, arg.Value),
                "SCMP_CMP_LT" => (ScmpCompareOp::Less, arg.Value),
                "SCMP_CMP_LE" => (ScmpCompareOp::LessOrEqual, arg.Value),
                "SCMP_CMP_EQ" => (ScmpCompareOp::Equal, arg.Value),
                "SCMP_CMP_GE" => (ScmpCompareOp::GreaterEqual, arg.Value),
                "SCMP_CMP_GT" => (ScmpCompareOp::Greater, arg.Value),
                "SCMP_CMP_MASKED_EQ" => (ScmpCompareOp::MaskedEqual(arg.Value), arg.ValueTwo),
                other => return Err(format!("seccomp comparison {other} is not supported")),
            };
            let index = u32::try_from(arg.Index).ok().filter(|index| *index < 6).ok_or("seccomp argument index")?;
            Ok(ScmpArgCompare::new(index, op, value))
        })
        .collect::<Outcome<Vec<_>>>()?;
    // two tests of one argument cannot stand in one rule: then any of the tests is enough, as runc has it
    let mut indices: Vec<_> = rule.Args.iter().map(|arg| arg.Index).collect();
    indices.sort_unstable();
    indices.dedup();
    let groups: Vec<&[ScmpArgCompare]> =
        if indices.len() < compares.len() { compares.chunks(1).collect() } else { vec![&compares] };
    for name in &rule.Names {
        // a call that this library does not know cannot be made under its default action either
        let Ok(call) = ScmpSyscall::from_name(name) else { continue };
        for group in &groups {
            let added = if group.is_empty() {
                filter.add_rule(action, call)
            } else {
                filter.add_rule_conditional(action, call, group)
            };
            added.map_err(named(format!("seccomp rule for {name}")))?;
        }
    }
    Ok(())
}

fn action(name: &str, errno: u32) -> Outcome<ScmpAction> {
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => ScmpAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => ScmpAction::KillProcess,
        "SCMP_ACT_TRAP" => ScmpAction::Trap,
        "SCMP_ACT_ERRNO" => ScmpAction::Errno(i32::try_from(errno).map_err(named("seccomp errno"))?),
        "SCMP_ACT_TRACE" => ScmpAction::Trace(u16::try_from(errno).map_err(named("seccomp trace"))?),
        "SCMP_ACT_LOG" => ScmpAction::Log,
        "SCMP_ACT_ALLOW" => ScmpAction::Allow,
        other => return Err(format!("seccomp action {other} is not supported")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_built_and_nonsense_is_refused() {
        let mut profile = oci::LinuxSeccomp {
            DefaultAction: "SCMP_ACT_ERRNO".into(),
            Architectures: vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()],
            Syscalls: vec![oci::LinuxSyscall {
                Names: vec!["read".into(), "not_a_call".into()],
                Action: "SCMP_ACT_ALLOW".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert!(Filter::new(&profile).is_ok());
        profile.DefaultAction = "SCMP_ACT_NONE".into();
        assert!(Filter::new(&profile).is_err());
    }
}
