//! Finds a disk by where it is, and waits for one that is being plugged.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use tokio::io::unix::AsyncFd;

use crate::error::Error;
use crate::io::{drain, watch};
use crate::pci::{self, Slots};

/// How a disk is known.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    Pci(Slots),
    Scsi { id: u16, lun: u16 },
}

/// A disk that can be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) major: u64,
    pub(crate) minor: u64,
}

impl Disk {
    /// For what the host has open for reading only. A disk says so by itself; persistent memory does not, and what is written
    /// there would be gone without a word.
    pub(crate) fn forbid_writing(&self) -> Result<(), Error> {
        match self.path.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with("pmem")) {
            Some(name) => {
                let region = format!("/sys/block/{name}/device/../read_only");
                fs::write(&region, "1").map_err(Error::failed(region))
            }
            None => Ok(()),
        }
    }
}

impl Known {
    /// By Kata's names of drivers.
    fn new(driver: &str, address: &str) -> Result<Self, Error> {
        match driver {
            "blk" => Slots::parse(address).map(Self::Pci),
            "scsi" => {
                let unit = address.split_once(':').and_then(|(id, lun)| Some((id.parse().ok()?, lun.parse().ok()?)));
                let (id, lun) = unit.ok_or_else(|| {
                    Error::Invalid(format!("invalid SCSI address {address:.80?}: must be ID:LUN, such as 0:1"))
                })?;
                Ok(Self::Scsi { id, lun })
            }
            other => Err(Error::Unsupported(format!("the disk driver {other:.80?}"))),
        }
    }

    fn find(&self) -> Option<Disk> {
        let name = match self {
            Self::Pci(slots) => slots.find(Path::new(pci::ROOT), "block")?,
            Self::Scsi { id, lun } => {
                let end = format!(":0:{id}:{lun}");
                let unit = pci::entry(Path::new("/sys/bus/scsi/devices"), |name| name.ends_with(&end))?;
                pci::entry(&unit.join("block"), |_| true)?.file_name()?.to_owned()
            }
        };
        let path = Path::new("/dev").join(name);
        // its name may be there before it can be used, which its event tells
        let meta = File::open(&path).ok()?.metadata().ok().filter(|meta| meta.file_type().is_block_device())?;
        Some(Disk { path, major: libc::major(meta.rdev()).into(), minor: libc::minor(meta.rdev()).into() })
    }

    /// A unit that came before its controller was known is not told by itself.
    fn look(&self) {
        if let Self::Scsi { id, lun } = self {
            for host in fs::read_dir("/sys/class/scsi_host").into_iter().flatten().flatten() {
                let _ = fs::write(host.path().join("scan"), format!("0 {id} {lun}"));
            }
        }
    }
}

/// The disk there, as soon as the kernel has it.
pub(crate) async fn find(driver: &str, address: &str, patience: Duration) -> Result<Disk, Error> {
    let known = Known::new(driver, address)?;
    if let Some(disk) = known.find() {
        return Ok(disk);
    }
    wait(patience, || known.find(), || known.look())
        .await?
        .ok_or_else(|| Error::NotFound(format!("block device {address} (after waiting for {patience:?})")))
}

/// Waits until `find` finds something about a device; `look` does what makes it come. `None` when it does not come.
pub(crate) async fn wait<T>(
    patience: Duration,
    find: impl Fn() -> Option<T>,
    look: impl Fn(),
) -> Result<Option<T>, Error> {
    // first listen, then look: nothing can come in between
    let events = device_events().map_err(Error::failed("device events"))?;
    let found = async {
        loop {
            look();
            if let Some(found) = find() {
                return Ok(found);
            }
            let mut ready = events.readable().await.map_err(Error::failed("device events"))?;
            let _ = ready.try_io(|events| drain(events.get_ref()));
        }
    };
    tokio::time::timeout(patience, found).await.ok().transpose()
}

/// Tells of devices that come and go, when they can be used.
fn device_events() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkKObjectUEvent)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    watch(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_as_katas() {
        assert_eq!(Known::new("scsi", "0:12"), Ok(Known::Scsi { id: 0, lun: 12 }));
        Known::new("blk", "02/02").expect("a path");
        for (driver, address) in [("scsi", "0"), ("scsi", "0:x"), ("scsi", "0:70000"), ("blk", "/dev/vda"), ("x", "1")]
        {
            Known::new(driver, address).expect_err(address);
        }
    }

    #[tokio::test]
    async fn what_does_not_come_is_told() {
        let limit = Duration::from_millis(1);
        let error = find("blk", "02/1f", limit).await.expect_err("nothing is there").to_string();
        assert!(error.contains("02/1f") && error.contains("1ms"), "{error}");
    }
}
