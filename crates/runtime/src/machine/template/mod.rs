//! Templates: VMs that were saved as soon as their agent answered, of which the VM of a pod can be a clone.
//!
//! One is good for every VM that is booted from the same files, with the same parameters and of the same size
//! ([`hypervisor::Hypervisor::fingerprint`]); nothing of a pod is in it.

mod make;
mod store;
mod zeros;

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use hypervisor::{Begin, ChannelKind, CloneMemory, Size, VmSpec};

pub use self::make::make;
pub use self::store::{Info, Store, Taken};
use crate::Error;
use crate::machine::Env;

/// What makes one beside a pod.
const MAKER: &str = "kata-runtime";

/// A clone's beginning, and how to be rid of what it came from if that proves bad.
pub(crate) struct Found {
    pub(crate) begin: Begin,
    pub(crate) memory: CloneMemory,
    store: Store,
    key: String,
}

impl Found {
    /// The saved VM does not come to life: nobody shall try it again.
    pub(crate) fn discard(self, why: &Error) {
        tracing::warn!(error = %why, template = self.key, "the template is damaged: removing it and booting a VM instead");
        self.store.discard(&self.key);
    }
}

/// The driver saves VMs that have a serial channel: clones are spoken to over one.
fn can_save(env: &Env) -> bool {
    env.hypervisor.capabilities().snapshots == Some(ChannelKind::Serial)
}

/// The template for a VM like `spec`, if there is one that can be used; if there is none, one is made for the next.
pub(crate) async fn find(env: &Env, spec: &VmSpec, mode: CloneMemory) -> Result<Option<Found>, Error> {
    if !can_save(env) {
        let driver = env.hypervisor.name();
        tracing::warn!("enable_template = true is set, but hypervisor {driver} cannot save VMs: booting a VM instead");
        return Ok(None);
    }
    let store = Store::new(&env.config.factory.template_path);
    let key = env.hypervisor.fingerprint(spec).await?;
    match store.open(&key, spec.size.memory_mib) {
        Ok(Some((memory, state))) => {
            let begin = Begin::Clone(hypervisor::Snapshot { memory, state, mode });
            return Ok(Some(Found { begin, memory: mode, store, key }));
        }
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, template = key, "cannot use the template: removing it and booting a VM instead");
            store.discard(&key);
        }
    }
    if env.config.factory.make_template_on_demand {
        make_beside(env, spec.size);
    }
    Ok(None)
}

/// Says why a template was not made.
fn hear(maker: Child) {
    match maker.wait_with_output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            let why = words.lines().last().unwrap_or_default();
            tracing::warn!(status = %output.status, why, "no template was made: the next pod boots a VM, too");
        }
        Err(error) => tracing::warn!(%error, "cannot learn whether a template was made"),
    }
}

/// Has one made by a process of its own: this one may end before it is done.
fn make_beside(env: &Env, size: Size) {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(MAKER)));
    let program = beside.filter(|path| path.is_file()).unwrap_or_else(|| MAKER.into());
    let started = Command::new(&program)
        .arg("--config")
        .arg(&env.config.source)
        .args(["factory", "init"])
        .args(["--vcpus", &size.vcpus.to_string(), "--memory", &size.memory_mib.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // a signal to our group is not for it
        .process_group(0)
        .spawn();
    match started {
        // init takes it over when we end, and nobody hears of it then
        Ok(child) => drop(std::thread::spawn(move || hear(child))),
        Err(error) => tracing::warn!(
            program = %program.display(), %error,
            "cannot make a template: install kata-runtime beside the shim, or run `kata-runtime factory init`"
        ),
    }
}

/// A template for tests, with nothing in it.
#[cfg(test)]
pub(super) fn put(folder: &std::path::Path, key: &str, size: Size) {
    let draft = Store::new(folder).draft(key, size.memory_mib).expect("a place").expect("nobody else");
    std::io::Write::write_all(&mut draft.file("state").expect("a file"), b"state").expect("written");
    draft.publish(size.vcpus, size.memory_mib, "nothing".into()).expect("published");
}
