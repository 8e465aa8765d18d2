//! The shim's side: a VM of the pool becomes a pod's.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use hypervisor::helper::Helper;
use hypervisor::{Lent, LentProcess, Size, Vm};
use tokio::sync::oneshot;

use super::wire::Wire;
use super::{ANSWER, Answer, Ask, Handed, Part, key, mount_namespace, no_hand_over};
use crate::Error;
use crate::cleanup::{Journal, RunDir, Step};
use crate::machine::Env;
use crate::storage::share::Share;

/// A VM that was the pool's. Its guest has the folder mounted, and is to be woken before anything of the pod gets there.
pub(crate) struct Taken {
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) share: Share,
    /// Processes that count with its two.
    pub(crate) others: Vec<u32>,
    /// What is left of it when it is not wanted.
    pub(crate) remains: Remains,
}

/// Everything of a VM that was the pool's, in the journal.
pub(crate) struct Remains {
    step: Step,
    journal: Journal,
}

impl Remains {
    /// It is not wanted, for what it has shown; nothing of it is left then. Its VM and folder are dropped.
    pub(crate) async fn give_up(self, why: &Error) {
        tracing::warn!(error = %why, "cannot use the VM from the pool: the pod starts without the pool");
        let Self { step, journal } = self;
        let gone = tokio::task::spawn_blocking(move || journal.take_back(&step)).await;
        if let Err(error) = gone.unwrap_or_else(|error| Err(io::Error::other(error))) {
            tracing::warn!(%error, "cannot stop the VM from the pool");
        }
    }
}

/// One of this size; `None` when there is none, and then the log says why.
pub(crate) async fn take(env: &Env, size: Size, run: &mut RunDir) -> Option<Taken> {
    let endpoint = &env.config.factory.vm_cache_endpoint;
    match tokio::time::timeout(ANSWER, ask(env, size, endpoint, run)).await {
        Ok(Ok(Ok(taken))) => Some(taken),
        Ok(Ok(Err(why))) => {
            tracing::info!(why, "no machine from the pool");
            None
        }
        Ok(Err(error)) => {
            tracing::warn!(%error, "no machine from the pool: is `kata-runtime factory init` running?");
            None
        }
        Err(_) => {
            tracing::warn!(endpoint = %endpoint.display(), "no machine from the pool: no answer within {ANSWER:?}");
            None
        }
    }
}

/// A VM, or the pool's word for why there is none.
async fn ask(env: &Env, size: Size, endpoint: &Path, run: &mut RunDir) -> Result<Result<Taken, String>, Error> {
    let failed = || Error::host(format!("connecting to the pool at {}", endpoint.display()));
    let wire = Wire::connect(endpoint).map_err(failed())?;
    let mounts = mount_namespace().map_err(failed())?;
    wire.send(&Ask::Take { key: key(env, Some(size)).await?, mounts }, &[]).await.map_err(failed())?;
    match wire.receive().await.map_err(failed())? {
        Some((Answer::Handed(handed), fds)) => adopt(env, handed, fds, wire, run).await.map(Ok),
        Some((Answer::None(why), _)) => Ok(Err(why)),
        Some(_) => Err(failed()(io::Error::other("unexpected answer"))),
        None => Err(failed()(io::Error::other("it closed the connection without an answer"))),
    }
}

async fn adopt(env: &Env, handed: Handed, fds: Vec<OwnedFd>, wire: Wire, run: &mut RunDir) -> Result<Taken, Error> {
    let Handed { folder, vmm, daemon, others, about } = handed;
    // from here on it is this pod's, however the pod ends
    let (step, journal) = (Step::Keeper(folder.clone()), run.journal());
    run.push(step.clone()).map_err(Error::host("writing the undo journal"))?;
    let failed = || Error::host("taking over a VM from the pool");
    let mut fds = fds.into_iter();
    let (Some(channel), Some(vmm_process), Some(daemon_process)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(failed()(io::Error::other("it came without channel or process")));
    };
    let ((vmm_to, vmm_told), (daemon_to, daemon_told)) = (oneshot::channel(), oneshot::channel());
    let listening = tokio::spawn(listen(wire, vmm_to, daemon_to));
    let adopted = async {
        let adoption = env.hypervisor.adoption().ok_or_else(|| no_hand_over(env))?;
        let process = LentProcess { pid: vmm, process: vmm_process, exit: vmm_told };
        let daemon = Helper::adopt("virtiofsd", daemon, daemon_process, daemon_told).map_err(failed())?;
        let vm = adoption.adopt(Lent { about, fds: fds.collect() }, process, channel).await?;
        Ok::<_, Error>((vm, daemon))
    };
    match adopted.await {
        Ok((vm, daemon)) => {
            let share = Share::adopt(&folder, daemon);
            Ok(Taken { vm, share, others, remains: Remains { step, journal } })
        }
        Err(error) => {
            // the keeper ends with its connection; what it may leave goes now, not with the pod
            listening.abort();
            let gone = tokio::task::spawn_blocking(move || journal.take_back(&step)).await;
            if let Ok(Err(left)) = gone {
                tracing::warn!(error = %left, "cannot return a VM to the pool");
            }
            Err(error)
        }
    }
}

/// Holds the connection for as long as the shim lives, and passes on what the keeper tells.
async fn listen(wire: Wire, vmm: oneshot::Sender<hypervisor::VmExit>, daemon: oneshot::Sender<hypervisor::VmExit>) {
    let (mut vmm, mut daemon) = (Some(vmm), Some(daemon));
    while let Ok(Some((answer, _))) = wire.receive().await {
        if let Answer::Ended { part, exit } = answer {
            let to = match part {
                Part::Vmm => vmm.take(),
                Part::Daemon => daemon.take(),
            };
            // killed by us: nobody asks why
            let _ = to.map(|to| to.send(exit));
        }
    }
}
