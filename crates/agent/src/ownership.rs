//! A volume's group (`fsGroup` of Kubernetes): what is on the volume belongs to it and may be written by it.
//!
//! A container may be at work on the volume, so no link is followed: each entry is opened in the folder that it was found
//! in, and changed through what was opened.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

use agent_api::agent::FSGroup;
use agent_api::types::FSGroupChangePolicy;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// Folders in one another, at most.
const DEEPEST: usize = 500;

/// Gives everything below `point` to the group.
pub(crate) fn apply(point: &str, group: &FSGroup) -> io::Result<()> {
    let root = File::open(point)?;
    let only_if_other = group.group_change_policy.enum_value() == Ok(FSGroupChangePolicy::OnRootMismatch);
    if only_if_other && is_done(&root.metadata()?, group.group_id) {
        return Ok(());
    }
    below(&root, group.group_id, DEEPEST)?;
    // last, since it says that the rest is done
    change(&root, group.group_id)
}

fn below(folder: &File, group: u32, deepest: usize) -> io::Result<()> {
    if deepest == 0 {
        return Err(io::Error::other(format!("folders are nested deeper than {DEEPEST} levels")));
    }
    for entry in fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        // neither links, which have no mode, nor devices and pipes, which an opening would do something to
        if !kind.is_dir() && !kind.is_file() {
            continue;
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let open = match openat(folder, entry.file_name().as_os_str(), flags, Mode::empty()) {
            Ok(open) => File::from(open),
            // gone, or something else by now
            Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ELOOP) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if kind.is_dir() {
            below(&open, group, deepest - 1)?;
        }
        change(&open, group)?;
    }
    Ok(())
}

/// As Kubernetes does it: the group's, to read and write, and what is made in a folder is the group's too.
fn change(file: &File, group: u32) -> io::Result<()> {
    fchown(file, None, Some(group))?;
    let meta = file.metadata()?;
    let more = if meta.is_dir() { 0o2770 } else { 0o660 };
    file.set_permissions(fs::Permissions::from_mode((meta.mode() | more) & 0o7777))
}

fn is_done(meta: &fs::Metadata, group: u32) -> bool {
    meta.gid() == group && meta.mode() & 0o2770 == 0o2770
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_links() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (root, outside) = (tempfile::tempdir().expect("a folder"), tempfile::NamedTempFile::new().expect("a file"));
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("a/b")).expect("made");
        fs::write(at("a/b/file"), "").expect("made");
        std::os::unix::fs::symlink(outside.path(), at("a/link")).expect("made");
        nix::unistd::mkfifo(&at("pipe"), Mode::from_bits_truncate(0o600)).expect("made");
        let group = |policy| FSGroup { group_id: 4711, group_change_policy: policy, ..Default::default() };
        let point = root.path().to_str().expect("a path");
        apply(point, &group(FSGroupChangePolicy::Always.into())).expect("applied");
        let state = |name: &str| fs::metadata(at(name)).map(|meta| (meta.gid(), meta.mode() & 0o7777)).expect("there");
        assert_eq!((state("a/b").0, state("a/b").1 & 0o2770), (4711, 0o2770));
        assert_eq!((state("a/b/file").0, state("a/b/file").1 & 0o660), (4711, 0o660));
        assert_ne!(outside.path().metadata().expect("there").gid(), 4711);
        assert_ne!(state("pipe").0, 4711);
        // the root is right, so nothing is looked at
        fs::write(at("later"), "").expect("made");
        std::os::unix::fs::chown(at("later"), None, Some(4712)).expect("given away");
        apply(point, &group(FSGroupChangePolicy::OnRootMismatch.into())).expect("nothing to do");
        assert_eq!(state("later").0, 4712);
    }
}
