//! The last moment of a guest that is saved, and the first of one that goes on there.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::ttrpc;
use agent_api::ttrpc::r#async::TtrpcContext;
use agent_api::wake::{DownRequest, Rescan, UpRequest};
use agent_api::wake_ttrpc::Wake;
use async_trait::async_trait;
use nix::time::{ClockId, clock_gettime};

use crate::error::Error;
use crate::guest;
use crate::pci::{self, Slots};

/// Less would leave it guessable, bytes; more than the other makes nothing better.
const RANDOM: std::ops::RangeInclusive<usize> = 32..=4096;
/// Nobody waits longer for a guest to settle.
const OLDEST: Duration = Duration::from_secs(60);
/// Where the kernel shows how often each event of ACPI came, and takes words that hold one back.
const EVENTS: &str = "/sys/firmware/acpi/interrupts";
/// Looks for devices everywhere.
const ALL: &str = "/sys/bus/pci/rescan";

/// What a clone needs at once, opened before it is saved: to find files takes more than to write them.
struct Files {
    random: File,
    /// A guest may have no such bus.
    rescan: Option<File>,
    /// A kernel without ACPI has no such events.
    event: Option<File>,
}

impl Files {
    fn open(rescan: &Rescan) -> Result<Self, Error> {
        let failed = Error::failed("what a clone needs");
        let (devices, event) = (rescan_file(Path::new(pci::ROOT), rescan)?, event_file(rescan)?);
        let open = || -> io::Result<Self> {
            Ok(Self {
                random: guest::random_device()?,
                rescan: write_if_there(&devices)?,
                event: event.as_deref().map_or(Ok(None), write_if_there)?,
            })
        };
        open().map_err(failed)
    }

    /// Returns when the drivers have the devices that are new.
    fn find_devices(&mut self) -> io::Result<()> {
        self.rescan.as_mut().map_or(Ok(()), |rescan| rescan.write_all(b"1"))
    }

    fn event(&mut self, action: &str) -> io::Result<()> {
        // the kernel wants the whole line
        self.event.as_mut().map_or(Ok(()), |event| event.write_all(format!("{action}\n").as_bytes()))
    }
}

/// Where the guest is made to look for new devices: behind the bridge that the host names, or everywhere.
fn rescan_file(root: &Path, rescan: &Rescan) -> Result<PathBuf, Error> {
    if rescan.bridge.is_empty() {
        return Ok(ALL.into());
    }
    let bridge = Slots::parse(&rescan.bridge)?.device(root);
    let behind = bridge.and_then(|bridge| pci::entry(&bridge.join("pci_bus"), |_| true));
    Ok(behind.map_or_else(|| ALL.into(), |bus| bus.join("rescan")))
}

/// The event that the host names.
fn event_file(rescan: &Rescan) -> Result<Option<PathBuf>, Error> {
    let name = rescan.acpi_event.as_str();
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(Error::Invalid(format!("{name:.40?} is no name of an ACPI event")));
    }
    Ok((!name.is_empty()).then(|| Path::new(EVENTS).join(name)))
}

fn write_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::options().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

#[derive(Default)]
pub(crate) struct Waking(Mutex<Option<Files>>);

#[async_trait]
impl Wake for Waking {
    async fn down(&self, _: &TtrpcContext, request: DownRequest) -> ttrpc::Result<Empty> {
        let wanted = Duration::from_millis(request.age_ms.into());
        if wanted > OLDEST {
            return Err(Error::Invalid(format!("an age of {wanted:?}: must be {OLDEST:?} or less")).into());
        }
        let age = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(Error::failed("time since the boot"))?;
        tokio::time::sleep(wanted.saturating_sub(age.into())).await;
        let mut files = Files::open(&request.rescan)?;
        files.event("mask").map_err(Error::failed("holding back the events of devices"))?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(files);
        Ok(Empty::new())
    }

    async fn up(&self, _: &TtrpcContext, request: UpRequest) -> ttrpc::Result<Empty> {
        let count = request.random.len();
        if !RANDOM.contains(&count) {
            return Err(Error::Invalid(format!("{count} random bytes: must be 32 to 4096")).into());
        }
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let files = files
            .as_mut()
            .ok_or_else(|| Error::State("cannot resume a guest that was not prepared for a snapshot".into()))?;
        // before all else: every clone has the same numbers until then
        guest::reseed(&mut files.random, &request.random).map_err(Error::failed("new random numbers"))?;
        guest::set_clock(request.sec, request.usec).map_err(Error::failed("setting the clock"))?;
        if !request.same_devices {
            files.find_devices().map_err(Error::failed("looking for devices"))?;
        }
        // what it told of has been found
        match files.event("clear") {
            // there was none
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
        .and_then(|()| files.event("unmask"))
        .map_err(Error::failed("letting events of devices through"))?;
        crate::log::debug("awake");
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rescan(bridge: &str, acpi_event: &str) -> Rescan {
        Rescan { bridge: bridge.into(), acpi_event: acpi_event.into(), ..Default::default() }
    }

    #[test]
    fn new_devices_are_looked_for_where_the_host_says() {
        let root = tempfile::tempdir().expect("a folder");
        let bus = root.path().join("0000:00:02.0/pci_bus/0000:01");
        std::fs::create_dir_all(&bus).expect("made");
        let of = |bridge| rescan_file(root.path(), &rescan(bridge, ""));
        assert_eq!(of("02").expect("there"), bus.join("rescan"));
        // no bridge is named, or none is there
        for bridge in ["", "03"] {
            assert_eq!(of(bridge).expect("everywhere"), Path::new(ALL));
        }
        of("../..").expect_err("no path of a device");
    }

    #[test]
    fn an_event_is_a_name() {
        let of = |name| event_file(&rescan("", name));
        assert_eq!(of("gpe07").expect("a name"), Some(Path::new(EVENTS).join("gpe07")));
        assert_eq!(of("").expect("none"), None);
        of("../../x").expect_err("a path");
    }
}
