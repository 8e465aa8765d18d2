//! One start of each kind as a picture: target/timeline.svg. The shim and the agent log more in these starts, which a
//! figure of the table must not pay for; so they are none of those.

mod draw;
mod read;

use crate::{pool::Pool, warm};
use anyhow::{Context as _, Result};
use draw::Start;
use e2e::{Node, Runtime, ctr::Invocation, install::Install, pod_network::Pod, with_node};
use std::{
    path::Path,
    time::{Duration, SystemTime},
};

/// What a container does here: tells what its kernel has logged, with times.
const COMMAND: [&str; 1] = ["dmesg"];

/// Draws a boot, a clone and a machine of the pool, each with a network, into `to`.
pub(crate) fn measure(install: &Install, to: &Path) -> Result<()> {
    let templates = tempfile::Builder::new().prefix("kebench").tempdir_in("/dev/shm")?;
    with_node(|node| {
        let network = Pod::make(67, 1500)?;
        let config = |name: &str, template: bool, ready: i64| {
            let more = [
                ("factory", "enable_template", template.into()),
                ("factory", "vm_cache_number", ready.into()),
                // all that can be logged but the kernel's own lines on the console, which would take a third of the boot
                ("hypervisor.qemu", "kernel_params", "quiet printk.time=1".into()),
                ("agent.kata", "enable_debug", true.into()),
                ("runtime", "enable_debug", true.into()),
            ];
            warm::configuration(install, templates.path(), node, name, &more)
        };
        let cold = config("timeline-cold", false, 0)?;
        let clone = config("timeline-clone", true, 0)?;
        let pooled = config("timeline-pool", true, 1)?;
        let program = install.kata_runtime().display().to_string();
        Invocation::new(&program, ["--config", &clone, "factory", "init"]).output()?.ok()?;
        // what the first start of all pays for is nobody's
        node.run(Runtime::Kata, "first", &[], &["true"]).output()?.ok()?;
        let mut starts = vec![
            once(node, &network, "cold", &cold, "a boot")?,
            once(node, &network, "clone", &clone, "a clone of a template")?,
        ];
        let pool = Pool::start(node, &pooled)?;
        starts.push(once(node, &network, "pool", &pooled, "a machine of the pool")?);
        pool.end()?;
        std::fs::write(to, draw::draw(&starts)).with_context(|| to.display().to_string())?;
        eprintln!("    one start of each kind, drawn: {}", to.canonicalize()?.display());
        Ok(())
    })
}

/// One start, from ctr's begin to its end.
fn once(node: &Node, network: &Pod, id: &str, config: &str, kind: &str) -> Result<Start> {
    let [flag, namespace] = network.options();
    let options = ["--runtime-config-path", config, &flag, &namespace];
    let before = node.log.len();
    let from = SystemTime::now();
    let done = node.run(Runtime::Kata, id, &options, &COMMAND).output()?.ok()?;
    let to = SystemTime::now();
    let is_last = |line: &str| line.contains("topic=/containers/delete ");
    node.log.wait_from(before, Duration::from_secs(5), is_last).context("containerd does not tell of the end")?;
    let spans = read::spans(&node.log.lines_from(before), &done.text(), from, to);
    Ok(Start { title: format!("ctr run --rm … dmesg with a network: {kind}"), spans })
}
