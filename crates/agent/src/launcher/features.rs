//! What the host tells of us is true.

use agent_api::{features, oci};

use super::caps;
use super::seccomp::Filter;

fn profile(action: &str, arch: &str, flag: &str, op: &str) -> oci::LinuxSeccomp {
    let arg = oci::LinuxSeccompArg { Index: 0, Value: 1, ValueTwo: 1, Op: op.into(), ..Default::default() };
    oci::LinuxSeccomp {
        DefaultAction: "SCMP_ACT_ERRNO".into(),
        Architectures: vec!["SCMP_ARCH_X86_64".into(), arch.into()],
        Flags: vec![flag.into()],
        Syscalls: vec![oci::LinuxSyscall {
            Names: vec!["read".into()],
            Action: action.into(),
            Args: vec![arg],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn is_known(action: &str, arch: &str, flag: &str, op: &str) -> bool {
    Filter::new(&profile(action, arch, flag, op)).is_ok()
}

#[test]
fn the_features_that_are_told_are_there() {
    let (action, arch, flag, op) = ("SCMP_ACT_ALLOW", "SCMP_ARCH_X86", "SECCOMP_FILTER_FLAG_LOG", "SCMP_CMP_EQ");
    let unknown = |all: &[&str], known: &dyn Fn(&str) -> bool| -> Vec<String> {
        all.iter().filter(|name| !known(name)).map(ToString::to_string).collect()
    };
    assert_eq!(unknown(&features::SECCOMP_ACTIONS, &|name| is_known(name, arch, flag, op)), [""; 0]);
    assert_eq!(unknown(&features::SECCOMP_ARCHS, &|name| is_known(action, name, flag, op)), [""; 0]);
    assert_eq!(unknown(&features::SECCOMP_FLAGS, &|name| is_known(action, arch, name, op)), [""; 0]);
    assert_eq!(unknown(&features::SECCOMP_OPERATORS, &|name| is_known(action, arch, flag, name)), [""; 0]);
    assert!(!is_known("SCMP_ACT_NOTIFY", arch, flag, op));
    for (number, name) in features::CAPABILITIES.iter().enumerate() {
        assert_eq!(caps::set(&[(*name).to_owned()]), 1 << number, "{name}");
    }
}
