//! A VM that goes from the process that started it to another.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::accelerator::Accelerator;
use super::disk::Disks;
use super::pci::Bridge;
use super::qmp::Qmp;
use super::{QemuSettings, QemuVm, Terminal, halt, stream};
use crate::helper::Helper;
use crate::{Error, Lent};

/// What the next owner has to know.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    is_kvm: bool,
    is_logged: bool,
    bridge: Bridge,
    /// How much of its disks can be memory.
    room: u64,
}

impl QemuVm {
    pub(super) async fn lend_sockets(&self) -> Result<Lent, Error> {
        let failed = || Error::system("lending a virtual machine");
        self.terminal.reader.abort();
        let fds = vec![self.qmp.lend().await.map_err(failed())?, self.terminal.end.try_clone().map_err(failed())?];
        let bridge = std::mem::take(&mut *self.lock_bridge());
        let is_kvm = self.accelerator == Accelerator::Kvm;
        let room = self.lock_disks().room;
        let about = About { is_kvm, is_logged: self.terminal.is_logged, bridge, room };
        let about = serde_json::to_string(&about).map_err(|error| failed()(std::io::Error::other(error)))?;
        Ok(Lent { about, fds })
    }
}

/// Goes on with what was lent.
pub(super) async fn adopt(
    settings: &QemuSettings,
    lent: Lent,
    process: Helper,
    channel: OwnedFd,
) -> Result<QemuVm, Error> {
    let failed = || Error::system("taking a virtual machine over");
    let wrong = |what: &str| failed()(std::io::Error::other(what.to_owned()));
    let About { is_kvm, is_logged, bridge, room } =
        serde_json::from_str(&lent.about).map_err(|_| wrong("it is described in other words"))?;
    let [monitor, console] = <[OwnedFd; 2]>::try_from(lent.fds).map_err(|_| wrong("it needs two sockets"))?;
    let (console, terminal) = Terminal::follow(console, is_logged)?;
    // it has been greeted before, and refuses that now, which is as good
    let qmp = Qmp::start(stream(monitor).map_err(failed())?, settings.command_deadline).await?;
    let (process, qmp) = (Arc::new(process), Arc::new(qmp));
    halt::watch(&qmp, &process);
    Ok(QemuVm {
        process,
        qmp,
        console,
        terminal,
        channel: Some(channel),
        accelerator: if is_kvm { Accelerator::Kvm } else { Accelerator::Tcg },
        boot_files: Vec::new(),
        // it has got none yet
        disks: Arc::new(Mutex::new(Disks::with_room(room))),
        disk_settings: settings.disks.clone(),
        bridge: Arc::new(Mutex::new(bridge)),
        plugging: tokio::sync::Mutex::default(),
    })
}
