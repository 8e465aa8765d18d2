//! Clock, random numbers, processors and memory of the guest's kernel.
#![allow(unsafe_code, reason = "settimeofday and the random device's ioctls")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

/// `RNDADDTOENTCNT` and `RNDRESEEDCRNG` of random(4).
const RNDADDTOENTCNT: libc::c_ulong = 0x4004_5201;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

pub(crate) fn set_clock(seconds: i64, microseconds: i64) -> io::Result<()> {
    let time = libc::timeval { tv_sec: seconds, tv_usec: microseconds };
    // SAFETY: a valid timeval, no time zone.
    if unsafe { libc::settimeofday(&raw const time, std::ptr::null()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// For [`reseed`].
pub(crate) fn random_device() -> io::Result<File> {
    File::options().write(true).open("/dev/random")
}

/// Mixes `data` in by /dev/random, counts it as entropy, and makes the kernel draw a new key from it.
pub(crate) fn reseed(device: &mut File, data: &[u8]) -> io::Result<()> {
    use std::io::Write;
    device.write_all(data)?;
    let bits = libc::c_int::try_from(data.len() * 8).unwrap_or(4096);
    // SAFETY: an open random device and a pointer to an int that lives through the call.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDTOENTCNT as _, &raw const bits) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Brings plugged processors into use until `wanted` are (0: all), and plugged memory unless `cpu_only`.
pub(crate) fn online(wanted: u32, cpu_only: bool) -> io::Result<()> {
    const CPUS: &str = "/sys/devices/system/cpu";
    const MEMORY: &str = "/sys/devices/system/memory";
    let numbered = |dir: &str, prefix: &str| -> io::Result<Vec<std::path::PathBuf>> {
        let mut found: Vec<_> = fs::read_dir(dir)?
            .flatten()
            .filter(|entry| {
                let name = entry.file_name();
                let number = name.to_str().and_then(|name| name.strip_prefix(prefix)).unwrap_or_default();
                !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
            })
            .map(|entry| entry.path())
            .collect();
        found.sort();
        Ok(found)
    };
    let mut count = 0;
    for cpu in numbered(CPUS, "cpu")? {
        let switch = cpu.join("online");
        // the first one cannot be switched and has no file
        let on = fs::read_to_string(&switch).map_or(true, |text| text.trim() == "1");
        if !on && (wanted == 0 || count < wanted) {
            fs::write(&switch, "1")?;
        }
        if on || wanted == 0 || count < wanted {
            count += 1;
        }
    }
    if count < wanted {
        return Err(io::Error::other(format!("{wanted} processors should be online, the guest has {count}")));
    }
    if !cpu_only {
        for block in numbered(MEMORY, "memory").unwrap_or_default() {
            let switch = block.join("state");
            if fs::read_to_string(&switch).is_ok_and(|text| text.trim() == "offline") {
                fs::write(switch, "online")?;
            }
        }
    }
    Ok(())
}

/// Bytes of a memory block, and whether memory can be probed by address.
pub(crate) fn memory_blocks() -> (u64, bool) {
    let size = fs::read_to_string("/sys/devices/system/memory/block_size_bytes").unwrap_or_default();
    let probe = std::path::Path::new("/sys/devices/system/memory/probe").exists();
    (u64::from_str_radix(size.trim(), 16).unwrap_or_default(), probe)
}
