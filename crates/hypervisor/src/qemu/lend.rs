//! A VM that goes from the process that started it to another.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::accelerator::Accelerator;
use super::disk::Disks;
use super::pci::Bridge;
use super::qmp::Qmp;
use super::{Qemu, QemuVm, Terminal, halt, stream};
use crate::helper::Helper;
use crate::{Adoption, Error, HandOver, Lent, LentProcess, Vm};

/// What the next owner has to know.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    is_kvm: bool,
    is_logged: bool,
    bridge: Bridge,
    /// How much of its disks can be memory.
    room: u64,
}

#[async_trait]
impl HandOver for QemuVm {
    async fn lend(&self) -> Result<Lent, Error> {
        let failed = || Error::system("handing over a VM");
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

#[async_trait]
impl Adoption for Qemu {
    async fn adopt(&self, lent: Lent, process: LentProcess, channel: OwnedFd) -> Result<Box<dyn Vm>, Error> {
        let failed = || Error::system("taking over a VM");
        let wrong = |what: &str| failed()(std::io::Error::other(what.to_owned()));
        let About { is_kvm, is_logged, bridge, room } =
            serde_json::from_str(&lent.about).map_err(|_| wrong("its description is of another version"))?;
        let [monitor, console] =
            <[OwnedFd; 2]>::try_from(lent.fds).map_err(|_| wrong("it must come with two sockets"))?;
        let (console, terminal) = Terminal::follow(console, is_logged)?;
        // it has been greeted before, and refuses that now, which is as good
        let qmp = Qmp::start(stream(monitor).map_err(failed())?, self.settings.command_deadline).await?;
        let LentProcess { pid, process, exit } = process;
        let process = Helper::adopt("QEMU", pid, process, exit).map_err(failed())?;
        let (process, qmp) = (Arc::new(process), Arc::new(qmp));
        halt::watch(&qmp, &process);
        Ok(Box::new(QemuVm {
            process,
            qmp,
            console,
            terminal,
            channel: Some(channel),
            accelerator: if is_kvm { Accelerator::Kvm } else { Accelerator::Tcg },
            boot_files: Vec::new(),
            // it has got none yet
            disks: Arc::new(Mutex::new(Disks::with_room(room))),
            disk_settings: self.settings.disks.clone(),
            bridge: Arc::new(Mutex::new(bridge)),
            plugging: tokio::sync::Mutex::default(),
        }))
    }
}
