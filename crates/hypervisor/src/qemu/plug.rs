//! Devices that come and go while the guest runs.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;

use super::disk::{self, Disks, Frontend};
use super::pci::{self, Bridge, Slot};
use super::pmem;
use super::qmp::{Departure, Qmp};
use super::{DiskDriver, QemuVm, device, fault};
use crate::{Device, Disk, Error, HotPlug, NetDevice, Rescan, Resize};

/// How long a guest may take to let go of a device; a healthy one takes milliseconds.
const LETTING_GO: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 10_000 });

#[async_trait]
impl HotPlug for QemuVm {
    async fn plug(&self, device: Device) -> Result<(), Error> {
        self.plug_device(device).await
    }

    async fn unplug(&self, id: &str) -> Result<(), Error> {
        self.unplug_device(id).await
    }

    fn is_fixed(&self, id: &str) -> bool {
        matches!(self.lock_disks().find(id), Some((_, Frontend::Memory(_))))
    }

    fn rescan(&self) -> Rescan {
        let bridge = if self.lock_bridge().is_missing() { None } else { Some(pci::BRIDGE) };
        Rescan { bridge, acpi_event: Some(pci::PLUGGED) }
    }
}

#[async_trait]
impl Resize for QemuVm {
    async fn disk(&self, id: &str, bytes: u64) -> Result<(), Error> {
        self.qmp.execute("block_resize", json!({"node-name": disk::node_name(id), "size": bytes})).await.map(drop)
    }
}

