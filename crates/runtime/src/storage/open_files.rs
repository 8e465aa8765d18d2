//! How many files a daemon of ours may have open, and so how many of the host's a guest may know at once.

use std::fs;

use config::SharedFs;
use nix::sys::resource::{Resource, getrlimit};

/// What virtiofsd takes where it may.
const PLENTY: u64 = 1_000_000;
/// CAP_SYS_RESOURCE's bit: who has it raises limits.
const MAY_RAISE: u32 = 24;
/// Another limit than its own, an argument of both makes of virtiofsd; 0 for the one that it finds.
const ARGUMENT: &str = "--rlimit-nofile";
/// A parameter that our patch gives the guest's kernel; others do not mind it.
const PARAMETER: &str = "fuse.max_inodes";

/// What the guest's kernel is told, where files are shared: from how many on it forgets files that nobody uses. A file
/// that is used is two of the daemon's descriptors, so a half of them is as many as can be used at once anyway.
pub(crate) fn kernel_parameter(config: &config::Hypervisor) -> Option<String> {
    let is_shared = matches!(config.shared_fs, SharedFs::Auto | SharedFs::VirtioFs);
    is_shared.then(|| format!("{PARAMETER}={}", limit(&config.virtio_fs_extra_args, Own::look()) / 2))
}

/// Says so when they are few: what the guest's programs see of it does not tell.
pub(super) fn tell(config: &config::Hypervisor) {
    let own = Own::look();
    if own.most() < PLENTY {
        tracing::info!(
            "virtiofsd may have {} files open, and needs two for each file that the guest's programs have open: opening more fails with EMFILE or EBADF; raise LimitNOFILE of containerd",
            limit(&config.virtio_fs_extra_args, own)
        );
    }
}

/// What this process may.
#[derive(Debug, Clone, Copy)]
struct Own {
    hard: u64,
    may_raise: bool,
}

impl Own {
    fn look() -> Self {
        let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(PLENTY, |(_, hard)| hard);
        // not asked where it does not matter
        let may_raise =
            hard >= PLENTY || fs::read_to_string("/proc/self/status").is_ok_and(|status| may_raise(&status));
        Self { hard, may_raise }
    }

    fn most(self) -> u64 {
        if self.may_raise { self.hard.max(PLENTY) } else { self.hard }
    }
}

/// Of a daemon with these arguments.
fn limit(arguments: &[String], own: Own) -> u64 {
    match asked(arguments) {
        None => own.most().min(PLENTY),
        Some(0) => own.hard,
        Some(asked) if own.may_raise => asked,
        Some(asked) => asked.min(own.hard),
    }
}

/// The last one counts; what is no number ends the daemon, which says so.
fn asked(arguments: &[String]) -> Option<u64> {
    let mut asked = None;
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let Some(rest) = argument.strip_prefix(ARGUMENT) else { continue };
        let value = rest.strip_prefix('=').or_else(|| arguments.next().map(String::as_str));
        asked = value.and_then(|value| value.parse().ok());
    }
    asked
}

fn may_raise(status: &str) -> bool {
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    effective.is_some_and(|all| all & 1 << MAY_RAISE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read() {
        assert!(may_raise("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_raise("CapPrm:\t000001ffffffffff\nCapEff:\t000001fffeffffff\n"));
        assert!(!may_raise("nothing"));
    }

    #[test]
    fn the_limit_is_the_daemons() {
        let of = |arguments: &[&str], hard, may_raise| {
            let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
            limit(&arguments, Own { hard, may_raise })
        };
        assert_eq!(of(&["--thread-pool-size=1"], 20_000, false), 20_000);
        assert_eq!(of(&[], 20_000, true), PLENTY);
        assert_eq!(of(&[], 5_000_000, true), PLENTY);
        assert_eq!(of(&["--rlimit-nofile=400"], 20_000, false), 400);
        assert_eq!(of(&["-o", "x", "--rlimit-nofile", "30000"], 20_000, false), 20_000);
        assert_eq!(of(&["--rlimit-nofile", "30000"], 20_000, true), 30_000);
        assert_eq!(of(&["--rlimit-nofile=9", "--rlimit-nofile=0"], 20_000, true), 20_000);
        assert_eq!(of(&["--rlimit-nofile"], 20_000, false), 20_000);
    }

    #[test]
    fn only_a_guest_with_virtio_fs_is_told() {
        let told = |toml: &str| {
            let text = format!("[hypervisor.qemu]\n{toml}\nvirtio_fs_extra_args = [\"--rlimit-nofile=100\"]");
            let config = config::Config::parse(&text, std::path::Path::new("/c")).expect("right");
            kernel_parameter(&config.hypervisor)
        };
        assert_eq!(told("").as_deref(), Some("fuse.max_inodes=50"));
        assert_eq!(told("shared_fs = \"none\""), None);
        assert_eq!(told("shared_fs = \"virtio-9p\""), None);
    }
}
