//! A machine of a test's own: network and mounts in namespaces that nobody else is in. Clients that change the host's
//! network, or that are made to by a mistake of the product's, change this one, and what they leave in it is theirs.
//! Processes, cgroups and files outside `FRESH` are the machine's.

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use std::{fs, path::Path};

use crate::pod_network::ip;

/// The address of the world's `eth0`, by which it is reached from inside.
pub const ADDRESS: &str = "198.51.100.2";

/// Where clients and daemons have files whose place cannot be chosen.
const FRESH: [&str; 5] = ["/run", "/var/log", "/var/lib/cni", "/var/lib/kubelet", "/etc/cni"];

/// What the product has found out about the machine: seconds each time, and the same in here.
const FOUND_OUT: [&str; 3] = ["kvm-probe", "tsc-khz", "virtiofsd"];

/// Runs `work` there.
pub fn in_a_world<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // a thread can have namespaces of its own, and they are those of the processes that it starts
    std::thread::scope(|scope| scope.spawn(|| enter().context("a world of its own").and_then(|()| work())).join())
        .map_err(|_| anyhow!("the test panicked"))?
}

fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("namespaces")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("/")?;
    links_in_sys()?;
    let kept = tempfile::tempdir()?;
    let product = Path::new("/run/kata-containers");
    for name in FOUND_OUT.iter().filter(|name| product.join(name).exists()) {
        copy(&product.join(name), &kept.path().join(name))?;
    }
    for folder in FRESH {
        fs::create_dir_all(folder).with_context(|| folder.to_owned())?;
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context(folder)?;
    }
    fs::create_dir_all("/run/lock")?;
    copy(kept.path(), product)?;
    // as systemd has it on most machines
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).context("/")?;
    for line in [
        "link set lo up".to_owned(),
        "link add eth0 type veth peer name uplink".to_owned(),
        format!("addr add {ADDRESS}/24 dev eth0"),
        "link set uplink up".to_owned(),
        "link set eth0 up".to_owned(),
        "route add default via 198.51.100.1".to_owned(),
    ] {
        ip(&line)?;
    }
    Ok(())
}

/// A sysfs shows the links of the network namespace in which it was mounted. The cgroups go with the old one.
fn links_in_sys() -> Result<()> {
    let (none, cgroups) = (None::<&str>, "/sys/fs/cgroup");
    let aside = tempfile::tempdir()?;
    mount(Some(cgroups), aside.path(), none, MsFlags::MS_BIND | MsFlags::MS_REC, none).context(cgroups)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("/sys")?;
    mount(Some(aside.path()), cgroups, none, MsFlags::MS_MOVE, none).context(cgroups)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let done = std::process::Command::new("cp").arg("-aT").args([from, to]).status()?;
    ensure!(done.success(), "{} cannot be copied", from.display());
    Ok(())
}