impl QemuVm {
    pub(super) fn lock_bridge(&self) -> MutexGuard<'_, Bridge> {
        self.bridge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_disks(&self) -> MutexGuard<'_, Disks> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn plug_device(&self, device: Device) -> Result<(), Error> {
        let _alone = self.plugging.lock().await;
        let device = match device {
            Device::Disk(disk) if self.disk_settings.driver == DiskDriver::Scsi => return self.plug_unit(disk).await,
            other => other,
        };
        let id = device.id().to_owned();
        let place = self.lock_bridge().take(&id).ok_or_else(|| Error::NoSlot {
            device: id.clone(),
            remedy: if matches!(device, Device::Disk(_)) { disk::MORE } else { "" },
        })?;
        let plugged = match device {
            Device::Net(card) => self.plug_card(card, place).await,
            Device::Disk(disk) => self.plug_disk(disk, Some(place)).await,
            Device::Host(host) => {
                self.qmp.execute("device_add", device::host(&id, &host.address, Some(place)).object()).await.map(drop)
            }
        };
        if plugged.is_err() {
            self.lock_bridge().free(&id);
        }
        plugged
    }

    async fn plug_card(&self, card: NetDevice, place: Slot) -> Result<(), Error> {
        let (id, count) = (card.id, card.queues.len());
        let mut given = Vec::new();
        let plugged = async {
            let queues = self.give(&id, "queue", card.queues, &mut given).await?;
            let vhost = self.give(&id, "vhost", card.vhost, &mut given).await?;
            self.qmp.execute("netdev_add", device::tap(&id, &queues, &vhost).object()).await?;
            // they are the network's now
            given.clear();
            let added = self.qmp.execute("device_add", device::card(&id, &card.mac, count, Some(place)).object()).await;
            if added.is_err() {
                self.close_backend(&id).await;
            }
            added.map(drop)
        }
        .await;
        for name in given {
            if let Err(error) = self.qmp.execute("closefd", json!({"fdname": name})).await {
                tracing::debug!(%error, name, "closing a descriptor in QEMU");
            }
        }
        plugged
    }

    /// Passes descriptors; `given` has the names of those that QEMU holds.
    async fn give(
        &self,
        id: &str,
        what: &str,
        fds: Vec<OwnedFd>,
        given: &mut Vec<String>,
    ) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        for (number, fd) in fds.into_iter().enumerate() {
            // not beginning with a digit, which would be read as a descriptor's number
            let name = format!("{id}-{what}{number}");
            self.qmp.give(&name, fd.as_fd()).await?;
            given.push(name.clone());
            names.push(name);
        }
        Ok(names)
    }

    /// A unit of the SCSI controller, which comes with the first of them.
    async fn plug_unit(&self, disk: Disk) -> Result<(), Error> {
        if !self.lock_disks().controller {
            let device = disk::CONTROLLER.to_owned();
            let place = self.lock_bridge().take(&device).ok_or(Error::NoSlot { device, remedy: "" })?;
            if let Err(error) = self.qmp.execute("device_add", disk::controller(Some(place)).object()).await {
                self.lock_bridge().free(disk::CONTROLLER);
                return Err(error);
            }
            self.lock_disks().controller = true;
        }
        self.plug_disk(disk, None).await
    }

    async fn plug_disk(&self, disk: Disk, place: Option<Slot>) -> Result<(), Error> {
        let settings = &self.disk_settings;
        let (set, frontend) = self.lock_disks().add(&disk, settings.driver)?;
        let plugged = async {
            if matches!(frontend, Frontend::Memory(_)) {
                pmem::lock(&disk)?;
            }
            let given = self.qmp.execute_with("add-fd", json!({"fdset-id": set}), Some(disk.file.as_fd())).await?;
            if matches!(frontend, Frontend::Memory(_)) {
                let fd = given["fd"].as_i64().ok_or_else(|| Error::Refused {
                    call: "add-fd".to_owned(),
                    answer: "the answer has no fd".to_owned(),
                })?;
                self.qmp.execute("object-add", pmem::backend(&disk, fd).object()).await?;
            } else {
                self.qmp.execute("blockdev-add", disk::node(&disk, set, settings)).await?;
            }
            let device = disk::device(&disk, frontend, place, settings, self.accelerator);
            self.qmp.execute("device_add", device.object()).await
        };
        let plugged = plugged.await.map(drop).map_err(|error| fault::of_disk(&disk.id, error));
        if plugged.is_err() {
            self.close_disk(&disk.id).await;
        }
        plugged
    }

    async fn close_disk(&self, id: &str) {
        close_disk(&self.qmp, &self.disks, id).await;
    }

    async fn close_backend(&self, id: &str) {
        // a device without one is no mistake
        if let Err(error) = self.qmp.execute("netdev_del", json!({"id": device::tap_name(id)})).await {
            tracing::debug!(%error, id, "closing the host's side of a device");
        }
    }

    async fn unplug_device(&self, id: &str) -> Result<(), Error> {
        let mut departure = self.qmp.departure(id)?;
        let asked = self.qmp.execute("device_del", json!({"id": id})).await;
        if self.lock_disks().find(id).is_none() {
            // whatever the guest does, nothing of the host is in its hands any longer
            self.close_backend(id).await;
        }
        let (bridge, name) = (Arc::clone(&self.bridge), id.to_owned());
        let (qmp, disks) = (Arc::clone(&self.qmp), Arc::clone(&self.disks));
        let tidy = async move {
            bridge.lock().unwrap_or_else(PoisonError::into_inner).free(&name);
            close_disk(&qmp, &disks, &name).await;
        };
        match asked {
            // the guest has let go of it before it was asked
            Err(Error::NoDevice { .. }) => {
                tidy.await;
                return Ok(());
            }
            asked => asked?,
        };
        // the place is free, and a disk's file closed, when the guest says so, even if nobody waits for it then
        let mut later = departure.clone();
        let gone = tokio::spawn(async move {
            later.wait_for(|seen| *seen == Departure::Gone).await.map_err(|_| Error::Gone)?;
            tidy.await;
            Ok(())
        });
        let call = || format!("device_del of {id}");
        let refused = departure.wait_for(|seen| *seen == Departure::Refused);
        tokio::select! {
            gone = gone => gone.unwrap_or(Err(Error::Gone)),
            Ok(_) = refused => {
                Err(Error::Refused { call: call(), answer: "the guest rejected the unplug request".into() })
            }
            () = tokio::time::sleep(LETTING_GO) => Err(Error::Timeout { call: call(), after: LETTING_GO }),
        }
    }
}

