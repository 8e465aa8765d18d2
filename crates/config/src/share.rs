//! How the host's files reach the guest: the keys of virtio-fs and 9p.

use crate::Error;
use crate::file::{Entry, Value};
use crate::keys::{number, one_of, refuse};
use crate::types::SharedFs;

/// Most bytes of a 9p packet: what the guest's virtio transport has descriptors for.
const MOST_MSIZE: u64 = 500 << 10;

pub(crate) fn kind(entry: &Entry) -> Result<SharedFs, Error> {
    if let Value::Text(text) = &entry.value
        && ["virtio-fs-nydus", "inline-virtio-fs"].contains(&text.as_str())
    {
        return Err(refuse(entry, "is not supported: set \"virtio-fs\", \"virtio-9p\" or \"none\""));
    }
    let all = [
        ("auto", SharedFs::Auto),
        ("virtio-fs", SharedFs::VirtioFs),
        ("virtio-9p", SharedFs::VirtioNineP),
        ("none", SharedFs::None),
    ];
    one_of(entry, &all)
}

pub(crate) fn msize(entry: &Entry) -> Result<u32, Error> {
    number(entry, 4096, MOST_MSIZE).map(|size| size as u32)
}

/// The DAX window. A guest could map the host's page cache with it, and QEMU would have to show it.
pub(crate) fn window(entry: &Entry) -> Result<(), Error> {
    match entry.value {
        Value::Integer(1..) => {
            let why = "a DAX window of virtio-fs needs a QEMU that has one, which no release of QEMU is: set it to 0";
            Err(refuse(entry, why))
        }
        _ => number(entry, 0, 0).map(drop),
    }
}

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
