//! What a process has by being started here, and not by its specification: where its streams lead and, as with runc, the
//! limits of the one who starts it.

use agent_api::oci;
use nix::sys::resource::{Resource, getrlimit};

use super::Stdio;

/// All of getrlimit(2).
const LIMITS: [(&str, Resource); 16] = [
    ("RLIMIT_AS", Resource::RLIMIT_AS),
    ("RLIMIT_CORE", Resource::RLIMIT_CORE),
    ("RLIMIT_CPU", Resource::RLIMIT_CPU),
    ("RLIMIT_DATA", Resource::RLIMIT_DATA),
    ("RLIMIT_FSIZE", Resource::RLIMIT_FSIZE),
    ("RLIMIT_LOCKS", Resource::RLIMIT_LOCKS),
    ("RLIMIT_MEMLOCK", Resource::RLIMIT_MEMLOCK),
    ("RLIMIT_MSGQUEUE", Resource::RLIMIT_MSGQUEUE),
    ("RLIMIT_NICE", Resource::RLIMIT_NICE),
    ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE),
    ("RLIMIT_NPROC", Resource::RLIMIT_NPROC),
    ("RLIMIT_RSS", Resource::RLIMIT_RSS),
    ("RLIMIT_RTPRIO", Resource::RLIMIT_RTPRIO),
    ("RLIMIT_RTTIME", Resource::RLIMIT_RTTIME),
    ("RLIMIT_SIGPENDING", Resource::RLIMIT_SIGPENDING),
    ("RLIMIT_STACK", Resource::RLIMIT_STACK),
];

/// Whether it has a terminal, and whether anybody will write to it.
pub(crate) fn streams(process: &mut oci::Process, stdio: &Stdio) {
    process.Terminal = stdio.terminal;
    process.NoStdin = !stdio.terminal && stdio.stdin.is_empty();
}

/// Those that the specification does not say are this process's own. The guest's would be what its kernel makes of the
/// machine's size, which nobody has chosen.
pub(crate) fn limits(process: &mut oci::Process) {
    for (name, which) in LIMITS {
        if process.Rlimits.iter().any(|limit| limit.Type == name) {
            continue;
        }
        // one that this kernel does not know is not passed on
        if let Ok((soft, hard)) = getrlimit(which) {
            process.Rlimits.push(oci::POSIXRlimit { Type: name.into(), Soft: soft, Hard: hard, ..Default::default() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_are_said_stay_and_the_others_are_our_own() {
        let said = oci::POSIXRlimit { Type: "RLIMIT_NOFILE".into(), Soft: 7, Hard: 8, ..Default::default() };
        let mut process = oci::Process { Rlimits: vec![said.clone()], ..Default::default() };
        limits(&mut process);
        assert_eq!(process.Rlimits.len(), LIMITS.len());
        assert_eq!(process.Rlimits[0], said);
        let stack = process.Rlimits.iter().find(|limit| limit.Type == "RLIMIT_STACK").expect("passed on");
        assert_eq!((stack.Soft, stack.Hard), getrlimit(Resource::RLIMIT_STACK).expect("known"));
    }

    #[test]
    fn who_has_no_client_has_no_input() {
        let mut process = oci::Process::default();
        streams(&mut process, &Stdio::default());
        assert!(process.NoStdin && !process.Terminal);
        streams(&mut process, &Stdio { stdin: "/fifo".into(), ..Stdio::default() });
        assert!(!process.NoStdin);
        streams(&mut process, &Stdio { terminal: true, ..Stdio::default() });
        assert!(!process.NoStdin && process.Terminal);
    }
}
