//! A macvtap on top of an interface of the pod, in the mode `passthru`: everything that comes in is the VM's.
//!
//! Kata takes the mode `bridge`, which needs two MAC addresses: it gives the interface below another one and clears its
//! addresses, which would have to be put back. In `passthru` the macvtap has the interface's own MAC address and gets every
//! frame that is not for many; those the namespace sees as well, and answers with the same MAC address. So the interface
//! stays as it was, and the only thing to undo is the macvtap itself.
#![allow(unsafe_code, reason = "the calls of the mount interface have no safe wrapper")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use nix::sys::stat::{Mode, SFlag, makedev, mknodat};
use rtnetlink::packet_route::link::MacVtapMode;
use rtnetlink::{Handle, LinkMacVtap, LinkUnspec};

use super::scan::Link;
use super::tcfilter::silence;
use super::{failed, tap};
use crate::Error;
use crate::host_network::find;

/// Makes one; the caller has written the undo down. Returns its descriptors, one a queue.
pub(super) async fn connect(handle: &Handle, link: &Link, name: &str, queues: u32) -> Result<Vec<OwnedFd>, Error> {
    let what = |step: &str| format!("{step} of interface {}", link.name);
    // listening first: the device is told of before the kernel answers
    let events = uevents().map_err(Error::host(what("opening the device events")))?;
    let new = LinkMacVtap::new(name, link.index, MacVtapMode::Passthrough).build();
    handle.link().add(new).execute().await.map_err(failed(what("the macvtap")))?;
    let number = device_number(&events, name).map_err(Error::host(what("the macvtap's device")))?;
    silence(name);
    let index = find(handle, name).await?.header.index;
    // no filter for groups: the guest joins them without telling
    let up = LinkUnspec::new_with_index(index).mtu(link.mtu).allmulticast(true).up().build();
    handle.link().set(up).execute().await.map_err(failed(what("raising the macvtap")))?;
    let fds: io::Result<Vec<OwnedFd>> =
        (0..queues.max(1)).map(|_| tap::attach(open_device(number)?, "", queues > 1)).collect();
    fds.map_err(Error::host(what("the macvtap's device")))
}

/// The kernel's messages about devices of the calling thread's network namespace (netlink(7), NETLINK_KOBJECT_UEVENT).
fn uevents() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    Ok(fd)
}

/// Of the character device of the macvtap `name`. It is known by these messages and by a sysfs of the namespace, but not
/// by a name in the host's `/dev`, where macvtaps of several namespaces may want the same one.
fn device_number(events: &OwnedFd, name: &str) -> io::Result<(u64, u64)> {
    let mut message = [0; 4096];
    loop {
        match recv(events.as_raw_fd(), &mut message, MsgFlags::empty()) {
            Ok(length) => {
                if let Some(number) = number_in(&message[..length], name) {
                    return Ok(number);
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(io::Error::new(io::ErrorKind::NotFound, "the kernel reported no device")),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn number_in(message: &[u8], name: &str) -> Option<(u64, u64)> {
    let value = |key: &str| {
        let parts = message.split(|byte| *byte == 0).filter_map(|part| std::str::from_utf8(part).ok());
        parts.filter_map(|part| part.split_once('=')).find(|(name, _)| *name == key).map(|(_, value)| value)
    };
    let is_ours = value("ACTION") == Some("add")
        && value("SUBSYSTEM") == Some("macvtap")
        && value("DEVPATH")?.contains(&format!("/net/{name}/"));
    if !is_ours {
        return None;
    }
    Some((value("MAJOR")?.parse().ok()?, value("MINOR")?.parse().ok()?))
}

/// Opens a character device that has no name anywhere: in a file system of memory that is mounted nowhere and goes with
/// its descriptor (fsopen(2), Linux 5.2).
fn open_device((major, minor): (u64, u64)) -> io::Result<File> {
    const CMD_CREATE: libc::c_long = 6;
    let kind: &CStr = c"tmpfs";
    // SAFETY: a name that ends in zero, and flags; a new descriptor or -1.
    let context = descriptor(unsafe {
        libc::syscall(libc::SYS_fsopen, kind.as_ptr(), 1 /* FSOPEN_CLOEXEC */)
    })?;
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: a valid descriptor and a command that takes neither key nor value.
    if unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), CMD_CREATE, none, none, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a valid descriptor and flags; a new descriptor or -1.
    let root = descriptor(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1 /* FSMOUNT_CLOEXEC */, 0)
    })?;
    mknodat(&root, "tap", SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(major, minor))?;
    let device = openat(&root, "tap", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    Ok(device.into())
}

fn descriptor(answer: libc::c_long) -> io::Result<OwnedFd> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(answer).map_err(io::Error::other)?;
    // SAFETY: the caller's system call has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_found_in_the_kernels_messages() {
        let message = |subsystem: &str, path: &str| {
            format!("add@{path}\0ACTION=add\0DEVPATH={path}\0SUBSYSTEM={subsystem}\0MAJOR=246\0MINOR=1\0DEVNAME=tap4\0")
        };
        let path = "/devices/virtual/net/tap0_kata/macvtap/tap4";
        assert_eq!(number_in(message("macvtap", path).as_bytes(), "tap0_kata"), Some((246, 1)));
        assert_eq!(number_in(message("macvtap", path).as_bytes(), "tap0"), None);
        assert_eq!(number_in(message("net", path).as_bytes(), "tap0_kata"), None);
        assert_eq!(number_in(b"\0\xff\0=\0MAJOR=x", "tap0_kata"), None);
    }

    /// As root; everybody else is refused.
    #[test]
    fn a_device_without_a_name_can_be_opened() {
        use std::io::Read as _;
        let mut zeroes = [1; 4];
        match open_device((1, 5)) {
            Ok(mut zero) => zero.read_exact(&mut zeroes).expect("read"),
            Err(error) => return eprintln!("skipped: {error}"),
        }
        assert_eq!(zeroes, [0; 4]);
    }
}
