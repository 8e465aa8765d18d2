//! Capability sets (capabilities(7)).
#![allow(unsafe_code, reason = "capset and prctl")]

use std::io;

/// In the order of their numbers, linux/capability.h.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set as bits; names that this kernel's list does not have are left out, as runc does.
pub(super) fn set(names: &[String]) -> u64 {
    names.iter().fold(0, |bits, name| {
        let upper = name.to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        NAMES.iter().position(|known| *known == bare).map_or(bits, |number| bits | 1 << number)
    })
}

/// Takes everything else out of the bounding set.
pub(super) fn bound(keep: u64) -> io::Result<()> {
    for number in 0..NAMES.len() {
        if keep & (1 << number) == 0 {
            // SAFETY: prctl with a number takes no pointers.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } < 0 {
                let error = io::Error::last_os_error();
                // a kernel that is older than the list
                if error.raw_os_error() != Some(libc::EINVAL) {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Sets the three sets of this process (capset(2), version 3 of its interface).
pub(super) fn apply(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let half = |set: u64, part: u32| (set >> (32 * part)) as u32;
    let data: [[u32; 3]; 2] =
        [0, 1].map(|part| [half(effective, part), half(permitted, part), half(inheritable, part)]);
    // SAFETY: header and data have the layout of version 3 and live through the call.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const data) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the ambient set. What is not permitted and inheritable cannot be in it, and is left out, as runc does.
pub(super) fn ambient(wanted: u64) -> io::Result<()> {
    // SAFETY: prctl with numbers takes no pointers.
    unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        for number in 0..NAMES.len() {
            if wanted & (1 << number) != 0
                && libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) < 0
            {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EPERM) {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bits() {
        let names: Vec<String> = ["CAP_CHOWN", "cap_kill", "SYS_ADMIN", "CAP_FROM_THE_FUTURE"].map(String::from).into();
        assert_eq!(set(&names), 1 | 1 << 5 | 1 << 21);
        assert_eq!(set(&["CAP_CHECKPOINT_RESTORE".to_owned()]), 1 << 40);
    }
}
