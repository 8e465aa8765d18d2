//! The pod's memory on the host: what the VM must fit into, and whether the host's kernel had to kill it.

use std::fmt;
use std::sync::Arc;

use crate::Error;
use crate::cgroup::HostCgroup;
use crate::machine::{Env, plain_spec};
use crate::sizing::Room;

/// What the helpers of a VM take beside it, MiB: virtiofsd, with the pages of files that it is about to write.
const HELPERS_MIB: u64 = 16;

/// What the host lets the pod have.
pub(super) struct HostMemory {
    cgroup: Option<Arc<HostCgroup>>,
    /// There is a limit.
    pub(super) room: Option<Room>,
    /// Of a folder that was there before the pod.
    kills_before: u64,
}

impl HostMemory {
    pub(super) async fn of(env: &Env, cgroup: Option<Arc<HostCgroup>>) -> Result<Self, Error> {
        let room = match cgroup.as_ref().and_then(|cgroup| cgroup.memory_limit()) {
            Some(limit) => {
                let boot = plain_spec(env, None, Vec::new()).boot;
                Some(Room { limit, vmm_mib: env.hypervisor.overhead_mib(&boot).await? + HELPERS_MIB })
            }
            None => None,
        };
        let kills_before = cgroup.as_ref().map_or(0, |cgroup| cgroup.memory_kills());
        Ok(Self { cgroup, room, kills_before })
    }

    /// Whether the host's kernel has killed a process of the pod's for want of memory. The VM does not outlive one.
    pub(super) fn is_killed(&self) -> bool {
        self.cgroup.as_ref().is_some_and(|cgroup| cgroup.memory_kills() > self.kills_before)
    }

    /// The reason, for a start that failed by it.
    pub(super) fn explain(&self, error: Error) -> Error {
        match error {
            Error::VmGone { what, reason, console, fault } if self.is_killed() => Error::VmGone {
                what,
                reason: format!("{reason}; the host's OOM killer killed it: {self}"),
                console,
                fault,
            },
            other => other,
        }
    }
}

impl fmt::Display for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.room {
            Some(room) => f.write_str(&room.remedy()),
            None => f.write_str("a memory limit above the pod's cgroup was reached"),
        }
    }
}
