//! A driver for tests whose VMs are a process that sleeps and a guest that does what the test says.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::ports;
use async_trait::async_trait;
use hypervisor::helper::{Helper, Program};
use hypervisor::{
    Address, Begin, Boot, Capabilities, Channel, ChannelKind, ChannelNames, Console, DeviceKind, Error, Hypervisor, Vm,
    VmExit, VmSpec,
};
use tokio::sync::watch;

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guest {
    /// Its agent says that it is up.
    Boots,
    /// Nothing.
    Silent,
    /// Its VMM ends.
    Dies,
}

/// A driver, and what was asked of it.
#[derive(Debug, Clone)]
pub(crate) struct Fake {
    pub(crate) capabilities: Capabilities,
    guests: Arc<Mutex<VecDeque<Guest>>>,
    /// For each VM that was started: it was a clone.
    pub(crate) launched: Arc<Mutex<Vec<bool>>>,
}

impl Fake {
    /// The guests of its VMs, in their order.
    pub(crate) fn new(guests: impl IntoIterator<Item = Guest>) -> Self {
        Self {
            capabilities: Capabilities {
                channels: &[ChannelKind::Serial],
                sharing: &[],
                devices: &[DeviceKind::Net],
                hotplug: &[],
                snapshots: Some(ChannelKind::Serial),
                hand_over: false,
            },
            guests: Arc::new(Mutex::new(guests.into_iter().collect())),
            launched: Arc::default(),
        }
    }

    /// For a template.
    pub(crate) const FINGERPRINT: &str = "0123456789abcdef0123456789abcdef";
}

#[async_trait]
impl Hypervisor for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn open_channel(&self, kind: ChannelKind, names: ChannelNames<'_>) -> Result<Channel, Error> {
        assert_eq!(kind, ChannelKind::Serial);
        Ok(Channel::Serial { port: names.serial_port })
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error> {
        let guest = self.guests.lock().expect("whole").pop_front().expect("no more machines");
        self.launched.lock().expect("whole").push(matches!(spec.begin, Begin::Clone(_)));
        let (ours, mut theirs) = UnixStream::pair().map_err(Error::system("a pair"))?;
        if guest == Guest::Boots {
            std::io::Write::write_all(&mut theirs, ports::SERIAL_HELLO).map_err(Error::system("the hello"))?;
        }
        let args = [if guest == Guest::Dies { "0" } else { "1000" }.to_owned()];
        let process = Helper::spawn(&Program::new("fake", "path", Path::new("/bin/sleep"), &args))?;
        Ok(Box::new(FakeVm { process, channel: Some(ours.into()), console: Console::default(), _guest: theirs }))
    }

    async fn overhead_mib(&self, _boot: &Boot) -> Result<u64, Error> {
        Ok(0)
    }

    async fn fingerprint(&self, _spec: &VmSpec) -> Result<String, Error> {
        Ok(Self::FINGERPRINT.into())
    }
}

struct FakeVm {
    process: Helper,
    channel: Option<OwnedFd>,
    console: Console,
    _guest: UnixStream,
}

#[async_trait]
impl Vm for FakeVm {
    fn take_channel(&mut self) -> Option<OwnedFd> {
        self.channel.take()
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    async fn vcpu_threads(&self) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    fn exit(&self) -> watch::Receiver<Option<VmExit>> {
        self.process.exit()
    }

    fn console(&self) -> &Console {
        &self.console
    }

    fn address(&self, _id: &str) -> Option<Address> {
        None
    }

    async fn stop(&self, grace: Duration) -> Result<(), Error> {
        self.process.stop(grace).await;
        Ok(())
    }
}
