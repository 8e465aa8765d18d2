//! The container's view of files: mounts, devices, the change of root, and what is hidden from it.
#![allow(unsafe_code, reason = "mount_setattr")]
//!
//! The image and everything in it is hostile: every path below the rootfs is resolved by the kernel with
//! `RESOLVE_IN_ROOT` (openat2(2)), so that no link of the image leads out of it, and mounts are made on the descriptor.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use agent_api::oci;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknodat};
use nix::unistd::{UnlinkatFlags, symlinkat};

use super::child::{Outcome, named};
use super::peers::Peers;
use super::{copy_up, options};
use crate::inside::{make_file, make_folders, open_in};
use crate::{storage, sysctl};

/// Bind mounts of these below `/proc` cannot be used to fool a process about itself (runc's list).
const PROC_FILES: [&str; 8] = ["cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "net/dev"];

/// File systems whose source and options name no path, which could be one that is relative to the folder we are in.
const OF_NOTHING: [&str; 6] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2"];

const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Mounts and devices, then the change of root. `submounts` are the host's below read-only mounts.
pub(super) fn build(id: &str, spec: &oci::Spec, submounts: &[String]) -> Outcome<()> {
    let linux = &spec.Linux;
    let volumes = Volumes { submounts, peers: Peers::of(spec)? };
    // never shared: nothing of a container's mounts is to reach the agent's view, and a shared root cannot be changed
    let propagation = match linux.RootfsPropagation.as_str() {
        "" => MsFlags::MS_SLAVE | MsFlags::MS_REC,
        name => match options::propagation(name) {
            Some(shared) if shared.contains(MsFlags::MS_SHARED) => MsFlags::MS_SLAVE | MsFlags::MS_REC,
            Some(other) => other,
            None => return Err(format!("unknown rootfsPropagation {name:?}")),
        },
    };
    set_flags("/", propagation)?;
    let path = spec.Root.Path.as_str();
    mount(Some(path), path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(named(format!("rootfs {path} of container {id}")))?;
    let root = File::open(path).map_err(named(format!("rootfs {path} of container {id}")))?;
    let root = OwnedFd::from(root);

    let mut has_dev = false;
    for one in &spec.Mounts {
        let lexical = clean(&one.destination);
        has_dev |= lexical == "dev" && one.type_ != "bind";
        mount_one(&root, one, &lexical, &volumes)
            .map_err(named(format!("error mounting {:?} to rootfs at {:?}", one.source, one.destination)))?;
    }
    if has_dev || open_in(&root, "dev", OFlag::O_PATH).is_ok() {
        devices(&root, linux).map_err(named("devices"))?;
    }
    // a working directory that does not exist is made, as runc does
    let cwd = clean(&spec.Process.Cwd);
    if !cwd.is_empty() {
        make_folders(&root, &cwd).map_err(named(format!("mkdir {}", spec.Process.Cwd)))?;
    }
    change_root(&root)
}

/// After the change of root: what is hidden or read-only, kernel settings.
pub(super) fn finish(spec: &oci::Spec) -> Outcome<()> {
    let linux = &spec.Linux;
    // through the container's own /proc; it becomes read-only after this
    sysctl::set(&linux.Sysctl)?;
    for path in &linux.ReadonlyPaths {
        read_only(path).map_err(named(format!("read-only path {path}")))?;
    }
    for path in &linux.MaskedPaths {
        mask(path).map_err(named(format!("masked path {path}")))?;
    }
    if spec.Root.Readonly {
        let old = nix::sys::statvfs::statvfs("/").map_or(MsFlags::empty(), |stat| kept_flags(stat.flags()));
        set_flags("/", MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | old)?;
    }
    if matches!(linux.RootfsPropagation.as_str(), "shared" | "rshared" | "slave" | "rslave") {
        set_flags("/", options::propagation(&linux.RootfsPropagation).unwrap_or(MsFlags::MS_SLAVE))?;
    }
    Ok(())
}

/// Binds the process's terminal on `/dev/console`.
pub(super) fn console(terminal: BorrowedFd<'_>) -> Outcome<()> {
    let path = "/dev/console";
    if fs::symlink_metadata(path).is_err() {
        File::create(path).map_err(named(path))?;
    }
    let from = format!("/proc/self/fd/{}", terminal.as_raw_fd());
    mount(Some(from.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(named(path))
}

/// Without leading slash, `.` and `..`; links are the kernel's business later.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn by_fd(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// What is to be known of the host's folders.
struct Volumes<'a> {
    /// Mounts of the host's below read-only ones.
    submounts: &'a [String],
    peers: Peers,
}

fn mount_one(root: &OwnedFd, one: &oci::Mount, lexical: &str, volumes: &Volumes<'_>) -> Outcome<()> {
    let parsed = options::parse(&one.options);
    let is_bind = one.type_ == "bind" || parsed.flags.contains(MsFlags::MS_BIND);
    if let Some(rest) = lexical.strip_prefix("proc/") {
        let harmless = is_bind && (PROC_FILES.contains(&rest) || rest.starts_with("sys/"));
        if !harmless && one.type_ != "tmpfs" {
            return Err(format!("{} cannot be mounted because it is inside /proc", one.destination));
        }
    }
    if is_bind {
        return bind(root, one, lexical, &parsed, volumes);
    }
    let (kind, source, data) = match one.type_.as_str() {
        // the guest has version 2 alone; the container's own cgroup is its root
        "cgroup" | "cgroup2" => ("cgroup2", "cgroup2", ""),
        kind => (kind, one.source.as_str(), parsed.data.as_str()),
    };
    if kind.is_empty() {
        return Err("the mount has no type".into());
    }
    if parsed.copy_up && kind != "tmpfs" {
        return Err(format!("mount option tmpcopyup works with tmpfs only, not with {kind}"));
    }
    let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    // what is there before the mount hides it
    let old = if kind == "tmpfs" { open_in(root, lexical, folder).ok() } else { None };
    let data = old.as_ref().map_or_else(|| Ok(data.to_owned()), |old| like(old, data)).map_err(named("mount point"))?;
    // what is to be filled becomes read-only afterwards
    let later = if parsed.copy_up { parsed.flags & MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let target = make_folders(root, lexical).map_err(named("mount point"))?;
    let mount_on = |place: &str| {
        mount(Some(source), place, Some(kind), parsed.flags & !later, Some(data.as_str()))
            .map_err(|errno| errno.desc().to_owned())
    };
    if OF_NOTHING.contains(&kind) {
        // named by being there, which takes less than a way through /proc
        nix::unistd::fchdir(&target).map_err(named("mount point"))?;
        let mounted = mount_on(".");
        std::env::set_current_dir("/").map_err(named("/"))?;
        mounted?;
    } else {
        mount_on(by_fd(&target).as_str())?;
    }
    if parsed.copy_up {
        let new = open_in(root, lexical, folder).map_err(named("mount point"))?;
        if let Some(old) = old {
            copy_up::copy(&old, &new).map_err(named("tmpcopyup"))?;
        }
        if !later.is_empty() {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | parsed.flags;
            mount(None::<&str>, by_fd(&new).as_str(), None::<&str>, flags, None::<&str>)
                .map_err(named("mount flags"))?;
        }
    }
    propagate(root, lexical, &parsed)
}

/// A tmpfs gets the permissions of the folder that it hides, unless its options say others; as runc does it.
fn like(old: &OwnedFd, data: &str) -> nix::Result<String> {
    let mode = nix::sys::stat::fstat(old)?.st_mode & 0o7777;
    Ok(if data.is_empty() { format!("mode={mode:04o}") } else { format!("mode={mode:04o},{data}") })
}

fn bind(
    root: &OwnedFd,
    one: &oci::Mount,
    lexical: &str,
    parsed: &options::Options,
    volumes: &Volumes<'_>,
) -> Outcome<()> {
    // held for as long as it is named
    let opened = storage::open_part(&one.source).map_err(named(format!("bind source {}", one.source)))?;
    let source = opened.as_ref().map_or_else(|| one.source.clone(), by_fd);
    let meta = fs::metadata(&source).map_err(named(format!("bind source {}", one.source)))?;
    let target = if meta.is_dir() { make_folders(root, lexical) } else { make_file(root, lexical) };
    let target = target.map_err(named("mount point"))?;
    if !volumes.peers.attach(one, &target).map_err(named("shared mount"))? {
        let recursive = parsed.flags & (MsFlags::MS_BIND | MsFlags::MS_REC) | MsFlags::MS_BIND;
        mount(Some(source.as_str()), by_fd(&target).as_str(), None::<&str>, recursive, None::<&str>)
            .map_err(|errno| errno.desc().to_owned())?;
    }
    let extra = parsed.flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if extra.contains(MsFlags::MS_RDONLY) && !parsed.recursive_read_only {
        meet(root, lexical, volumes.submounts);
    }
    if !extra.is_empty() {
        // the kernel takes further flags of a bind mount in a second call only; opened again to reach the new mount
        let mounted = open_in(root, lexical, OFlag::O_PATH).map_err(named("mount point"))?;
        let old = nix::sys::statvfs::fstatvfs(&mounted).map_or(MsFlags::empty(), |stat| kept_flags(stat.flags()));
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | extra | old;
        mount(None::<&str>, by_fd(&mounted).as_str(), None::<&str>, flags, None::<&str>)
            .map_err(named("mount flags"))?;
    }
    if parsed.recursive_read_only {
        let mounted = open_in(root, lexical, OFlag::O_PATH).map_err(named("mount point"))?;
        read_only_below(mounted.as_fd()).map_err(named("recursive read-only"))?;
    }
    propagate(root, lexical, parsed)
}

/// Goes into what the host has mounted below a mount. The guest's kernel mounts such a folder when somebody goes there,
/// with the flags that the mount above it has then: so before that one becomes read-only.
fn meet(root: &OwnedFd, lexical: &str, submounts: &[String]) {
    for path in submounts.iter().map(|path| clean(path)) {
        if Path::new(&path).starts_with(lexical) {
            // what cannot be entered is not there to be written
            let _ = open_in(root, &path, OFlag::O_PATH | OFlag::O_DIRECTORY);
        }
    }
}

fn propagate(root: &OwnedFd, lexical: &str, parsed: &options::Options) -> Outcome<()> {
    if parsed.propagation.is_empty() {
        return Ok(());
    }
    let mounted = open_in(root, lexical, OFlag::O_PATH).map_err(named("mount point"))?;
    for flags in &parsed.propagation {
        mount(None::<&str>, by_fd(&mounted).as_str(), None::<&str>, *flags, None::<&str>)
            .map_err(named("propagation"))?;
    }
    Ok(())
}

/// `mount_setattr(2)` with `AT_RECURSIVE`.
fn read_only_below(at: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: an open descriptor, an empty path, and a mount_attr of the size that is given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A remount must repeat what the mount has, or it would be taken away.
fn kept_flags(flags: nix::sys::statvfs::FsFlags) -> MsFlags {
    use nix::sys::statvfs::FsFlags;
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    pairs.iter().filter(|(from, _)| flags.contains(*from)).fold(MsFlags::empty(), |all, (_, to)| all | *to)
}

fn devices(root: &OwnedFd, linux: &oci::Linux) -> Outcome<()> {
    let dev = open_in(root, "dev", OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(named("/dev"))?;
    let old_mask = nix::sys::stat::umask(Mode::empty());
    for (name, major, minor) in DEVICES {
        match mknodat(&dev, name, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(format!("{name}: {errno}")),
        }
    }
    for device in &linux.Devices {
        let path = clean(&device.Path);
        let kind = match device.Type.as_str() {
            "c" | "u" => SFlag::S_IFCHR,
            "b" => SFlag::S_IFBLK,
            "p" => SFlag::S_IFIFO,
            other => return Err(format!("{}: invalid device type {other:?}: must be c, u, b or p", device.Path)),
        };
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
        let folder = make_folders(root, parent).map_err(named(&device.Path))?;
        let number = |part: i64| u64::try_from(part).map_err(|_| format!("{}: number {part}", device.Path));
        let mode = Mode::from_bits_truncate(device.FileMode & 0o7777);
        match mknodat(&folder, name, kind, mode, makedev(number(device.Major)?, number(device.Minor)?)) {
            Ok(()) => {
                let (uid, gid) = (nix::unistd::Uid::from_raw(device.UID), nix::unistd::Gid::from_raw(device.GID));
                nix::unistd::fchownat(&folder, name, Some(uid), Some(gid), nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)
                    .map_err(named(&device.Path))?;
            }
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(format!("{}: {errno}", device.Path)),
        }
    }
    nix::sys::stat::umask(old_mask);
    for (name, target) in LINKS {
        if name == "ptmx" {
            // an image's own node would reach the guest's terminals
            let _ = nix::unistd::unlinkat(&dev, name, UnlinkatFlags::NoRemoveDir);
        }
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(format!("{name}: {errno}")),
        }
    }
    Ok(())
}

/// pivot_root(2) with old and new root stacked on one another, then the old one is taken off.
fn change_root(root: &OwnedFd) -> Outcome<()> {
    let old = File::open("/").map_err(named("old root"))?;
    nix::unistd::fchdir(root).map_err(named("new root"))?;
    nix::unistd::pivot_root(".", ".").map_err(named("pivot_root"))?;
    nix::unistd::fchdir(&old).map_err(named("old root"))?;
    // so that the unmount does not reach the agent's view
    set_flags(".", MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    umount2(".", MntFlags::MNT_DETACH).map_err(named("old root"))?;
    std::env::set_current_dir("/").map_err(named("new root"))
}

fn set_flags(path: &str, flags: MsFlags) -> Outcome<()> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>).map_err(named(format!("mount flags of {path}")))
}

fn read_only(path: &str) -> nix::Result<()> {
    match mount(Some(path), path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    }
    let old = nix::sys::statvfs::statvfs(path).map_or(MsFlags::empty(), |stat| kept_flags(stat.flags()));
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | old;
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}

/// A file shows `/dev/null`, a folder an empty one.
fn mask(path: &str) -> nix::Result<()> {
    match mount(Some("/dev/null"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>) {
        Err(Errno::ENOENT) => Ok(()),
        Err(Errno::ENOTDIR) if Path::new(path).is_dir() => {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("nr_inodes=2"))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned() {
        assert_eq!(clean("/a/./b//../c"), "a/c");
        assert_eq!(clean("/../../x"), "x");
        assert_eq!(clean("/"), "");
    }
}
