//! The host kernel's vsock for a guest (vsock(7)): an address that is the guest's alone, for VMMs that take the open device.
#![allow(unsafe_code, reason = "VHOST_VSOCK_SET_GUEST_CID has no safe wrapper")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use crate::{Channel, Error};

/// The host's half of the device.
const DEVICE: &str = "/dev/vhost-vsock";
/// The first address that is nobody's by definition; the last number is `VMADDR_CID_ANY`.
const FIRST_CID: u32 = 3;
/// Addresses tried before the host counts as full. There are four thousand million.
const DRAWS: usize = 64;

nix::ioctl_write_ptr!(
    /// linux/vhost.h: gives the device's guest its address, or says that it is somebody's.
    set_guest_cid, 0xAF, 0x60, u64
);

/// Opens the device and takes a free address, which is one guest's alone for as long as its VMM holds the device.
pub(crate) fn claim() -> Result<Channel, Error> {
    let vhost = File::options().read(true).write(true).open(DEVICE).map_err(Error::system(DEVICE))?;
    let mut random = File::open("/dev/urandom").map_err(Error::system("/dev/urandom"))?;
    let cid = free_cid(
        || {
            let mut bytes = [0; 4];
            random.read_exact(&mut bytes).map(|()| u32::from_ne_bytes(bytes))
        },
        |cid| {
            let cid = u64::from(cid);
            // SAFETY: an open vhost-vsock device and a pointer to a number that lives through the call.
            unsafe { set_guest_cid(vhost.as_raw_fd(), &raw const cid) }.map(drop)
        },
    )
    .map_err(Error::system("/dev/vhost-vsock: an address for the guest"))?;
    Ok(Channel::Vsock { vhost: OwnedFd::from(vhost), cid })
}

/// Draws addresses until one is nobody's.
fn free_cid(
    mut draw: impl FnMut() -> io::Result<u32>,
    mut take: impl FnMut(u32) -> nix::Result<()>,
) -> io::Result<u32> {
    for _ in 0..DRAWS {
        let cid = FIRST_CID + draw()? % (u32::MAX - FIRST_CID);
        match take(cid) {
            Ok(()) => return Ok(cid),
            Err(Errno::EADDRINUSE) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Errno::EADDRINUSE.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_drawn_until_one_is_free() {
        let mut numbers = [0, u32::MAX, 7, 8].into_iter();
        let mut asked = Vec::new();
        let cid = free_cid(
            || Ok(numbers.next().expect("no more are drawn")),
            |cid| {
                asked.push(cid);
                if cid == 10 { Ok(()) } else { Err(Errno::EADDRINUSE) }
            },
        );
        assert_eq!(cid.expect("one is free"), 10);
        // neither a reserved address nor VMADDR_CID_ANY
        assert_eq!(asked, [3, 3 + u32::MAX % (u32::MAX - 3), 10]);
        let full = free_cid(|| Ok(5), |_| Err(Errno::EADDRINUSE)).expect_err("all are taken");
        assert_eq!(full.raw_os_error(), Some(Errno::EADDRINUSE as i32));
        let broken = free_cid(|| Ok(5), |_| Err(Errno::ENOTTY)).expect_err("no such device");
        assert_eq!(broken.raw_os_error(), Some(Errno::ENOTTY as i32));
    }
}
