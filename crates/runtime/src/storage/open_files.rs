//! How many files a daemon of ours may have open, which is how many of the host's a guest may know at once.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};

/// What virtiofsd takes where it may.
const PLENTY: u64 = 1_000_000;
/// CAP_SYS_RESOURCE's bit: who has it raises limits.
const MAY_RAISE: u32 = 24;

/// Says so when they are few: what the guest's programs see of it does not tell.
pub(super) fn tell() {
    if let Some(most) = few() {
        tracing::info!(
            "virtiofsd may have {most} files open, one for each that the guest knows, and containerd may not raise that: \
             beyond it programs get EMFILE or EBADF; raise LimitNOFILE of containerd, or set virtio_fs_cache = \"never\""
        );
    }
}

/// The limit, unless it is plenty or can be raised.
fn few() -> Option<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    if hard >= PLENTY {
        return None;
    }
    let status = fs::read_to_string("/proc/self/status").ok()?;
    (!may_raise(&status)).then_some(hard)
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
}
