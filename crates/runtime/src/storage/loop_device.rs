//! Loop devices of the host: a block device made of a file, for a file system that the host is to mount. It goes by itself
//! with the last who has it open, so nothing is left of it whenever we end.
#![allow(unsafe_code, reason = "the ioctls of loop(4)")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// linux/loop.h.
const GET_FREE: libc::Ioctl = 0x4c82;
const CONFIGURE: libc::Ioctl = 0x4c0a;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
/// Somebody else may take the free one before us, so often at most.
const TRIES: usize = 64;

/// `struct loop_config`, with the parts of `struct loop_info64` that are used.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    device: [u64; 5],
    numbers: [u32; 3],
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// A loop device; hold it until it is mounted.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Of a file; Linux 5.8.
    pub(crate) fn new(file: &Path, read_only: bool) -> io::Result<Self> {
        let backing = File::options().read(true).write(!read_only).open(file)?;
        let control = File::options().read(true).write(true).open("/dev/loop-control")?;
        for _ in 0..TRIES {
            // SAFETY: an open descriptor and a request without an argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let open = File::options().read(true).write(!read_only).open(&path)?;
            let config = Config {
                fd: backing.as_raw_fd() as u32,
                block_size: 0,
                device: [0; 5],
                numbers: [0; 3],
                flags: AUTOCLEAR | if read_only { READ_ONLY } else { 0 },
                names: [0; 160],
                init: [0; 2],
                reserved: [0; 8],
            };
            // SAFETY: an open descriptor and a pointer to a loop_config that lives through the call.
            if unsafe { libc::ioctl(open.as_raw_fd(), CONFIGURE, &raw const config) } == 0 {
                return Ok(Self { path, _open: open });
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(error);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Its node.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_layout() {
        // linux/loop.h: 4 + 4 + sizeof(struct loop_info64) 232 + 64
        assert_eq!(size_of::<Config>(), 304);
        assert_eq!(std::mem::offset_of!(Config, flags), 8 + 52);
        assert_eq!(std::mem::offset_of!(Config, names), 8 + 56);
        assert_eq!(std::mem::offset_of!(Config, init), 8 + 216);
    }
}
