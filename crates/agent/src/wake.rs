//! The last moment of a guest that is saved, and the first of one that goes on there.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::ttrpc;
use agent_api::ttrpc::r#async::TtrpcContext;
use agent_api::wake::{DownRequest, UpRequest};
use agent_api::wake_ttrpc::Wake;
use async_trait::async_trait;
use nix::time::{ClockId, clock_gettime};

use crate::error::Error;
use crate::guest;

/// Less would leave it guessable, bytes; more than the other makes nothing better.
const RANDOM: std::ops::RangeInclusive<usize> = 32..=4096;
/// Nobody waits longer for a guest to settle.
const OLDEST: Duration = Duration::from_secs(60);
/// The event by which q35 tells of plugged devices (QEMU's docs/specs/acpi_pci_hotplug). A clone's first devices are looked
/// for at a known moment; to find them again in the kernel's way, by its ACPI interpreter, would take longer than all else.
const PLUGGED: &str = "/sys/firmware/acpi/interrupts/gpe01";
/// The bus behind the bridge where a clone's devices come; the root bus has the others.
const BEHIND: &str = "/sys/bus/pci/devices/0000:00:1e.0/pci_bus";
const ALL: &str = "/sys/bus/pci/rescan";

/// What a clone needs at once, opened before it is saved: to find files takes more than to write them.
struct Files {
    random: File,
    rescan: File,
    /// A kernel without ACPI has no such events.
    event: Option<File>,
}

impl Files {
    fn open() -> io::Result<Self> {
        let behind = fs::read_dir(BEHIND).ok().and_then(|mut buses| buses.next()?.ok());
        let rescan = behind.map_or_else(|| ALL.into(), |bus| bus.path().join("rescan"));
        let write = |path: &Path| File::options().write(true).open(path);
        let event = match write(Path::new(PLUGGED)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            event => Some(event?),
        };
        Ok(Self { random: guest::random_device()?, rescan: write(&rescan)?, event })
    }

    /// Returns when the drivers have the devices that are new.
    fn find_devices(&mut self) -> io::Result<()> {
        self.rescan.write_all(b"1")
    }

    fn event(&mut self, action: &str) -> io::Result<()> {
        // the kernel wants the whole line
        self.event.as_mut().map_or(Ok(()), |event| event.write_all(format!("{action}\n").as_bytes()))
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
        let mut files = Files::open().map_err(Error::failed("what a clone needs"))?;
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
        let files = files.as_mut().ok_or_else(|| Error::State("cannot wake what was not saved".into()))?;
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
