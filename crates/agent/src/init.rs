//! What a kernel's first process must do before anything else can run.
#![allow(unsafe_code, reason = "ioctl and prctl")]

use std::fs;
use std::io;
use std::os::unix::fs::symlink;

use nix::mount::{MsFlags, mount};

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// What it takes to find the host: a root that can be pivoted away from, the kernel's own file systems.
pub(crate) fn prepare() -> io::Result<()> {
    movable_root()?;
    at("proc", "/proc", "proc", SAFE, "")?;
    at("sysfs", "/sys", "sysfs", SAFE, "")?;
    at("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755")
}

/// What containers need besides, before the first request: the host has been told that we are here, and is on its way.
pub(crate) fn finish() -> io::Result<()> {
    at("devpts", "/dev/pts", "devpts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=0620,ptmxmode=0666")?;
    at("tmpfs", "/dev/shm", "tmpfs", SAFE, "mode=1777")?;
    at("tmpfs", "/run", "tmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755")?;
    at("cgroup2", "/sys/fs/cgroup", "cgroup2", SAFE, "")?;
    crate::cgroup::delegate()?;
    // an idle guest is to be idle: the kernel would wake up twice a second to see whether huge pages are to be made ahead
    let _ = fs::write("/proc/sys/vm/compaction_proactiveness", "0");
    fs::create_dir_all(agent_api::paths::CONTAINERS)?;
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        match symlink(target, format!("/dev/{link}")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    nix::unistd::setsid().ok();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    loopback_up()
}

fn at(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    mount(Some(source), target, Some(kind), flags, Some(data))
        .map_err(|errno| io::Error::other(format!("mount of {kind} on {target}: {errno}")))
}

/// The kernel's own root cannot be pivoted away from (pivot_root(2), EINVAL on the initial ramfs). A bind mount of it,
/// moved over it, can.
fn movable_root() -> io::Result<()> {
    const AT: &str = "/mnt";
    fs::create_dir_all(AT)?;
    mount(Some("/"), AT, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    std::env::set_current_dir(AT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")
}

fn loopback_up() -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain data, all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: a valid socket and a pointer to an ifreq that lives through the call (netdevice(7)).
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
