//! A driver whose VMs are a sleeping process each, with a scripted agent in them.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use hypervisor::{
    Address, Boot, Capabilities, Channel, ChannelKind, ChannelNames, Console, Device, DeviceKind, Error, HotPlug,
    Hypervisor, Rescan, Vm, VmExit, VmSpec,
};
use tokio::sync::watch;

use super::agent::FakeAgent;

/// What the driver refuses once, each by its name: `launch`, `plug`, `unplug` or `stop`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Refusals(Arc<Mutex<Vec<&'static str>>>);

impl Refusals {
    /// The next of these calls fails.
    pub(crate) fn refuse(&self, call: &'static str) {
        lock(&self.0).push(call);
    }

    fn take(&self, call: &'static str) -> Result<(), Error> {
        let mut all = lock(&self.0);
        match all.iter().position(|one| *one == call) {
            Some(place) => {
                all.remove(place);
                Err(Error::Refused { call: call.into(), answer: "refused".into() })
            }
            None => Ok(()),
        }
    }
}

/// The driver. Clones are the same.
#[derive(Clone)]
pub(crate) struct FakeDriver {
    pub(crate) agent: FakeAgent,
    pub(crate) refusals: Refusals,
    /// VMs whose process has not ended.
    alive: Arc<AtomicUsize>,
    /// The last one's end is told here.
    exit: Arc<Mutex<Option<watch::Sender<Option<VmExit>>>>>,
}

impl FakeDriver {
    pub(crate) fn new() -> Self {
        Self { agent: FakeAgent::new(), refusals: Refusals::default(), alive: Arc::default(), exit: Arc::default() }
    }

    /// How many VMs there are.
    pub(crate) fn alive(&self) -> usize {
        self.alive.load(Ordering::Relaxed)
    }

    /// The VM falls over.
    pub(crate) fn fall(&self) {
        let exit = VmExit { reason: "it fell over".into(), is_success: false, stderr: String::new(), fault: None };
        if let Some(tell) = lock(&self.exit).as_ref() {
            tell.send_replace(Some(exit));
        }
    }
}

const CAPABILITIES: Capabilities = Capabilities {
    channels: &[ChannelKind::Serial],
    sharing: &[],
    devices: &[DeviceKind::Disk],
    hotplug: &[DeviceKind::Disk],
    snapshots: None,
    hand_over: false,
};

#[async_trait]
impl Hypervisor for FakeDriver {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn capabilities(&self) -> &Capabilities {
        &CAPABILITIES
    }

    fn open_channel(&self, _: ChannelKind, names: ChannelNames<'_>) -> Result<Channel, Error> {
        Ok(Channel::Serial { port: names.serial_port })
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error> {
        self.refusals.take("launch")?;
        let child = Command::new("sleep").arg("1000").spawn().map_err(|source| Error::Spawn {
            what: "a fake VM",
            binary: "sleep".into(),
            key: "path",
            source,
        })?;
        self.alive.fetch_add(1, Ordering::Relaxed);
        let (tell, exit) = watch::channel(None);
        *lock(&self.exit) = Some(tell);
        Ok(Box::new(FakeVm {
            driver: self.clone(),
            channel: Some(self.agent.serve()),
            pid: child.id(),
            child: Mutex::new(Some(child)),
            exit,
            console: Console::default(),
            disks: Mutex::new(spec.devices.iter().map(|device| device.id().to_owned()).collect()),
        }))
    }

    async fn overhead_mib(&self, _: &Boot) -> Result<u64, Error> {
        Ok(0)
    }

    async fn fingerprint(&self, _: &VmSpec) -> Result<String, Error> {
        Ok("fake".into())
    }
}

struct FakeVm {
    driver: FakeDriver,
    channel: Option<OwnedFd>,
    pid: u32,
    child: Mutex<Option<Child>>,
    exit: watch::Receiver<Option<VmExit>>,
    console: Console,
    disks: Mutex<HashSet<String>>,
}

impl FakeVm {
    fn kill(&self) {
        if let Some(mut child) = lock(&self.child).take() {
            let _ = child.kill();
            child.wait().expect("a child of ours");
            self.driver.alive.fetch_sub(1, Ordering::Relaxed);
            if let Some(tell) = lock(&self.driver.exit).as_ref() {
                let reason = "it was killed".into();
                tell.send_replace(Some(VmExit { reason, is_success: false, stderr: String::new(), fault: None }));
            }
        }
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.kill();
    }
}

#[async_trait]
impl Vm for FakeVm {
    fn take_channel(&mut self) -> Option<OwnedFd> {
        self.channel.take()
    }

    fn pid(&self) -> u32 {
        self.pid
    }

    async fn vcpu_threads(&self) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    fn exit(&self) -> watch::Receiver<Option<VmExit>> {
        self.exit.clone()
    }

    fn console(&self) -> &Console {
        &self.console
    }

    fn address(&self, id: &str) -> Option<Address> {
        lock(&self.disks).contains(id).then(|| Address::Pci("02/01".into()))
    }

    async fn stop(&self, _: Duration) -> Result<(), Error> {
        self.driver.refusals.take("stop")?;
        self.kill();
        Ok(())
    }

    fn hotplug(&self) -> Option<&dyn HotPlug> {
        Some(self)
    }
}

#[async_trait]
impl HotPlug for FakeVm {
    async fn plug(&self, device: Device) -> Result<(), Error> {
        self.driver.refusals.take("plug")?;
        lock(&self.disks).insert(device.id().to_owned());
        Ok(())
    }

    async fn unplug(&self, id: &str) -> Result<(), Error> {
        self.driver.refusals.take("unplug")?;
        lock(&self.disks).remove(id);
        Ok(())
    }

    fn is_fixed(&self, _: &str) -> bool {
        false
    }

    fn rescan(&self) -> Rescan {
        Rescan::default()
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