/// After the guest has let go of it; what is no disk has no such file.
async fn close_disk(qmp: &Qmp, disks: &Mutex<Disks>, id: &str) {
    let lock = || disks.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((set, frontend)) = lock().find(id) else { return };
    lock().remove(id);
    let of_qemu = match frontend {
        Frontend::Memory(_) => ("object-del", json!({"id": disk::node_name(id)})),
        Frontend::Pci | Frontend::Unit(_) => ("blockdev-del", json!({"node-name": disk::node_name(id)})),
    };
    for (command, arguments) in [of_qemu, ("remove-fd", json!({"fdset-id": set}))] {
        // of one that was not plugged to its end
        if let Err(error) = qmp.execute(command, arguments).await {
            tracing::debug!(%error, id, "closing a disk's file");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tokio::sync::mpsc;

    use super::super::launch::pair;
    use super::super::qmp::tests::monitor;
    use super::super::{Accelerator, Terminal};
    use super::*;
    use crate::Vm;
    use crate::helper::{Helper, Program};

    /// A VM whose monitor tells of every command and takes those that `guest` does not answer, and which has room for
    /// devices.
    async fn vm(guest: impl Fn(&Value) -> Vec<Value> + Send + 'static) -> (QemuVm, mpsc::UnboundedReceiver<Value>) {
        let (tell, told) = mpsc::unbounded_channel();
        let stream = monitor(move |command| {
            let _ = tell.send(command.clone());
            let answers = guest(command);
            let is_answered = answers.iter().any(|answer| answer.get("id").is_some());
            let done = json!({"return": {}, "id": command["id"]});
            [if is_answered { vec![] } else { vec![done] }, answers].concat()
        });
        let args = ["1000".to_owned()];
        let process =
            Helper::spawn(&Program::new("sleep", "path", std::path::Path::new("/bin/sleep"), &args)).expect("spawned");
        let (console, terminal) = Terminal::follow(pair().expect("a pair").0, false).expect("followed");
        let vm = QemuVm {
            process: Arc::new(process),
            qmp: Arc::new(Qmp::start(stream, Duration::from_secs(5)).await.expect("started")),
            console,
            terminal,
            channel: None,
            accelerator: Accelerator::Tcg,
            boot_files: Vec::new(),
            bridge: Arc::new(Mutex::new(Bridge::new())),
            disks: Arc::default(),
            disk_settings: disk::DiskSettings::default(),
            plugging: tokio::sync::Mutex::default(),
        };
        (vm, told)
    }

    async fn stop(vm: &QemuVm) {
        vm.qmp.execute("stop", json!({})).await.expect("stopped");
    }

    fn disk(id: &str) -> Device {
        let file = tempfile::tempfile().expect("a file").into();
        Device::Disk(Disk { id: id.into(), file, bytes: 1 << 20, read_only: false, shared: false })
    }

    /// Whether a command of this name came, of all so far.
    fn came(told: &mut mpsc::UnboundedReceiver<Value>, name: &str) -> bool {
        std::iter::from_fn(|| told.try_recv().ok()).any(|command| command["execute"] == name)
    }

    #[tokio::test]
    async fn what_the_guest_keeps_is_taken_until_it_lets_go() {
        // an answer to an unplugging comes with the next command only
        let late = |command: &Value| match command["execute"].as_str() {
            Some("stop") => vec![json!({"event": "DEVICE_DELETED", "data": {"device": "disk1"}})],
            _ => Vec::new(),
        };
        let (vm, mut told) = vm(late).await;
        vm.plug(disk("disk1")).await.expect("plugged");
        let place = vm.address("disk1").expect("a place");
        let error = vm.unplug("disk1").await.expect_err("nobody answers").to_string();
        assert!(error.contains("device_del of disk1"), "{error}");
        assert!(came(&mut told, "device_del") && !came(&mut told, "blockdev-del"));
        assert_eq!(vm.address("disk1").as_ref(), Some(&place), "its place is its own");
        assert!(vm.address("disk1").is_some());
        vm.plug(disk("disk2")).await.expect("plugged");
        assert_ne!(vm.address("disk2").as_ref(), Some(&place));

        stop(&vm).await;
        while let Some(command) = told.recv().await {
            if command["execute"] == "remove-fd" {
                break;
            }
        }
        assert_eq!((vm.address("disk1"), vm.address("disk1")), (None, None));
        vm.plug(disk("disk3")).await.expect("plugged");
        assert_eq!(vm.address("disk3"), Some(place), "and free afterwards");
    }

    /// Waits for a command.
    async fn comes(told: &mut mpsc::UnboundedReceiver<Value>, name: &str) {
        while told.recv().await.expect("the monitor lives")["execute"] != name {}
    }

    #[tokio::test]
    async fn what_the_guest_refuses_to_give_is_kept_until_it_gives_it() {
        let refuses = |command: &Value| match command["execute"].as_str() {
            Some("device_del") => vec![json!({"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": "disk1"}})],
            Some("stop") => vec![json!({"event": "DEVICE_DELETED", "data": {"device": "disk1"}})],
            _ => Vec::new(),
        };
        let (vm, mut told) = vm(refuses).await;
        vm.plug(disk("disk1")).await.expect("plugged");
        let error = vm.unplug("disk1").await.expect_err("refused").to_string();
        assert!(error.contains("rejected the unplug request"), "{error}");
        assert!(!came(&mut told, "blockdev-del") && vm.address("disk1").is_some());
        stop(&vm).await;
        comes(&mut told, "remove-fd").await;
        assert_eq!(vm.address("disk1"), None);
    }

    #[tokio::test]
    async fn a_guest_that_qemu_stops_by_itself_is_ended() {
        let (vm, _told) = vm(|command| match command["execute"].as_str() {
            Some("stop") => vec![json!({"event": "STOP"})],
            Some("cont") => vec![json!({"event": "STOP"}), json!({"event": "STOP"})],
            Some("query-status") => {
                // the second time it is nobody's wish
                static ASKED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
                let again = ASKED.swap(true, std::sync::atomic::Ordering::SeqCst);
                let status = if again { "internal-error" } else { "paused" };
                vec![json!({"return": {"status": status}, "id": command["id"]})]
            }
            _ => Vec::new(),
        })
        .await;
        super::super::halt::watch(&vm.qmp, &vm.process);
        stop(&vm).await;
        tokio::task::yield_now().await;
        let mut exit = vm.exit();
        assert!(exit.borrow().is_none());
        tokio::time::timeout(Duration::from_secs(5), async {
            while exit.borrow_and_update().is_none() {
                vm.qmp.execute("cont", json!({})).await.expect("stopped again");
                tokio::time::timeout(Duration::from_millis(100), exit.changed()).await.ok();
            }
        })
        .await
        .expect("ended");
    }

    #[tokio::test]
    async fn what_the_guest_gave_unasked_is_no_mistake() {
        let (vm, mut told) = vm(|command| match command["execute"].as_str() {
            Some("device_del") => {
                vec![json!({"error": {"class": "DeviceNotFound", "desc": "none"}, "id": command["id"]})]
            }
            _ => Vec::new(),
        })
        .await;
        vm.plug(disk("disk1")).await.expect("plugged");
        vm.unplug("disk1").await.expect("gone");
        comes(&mut told, "remove-fd").await;
        assert_eq!(vm.address("disk1"), None);
    }
}
