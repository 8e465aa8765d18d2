//! Frames are copied by the host's kernel where it can (`/dev/vhost-net`) and may.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Node, NodeSetup,
    install::Install,
    pod_network::{Pod, seen_in},
    processes, with_node_setup,
};
use std::{path::Path, time::Duration};

const DEVICE: &str = "/dev/vhost-net";

fn with_vhost_disabled(disabled: bool, test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let config = Install::locate()?.config_with(&[("disable_vhost_net", disabled.into())])?;
    with_node_setup(NodeSetup { config: Some(config), ..NodeSetup::default() }, test)
}

/// How many cards of the pod's VM the kernel serves: each has a descriptor of the device.
fn served(node: &Node) -> Result<usize> {
    let qemu = processes::wait_for(node.tag(), "qemu-system", Duration::from_secs(5))?;
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", qemu.pid))?.flatten();
    Ok(descriptors.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new(DEVICE))).count())
}

fn two_cards(node: &Node, network: u8) -> Result<(usize, usize)> {
    let pod = Pod::make(network, 1500)?;
    pod.start(node, "pod")?;
    let first = served(node)?;
    seen_in(node, "pod", "ip -4 -o addr show dev net1 2>/dev/null | grep -q 10.88", || {
        pod.add_second_veth("net1", 1500)?;
        pod.ip(&format!("addr add 10.88.{network}.2/24 dev net1"))?;
        pod.ip("link set net1 up").map(drop)
    })?;
    let both = served(node)?;
    for gateway in [format!("10.89.{network}.1"), format!("10.88.{network}.1")] {
        let ping = node.exec("pod", "ping", &[], &["ping", "-c", "2", "-W", "3", &gateway]).output()?.ok();
        ping.with_context(|| format!("no answer from {gateway}"))?;
    }
    node.remove("pod")?;
    Ok((first, both))
}

#[test]
fn the_kernel_copies_where_it_can() -> Result<()> {
    let expected = if Path::new(DEVICE).exists() { (1, 2) } else { (0, 0) };
    with_vhost_disabled(false, |node| {
        let served = two_cards(node, 61)?;
        ensure!(served == expected, "{served:?} instead of {expected:?}");
        Ok(())
    })
}

#[test]
fn and_not_where_it_may_not() -> Result<()> {
    with_vhost_disabled(true, |node| {
        let served = two_cards(node, 62)?;
        ensure!(served == (0, 0), "{served:?}");
        Ok(())
    })
}
