//! Paths below a folder in which somebody else makes the links: an image's root, a volume that containers write to. The
//! kernel resolves them with `RESOLVE_IN_ROOT` (openat2(2)).

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// Opens `path`, which no link leads out of `root`.
pub(crate) fn open_in(root: &OwnedFd, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = if path.is_empty() { "." } else { path };
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    openat2(root, path, how)
}

/// Makes what is missing of a path, one part at a time, each resolved inside the root.
pub(crate) fn make_folders(root: &OwnedFd, path: &str) -> nix::Result<OwnedFd> {
    let mut done = String::new();
    let mut folder = open_in(root, "", OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        if !done.is_empty() {
            done.push('/');
        }
        done.push_str(part);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        folder = match open_in(root, &done, flags) {
            Err(Errno::ENOENT) => {
                match mkdirat(&folder, part, Mode::from_bits_truncate(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(errno),
                }
                open_in(root, &done, flags)?
            }
            other => other?,
        };
    }
    Ok(folder)
}

/// A file to bind another file on.
pub(crate) fn make_file(root: &OwnedFd, path: &str) -> nix::Result<OwnedFd> {
    if let Ok(found) = open_in(root, path, OFlag::O_PATH) {
        return Ok(found);
    }
    let (parent, _) = path.rsplit_once('/').unwrap_or(("", path));
    make_folders(root, parent)?;
    let how = OpenHow::new()
        .flags(OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC)
        .mode(Mode::from_bits_truncate(0o644))
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    drop(openat2(root, path, how)?);
    open_in(root, path, OFlag::O_PATH)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn links_of_an_image_do_not_lead_out() {
        let dir = tempfile::tempdir().expect("a folder");
        let outside = tempfile::tempdir().expect("a folder");
        std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).expect("linked");
        std::os::unix::fs::symlink("/", dir.path().join("top")).expect("linked");
        let root = OwnedFd::from(File::open(dir.path()).expect("opened"));
        // the link's target does not exist inside, so what is made is made inside or refused
        let _ = make_folders(&root, "out/x");
        let _ = make_file(&root, "out/f");
        assert_eq!(fs::read_dir(outside.path()).expect("listed").count(), 0);
        make_folders(&root, "top/y").expect("made");
        assert!(dir.path().join("y").is_dir());
    }
}
