//! The first words with a guest, and who waits for them.

use std::future::Future;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::wake;

use crate::Error;
use crate::agent_channel::AgentChannel;
use crate::agent_client::{AgentClient, VmWatch};
use crate::storage::share::Share;

/// What a guest does when the host first speaks to it.
#[derive(Debug)]
pub(super) enum Coming {
    /// It boots.
    Boots(AgentChannel),
    /// It goes on where it was stopped, and answers within `limit`.
    GoesOn { same_devices: bool, limit: Duration },
}

/// The agent, as soon as it can be called. `serial` is the VM's end of a serial channel.
pub(super) async fn answer(
    coming: Coming,
    serial: Option<OwnedFd>,
    watch: VmWatch,
    config: &config::Agent,
) -> Result<AgentClient, Error> {
    match coming {
        Coming::Boots(channel) => channel.connect(serial, watch, config).await,
        Coming::GoesOn { same_devices, limit } => {
            let agent = AgentChannel::resume(serial, watch, config)?;
            agent.wake(limit.min(config.dial_timeout), identity(same_devices)?).await?;
            Ok(agent)
        }
    }
}

/// What makes a clone another than all the others: random numbers of the host, and its time. `same_devices`: it has none
/// that the saved VM had not.
fn identity(same_devices: bool) -> Result<wake::UpRequest, Error> {
    let mut random = vec![0; 256];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(Error::host("/dev/urandom"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(wake::UpRequest {
        random,
        sec: now.as_secs() as i64,
        usec: i64::from(now.subsec_micros()),
        same_devices,
        ..Default::default()
    })
}

/// After virtiofsd, which ends when the VMM does, the VMM's own end is seen so much later at most.
const TOGETHER: Duration = Duration::from_millis(250);

/// Does `work` unless virtiofsd ends.
pub(crate) async fn while_served<T>(
    share: &Share,
    vm: VmWatch,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let end = tokio::select! {
        biased;
        done = work => return done,
        end = share.ended() => end,
    };
    // it ends in peace when the VMM does, and the VMM with an error when it was killed
    let limit = if end.as_ref().is_some_and(|end| end.is_success) { TOGETHER } else { Duration::ZERO };
    let reason = end.map(|end| end.to_string()).unwrap_or_default();
    vm.broken_within("starting the guest", &reason, limit).await
}
