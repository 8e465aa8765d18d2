//! How the host's files reach the guest: the keys of virtio-fs and 9p.

/// Most bytes of a 9p packet: what the guest's virtio transport has descriptors for.
pub(crate) const MOST_MSIZE: u32 = 500 << 10;

/// Kata's default asks for submounts to be announced, in a spelling for each of virtiofsd's makes. Here that is always
/// asked for, in the right one, and asked for twice or in the wrong one the daemon would not start.
pub(crate) fn daemon_args(args: Vec<String>) -> Vec<String> {
    let mut kept: Vec<String> = Vec::with_capacity(args.len());
    for arg in args {
        if arg == "announce_submounts" && kept.last().is_some_and(|last| last == "-o") {
            kept.pop();
        } else if !["--announce-submounts", "-oannounce_submounts"].contains(&arg.as_str()) {
            kept.push(arg);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn submounts_are_asked_for_once() {
        let args = |args: &[&str]| daemon_args(args.iter().map(|arg| (*arg).to_owned()).collect());
        assert_eq!(args(&["--thread-pool-size=1", "--announce-submounts"]), ["--thread-pool-size=1"]);
        assert_eq!(args(&["-o", "announce_submounts", "-o", "flock"]), ["-o", "flock"]);
    }
}
