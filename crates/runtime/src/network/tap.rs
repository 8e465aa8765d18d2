//! Tap devices: the VM's end of an interface (Documentation/networking/tuntap.rst of the kernel), and the kernel's own
//! way between one and the guest.
#![allow(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

const DEVICE: &str = "/dev/net/tun";
/// Where the kernel copies frames between a tap and a guest by itself.
pub(super) const VHOST: &str = "/dev/vhost-net";

/// Opens the tap `name` of the calling thread's namespace, once for each queue; it is made where there is none. One that
/// was made goes with its last descriptor, so a crash leaves nothing.
pub(super) fn open(name: &str, queues: u32) -> io::Result<Vec<OwnedFd>> {
    let queue = || {
        let file = File::options()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(|error| io::Error::new(error.kind(), format!("{DEVICE}: {error}: run `modprobe tun`")))?;
        attach(file, name, queues > 1)
    };
    (0..queues.max(1)).map(|_| queue()).collect()
}

/// Makes an open device a queue of the tap `name`; a macvtap's has its name already.
pub(super) fn attach(file: File, name: &str, of_several: bool) -> io::Result<OwnedFd> {
    // SAFETY: ifreq is plain data, all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // the last byte stays zero
    let room = request.ifr_name.len() - 1;
    if name.len() > room {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {name:?} is longer than {room} bytes"),
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

/// Opens the kernel's helper at `device` once for each queue, or not at all where the host has none.
pub(super) fn vhost(device: &Path, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let open = || File::options().read(true).write(true).open(device).map(OwnedFd::from);
    match (0..queues).map(|_| open()).collect() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|error| {
            let fix = "run `modprobe vhost_net`, or set disable_vhost_net = true";
            io::Error::new(error.kind(), format!("{}: {error}: {fix}", device.display()))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vhost_is_opened_for_each_queue_where_there_is_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let device = folder.path().join("vhost-net");
        assert_eq!(vhost(&device, 2).expect("none").len(), 0);
        std::fs::write(&device, "").expect("made");
        assert_eq!(vhost(&device, 2).expect("two").len(), 2);
        let error = vhost(folder.path(), 1).expect_err("a folder").to_string();
        assert!(error.contains("disable_vhost_net"), "{error}");
    }

    #[test]
    fn a_name_that_is_too_long_is_refused() {
        let file = tempfile::tempfile().expect("a file");
        let error = attach(file, "sixteen-letters-", false).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
