//! Tap devices: the VM's end of an interface (Documentation/networking/tuntap.rst of the kernel).
#![allow(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

const DEVICE: &str = "/dev/net/tun";

/// Opens the tap `name` of the calling thread's namespace, once for each queue; it is made where there is none. One that
/// was made goes with its last descriptor, so a crash leaves nothing.
pub(super) fn open(name: &str, queues: u32) -> io::Result<Vec<OwnedFd>> {
    (0..queues.max(1)).map(|_| queue(name, queues > 1)).collect()
}

fn queue(name: &str, of_several: bool) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open(DEVICE).map_err(|error| {
        io::Error::new(error.kind(), format!("{DEVICE}: {error} (load the kernel module: modprobe tun)"))
    })?;
    // SAFETY: ifreq is plain data, all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // the last byte stays zero
    let room = request.ifr_name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {name:?} is not 1 to {room} bytes"),
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // the header says which checksums and segments the other side may leave to us
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if of_several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a valid descriptor and a pointer to an ifreq that lives through the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}
