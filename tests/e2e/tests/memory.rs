//! What of the host's memory a pod has, and gives back.

use anyhow::{Context as _, Result, ensure};
use e2e::{Node, NodeSetup, Runtime, install::Install, processes, with_node_setup};
use std::time::{Duration, Instant};

/// What the machine of the node's only pod holds, MiB.
fn held(node: &Node) -> Result<u64> {
    let machine = processes::wait_for(node.tag(), "qemu-system", Duration::from_secs(5))?;
    Ok(machine.pss_kib()? >> 10)
}

#[test]
fn what_the_guest_has_freed_goes_back() -> Result<()> {
    let config = Install::locate()?.config_with(&[("reclaim_guest_freed_memory", true.into())])?;
    with_node_setup(NodeSetup { config: Some(config), ..NodeSetup::default() }, |node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let before = held(node)?;
        // tail keeps all of a line
        let eater = "head -c 300m /dev/zero | { tail | wc -c; echo full > /dev/null; }";
        let run = node.exec("c1", "eat", &[], &["sh", "-c", eater]).spawn()?;
        let mut most = before;
        let done = loop {
            most = most.max(held(node)?);
            if most > before + 280 {
                break run;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        done.finish()?.ok()?;
        most = most.max(held(node)?);
        let freed = Instant::now();
        let wanted = most - (most - before) * 8 / 10;
        let mut now = most;
        while freed.elapsed() < Duration::from_secs(30) && now > wanted {
            std::thread::sleep(Duration::from_millis(200));
            now = held(node)?;
        }
        eprintln!("before {before}, at most {most}, {now} MiB {:?} after the end", freed.elapsed());
        ensure!(now <= wanted, "of {} MiB the host has {} back after 30 s", most - before, most - now);
        node.remove("c1").context("removing it")
    })
}
