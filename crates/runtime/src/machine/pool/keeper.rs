//! The parent of one VM's processes, from before there is a pod until after it.
//!
//! While it waits it ends when its server does, and with it everything that it has made. Handed out, it reaps the two
//! processes and tells the shim how they ended; it cleans up when the shim is gone. A shim that ends its pod kills it, and
//! does the same by its journal.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use hypervisor::{VmExit, pidfd};

use super::make::{Made, make};
use super::wire::Wire;
use super::{Answer, Handed, Order, Part, Report, folder, key, no_hand_over};
use crate::Error;
use crate::cleanup::RunDir;
use crate::machine::Env;

/// Makes a VM of the kind `wanted` and keeps it to its end; `server` is the connection to the pool's server.
///
/// # Errors
/// The VM could not be made, or not cleaned up; the server was told.
pub async fn keep(env: &Env, wanted: &str, server: OwnedFd) -> Result<(), Error> {
    let server = Wire::new(server).map_err(Error::host("talking to the pool's server"))?;
    let folder = folder(std::process::id());
    let mut run = RunDir::create(&folder, Path::new("/")).map_err(Error::host(folder.display().to_string()))?;
    // large, and waited for once
    let kept = Box::pin(kept(env, wanted, &server, &mut run)).await;
    if let Err(error) = &kept {
        // it may be gone
        let _ = server.send(&Report::Failed(error.to_string()), &[]).await;
    }
    let cleaned = tokio::task::spawn_blocking(move || run.undo()).await;
    let cleaned = cleaned.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    kept.and(cleaned.map_err(Error::host(folder.display().to_string())))
}

async fn kept(env: &Env, wanted: &str, server: &Wire, run: &mut RunDir) -> Result<(), Error> {
    if key(env, None).await? != wanted {
        return Err(Error::WrongState(
            "the configuration or a file of the guest has changed since the pool was started: restart `kata-runtime factory init`"
                .into(),
        ));
    }
    let folder = run.path().to_owned();
    let made = tokio::select! {
        made = make(env, run) => made?,
        // it says nothing to one that is not ready
        _ = server.receive::<Order>() => return Ok(()),
    };
    // parted in two by now, of which both count for the pod
    let others = children(made.share.pid().unwrap_or_default());
    let ready = Report::Ready { vmm: made.vm.pid(), is_clone: made.is_clone };
    server.send(&ready, &[]).await.map_err(Error::host("talking to the pool's server"))?;
    let mut vmm = made.vm.exit();
    let pod = tokio::select! {
        order = server.receive::<Order>() => match order {
            Ok(Some((Order::Serve, mut fds))) => fds.pop(),
            _ => None,
        },
        exit = vmm.wait_for(Option::is_some) => return Err(ended(exit.ok().and_then(|exit| exit.clone()))),
        exit = made.share.ended() => return Err(ended(exit)),
    };
    let Some(pod) = pod else { return end(made).await };
    let pod = Wire::new(pod).map_err(Error::host("talking to the pod's shim"))?;
    let served = serve(env, &made, others, &pod, &folder).await;
    end(made).await?;
    served
}

fn ended(exit: Option<VmExit>) -> Error {
    let why = exit.map(|exit| exit.to_string()).unwrap_or_default();
    Error::WrongState(format!("a VM of the pool exited: {why}"))
}

/// By `/proc/<pid>/stat`, since not every kernel lists them elsewhere.
fn children(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // the name is in parentheses and may hold anything, so count from the last one
        let mut after = stat.rsplit_once(')').unwrap_or_default().1.split_ascii_whitespace();
        after.nth(1).and_then(|text| text.parse().ok()) == Some(parent)
    };
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

async fn end(made: Made) -> Result<(), Error> {
    made.vm.stop(Duration::ZERO).await?;
    made.share.stop().await;
    Ok(())
}

/// Hands the VM out, and returns when its pod needs it no more.
async fn serve(env: &Env, made: &Made, others: Vec<u32>, pod: &Wire, folder: &Path) -> Result<(), Error> {
    let failed = || Error::host("handing over a VM");
    let vmm = made.vm.pid();
    // one without is not made
    let daemon = made.share.pid().unwrap_or_default();
    let handing = made.vm.hand_over().ok_or_else(|| no_hand_over(env))?;
    let lent = handing.lend().await?;
    let processes = [pidfd::open(vmm).map_err(failed())?, pidfd::open(daemon).map_err(failed())?];
    let fds: Vec<_> = std::iter::once(&made.channel).chain(&processes).chain(&lent.fds).map(AsFd::as_fd).collect();
    let handed = Handed { folder: folder.to_owned(), vmm, daemon, others, about: lent.about };
    pod.send(&Answer::Handed(handed), &fds).await.map_err(failed())?;
    drop((processes, lent.fds));

    let report = |part: Part| async move {
        let exit = match part {
            Part::Vmm => made.vm.exit().wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone()),
            Part::Daemon => made.share.ended().await,
        };
        if let Some(exit) = exit {
            // one that is gone is seen below
            let _ = pod.send(&Answer::Ended { part, exit }, &[]).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        // it says nothing but its end
        _ = pod.receive::<Answer>() => {}
        () = report(Part::Vmm) => {}
        () = report(Part::Daemon) => {}
    }
    Ok(())
}
