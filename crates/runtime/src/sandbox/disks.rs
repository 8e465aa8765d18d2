//! Disks of containers that come and go while the pod runs.

use std::sync::Arc;

use hypervisor::Vm;
use oci_spec::runtime::Spec;
use tokio::task::JoinSet;

use super::Sandbox;
use crate::host_work::Progress;
use crate::pod::Role;
use crate::storage::block::{Blocks, Plan};
use crate::storage::disks::{Disks, Known};
use crate::{ContainerSpec, Error};

/// What a container needs; a pod's sandbox has no files. `in_guest`: its root file system may be mounted there.
pub(super) fn wanted(from: &ContainerSpec, oci: &Spec, in_guest: bool, progress: &Progress) -> Result<Blocks, Error> {
    if Role::of_spec(oci)? == Role::Sandbox {
        return Ok(Blocks::default());
    }
    Blocks::of(from, oci, in_guest, progress)
}

impl Sandbox {
    /// Plugs what the VM has not yet, and says what the guest is to do with it.
    pub(super) async fn plug(&self, from: &ContainerSpec, blocks: Blocks) -> Result<Plan, Error> {
        if blocks.sources.is_empty() {
            return Ok(Plan::default());
        }
        let vm = self.vm().await?;
        let mut disks = self.0.disks.lock().await;
        disks.let_go(|id| vm.address(id).is_some());
        let (ids, devices) = disks.assign(&blocks.sources)?;
        let placed = blocks.placed(ids.clone());
        let plugged = async {
            for device in devices {
                let plugged = async { vm.must_hotplug()?.plug(device).await }.await;
                plugged.map_err(|error| placed.unplugged(error))?;
            }
            placed.plan(vm.as_ref(), from.id.as_str())
        }
        .await;
        if plugged.is_err() {
            give_back(&vm, &mut disks, &ids).await;
        }
        plugged
    }

    /// Takes away what nobody uses any more. Goes on past errors: with the VM everything goes.
    pub(super) async fn unplug(&self, ids: &[String]) {
        if ids.is_empty() {
            return;
        }
        let Ok(vm) = self.vm().await else { return };
        let mut disks = self.0.disks.lock().await;
        give_back(&vm, &mut disks, ids).await;
    }

    pub(super) async fn vm(&self) -> Result<Arc<dyn Vm>, Error> {
        let host = self.0.host.lock().await;
        let host = host.as_ref().ok_or_else(|| Error::WrongState("the sandbox is stopped".into()))?;
        Ok(Arc::clone(&host.vm))
    }
}

/// What nobody uses any more leaves the VM, if it can.
async fn give_back(vm: &Arc<dyn Vm>, disks: &mut Disks, ids: &[String]) {
    let (stay, leave): (Vec<_>, Vec<_>) = disks.release(ids).into_iter().partition(|disk| vm.is_fixed(&disk.id));
    disks.rest(stay);
    disks.keep(unplug(vm, leave).await);
}

/// All at once: a guest that does not let go of one is waited for, and no longer for several. Returns what it keeps; of that
/// the place stays taken and the file open in the VMM, which ends with the pod at the latest.
async fn unplug(vm: &Arc<dyn Vm>, gone: Vec<Known>) -> Vec<Known> {
    let mut leaving = JoinSet::new();
    for disk in gone.into_iter().filter(|disk| vm.address(&disk.id).is_some()) {
        let vm = Arc::clone(vm);
        leaving.spawn(async move {
            let error = async { vm.must_hotplug()?.unplug(&disk.id).await }.await.err()?;
            tracing::warn!(
                disk = disk.id,
                file = %disk.path.display(),
                %error,
                "the guest keeps a disk that no container has any more: its file stays open until the pod ends"
            );
            Some(disk)
        });
    }
    leaving.join_all().await.into_iter().flatten().collect()
}
