//! Making a template: boot, wait for the agent, save, end.

use std::time::Duration;

use hypervisor::{Begin, HotPlug, Size, VmSpec};

use super::store::Store;
use crate::Error;
use crate::agent_channel::AgentChannel;
use crate::agent_client::VmWatch;
use crate::machine::guest::{Coming, answer};
use crate::machine::{Env, plain_spec};
use crate::storage::share::Share;

/// How long a template has run when it is saved: what the kernel does every second or two has begun by then, and the threads that
/// it wants for that are there, not made in every clone again (370 of its translated blocks).
const SETTLED: Duration = Duration::from_secs(3);

/// The driver cannot make one.
fn no_snapshots(env: &Env) -> Error {
    let driver = env.hypervisor.name();
    Error::Unsupported(format!(
        "enable_template = true is set, but hypervisor {driver} cannot save VMs: set it to false"
    ))
}

/// Makes the template of this configuration for VMs of this size (or of the configured one). `false` when it is there, or
/// another process makes it.
///
/// # Errors
/// The VM did not come up or could not be saved. Nothing is left.
pub async fn make(env: &Env, size: Option<Size>) -> Result<bool, Error> {
    if !super::can_save(env) {
        return Err(no_snapshots(env));
    }
    let spec = plain_spec(env, size, Share::of_template(env.hypervisor.as_ref(), &env.config.hypervisor));
    let store = Store::new(&env.config.factory.template_path);
    let key = env.hypervisor.fingerprint(&spec).await?;
    let Some(draft) = store.draft(&key, spec.size.memory_mib)? else { return Ok(false) };
    let (size, boots) = (spec.size, format!("{} {}", spec.boot.kernel.display(), spec.boot.root.path().display()));

    let memory = draft.file("memory")?.into();
    let mut vm = env.hypervisor.launch(VmSpec { begin: Begin::Template { memory }, ..spec }).await?;
    let watch = VmWatch::new(vm.as_ref());
    let serial = vm.take_channel();
    let agent = answer(Coming::Boots(AgentChannel::Serial), serial, watch, &env.config.agent).await?;
    let snapshots = vm.snapshots().ok_or_else(|| no_snapshots(env))?;
    // it says that it is there before it has done all that it does at a start
    agent.lull(SETTLED, vm.hotplug().map(HotPlug::rescan).unwrap_or_default()).await?;
    snapshots.save(draft.file("state")?.into()).await?;
    vm.stop(Duration::ZERO).await?;
    draft.publish(size.vcpus, size.memory_mib, boots)?;
    Ok(true)
}
