//! Mount options as fstab and the OCI specification write them.

use nix::mount::MsFlags;

/// Options, by who reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// For mount(2).
    pub(crate) flags: MsFlags,
    /// Propagation, set by a call of its own.
    pub(crate) propagation: Vec<MsFlags>,
    /// For the file system.
    pub(crate) data: String,
    /// `rro`: read-only with everything below.
    pub(crate) recursive_read_only: bool,
    /// `tmpcopyup`: a new file system begins with what was there.
    pub(crate) copy_up: bool,
}

/// Splits them. Unknown ones are the file system's, which refuses what it does not know.
pub(crate) fn parse(options: &[String]) -> Options {
    let mut out = Options {
        flags: MsFlags::empty(),
        propagation: Vec::new(),
        data: String::new(),
        recursive_read_only: false,
        copy_up: false,
    };
    for option in options {
        let (set, flag) = match option.as_str() {
            "defaults" | "rw" | "" => (false, MsFlags::MS_RDONLY),
            "ro" => (true, MsFlags::MS_RDONLY),
            "rro" => {
                out.recursive_read_only = true;
                (true, MsFlags::MS_RDONLY)
            }
            "suid" => (false, MsFlags::MS_NOSUID),
            "nosuid" => (true, MsFlags::MS_NOSUID),
            "dev" => (false, MsFlags::MS_NODEV),
            "nodev" => (true, MsFlags::MS_NODEV),
            "exec" => (false, MsFlags::MS_NOEXEC),
            "noexec" => (true, MsFlags::MS_NOEXEC),
            "sync" => (true, MsFlags::MS_SYNCHRONOUS),
            "async" => (false, MsFlags::MS_SYNCHRONOUS),
            "dirsync" => (true, MsFlags::MS_DIRSYNC),
            "remount" => (true, MsFlags::MS_REMOUNT),
            "mand" => (true, MsFlags::MS_MANDLOCK),
            "nomand" => (false, MsFlags::MS_MANDLOCK),
            "atime" => (false, MsFlags::MS_NOATIME),
            "noatime" => (true, MsFlags::MS_NOATIME),
            "diratime" => (false, MsFlags::MS_NODIRATIME),
            "nodiratime" => (true, MsFlags::MS_NODIRATIME),
            "relatime" => (true, MsFlags::MS_RELATIME),
            "norelatime" => (false, MsFlags::MS_RELATIME),
            "strictatime" => (true, MsFlags::MS_STRICTATIME),
            "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
            "silent" => (true, MsFlags::MS_SILENT),
            "loud" => (false, MsFlags::MS_SILENT),
            "bind" => (true, MsFlags::MS_BIND),
            "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
            "tmpcopyup" => {
                out.copy_up = true;
                continue;
            }
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "unbindable" | "runbindable" => {
                out.propagation.extend(propagation(option));
                continue;
            }
            data => {
                if !out.data.is_empty() {
                    out.data.push(',');
                }
                out.data.push_str(data);
                continue;
            }
        };
        out.flags.set(flag, set);
    }
    out
}

/// The flags of a propagation's name.
pub(crate) fn propagation(name: &str) -> Option<MsFlags> {
    let (recursive, kind) = match name.strip_prefix('r') {
        Some(kind) => (MsFlags::MS_REC, kind),
        None => (MsFlags::empty(), name),
    };
    let kind = match kind {
        "private" => MsFlags::MS_PRIVATE,
        "slave" => MsFlags::MS_SLAVE,
        "shared" => MsFlags::MS_SHARED,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised_is_understood() {
        for name in agent_api::mount_options::NAMES {
            assert_eq!(parse(&[name.to_owned()]).data, "", "{name}");
        }
        assert_eq!(parse(&["ratime".to_owned()]).data, "ratime");
    }

    #[test]
    fn flags_data_and_propagation() {
        let words: Vec<String> = ["nosuid", "mode=755", "size=64k", "rslave", "ro", "rw"].map(String::from).into();
        let parsed = parse(&words);
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID);
        assert_eq!(parsed.data, "mode=755,size=64k");
        assert_eq!(parsed.propagation, [MsFlags::MS_SLAVE | MsFlags::MS_REC]);
    }
}
