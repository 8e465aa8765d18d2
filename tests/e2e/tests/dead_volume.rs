//! A volume whose file system never answers costs its own container, and nothing and nobody else: not the pod's other
//! containers, not its end, not the host.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Node, NodeSetup, Runtime, ctr::Running, dead_fs::DeadFs, image, install::Install, mounts, processes,
    with_node_setup,
};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// For what shall be answered at once, on a machine that is busy with other things.
const PROMPT: Duration = Duration::from_secs(10);

const SANDBOX: [&str; 4] = ["--annotation", "io.kubernetes.cri.container-type=sandbox", "--annotation", OF_POD];
const MEMBER: [&str; 4] = ["--annotation", "io.kubernetes.cri.container-type=container", "--annotation", OF_POD];
const OF_POD: &str = "io.kubernetes.cri.sandbox-id=pod";

/// A node whose containers must be made within so many seconds.
fn with_limit(seconds: i64, test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let config = Install::locate()?.config_table_with("runtime", &[("create_container_timeout", seconds.into())])?;
    with_node_setup(NodeSetup { config: Some(config), ..NodeSetup::default() }, test)
}

fn dead(node: &Node) -> Result<(DeadFs, PathBuf)> {
    let point = node.dir().join("dead");
    Ok((DeadFs::mount(&point)?, point))
}

/// `ctr run -d` of a container that has the dead folder as a volume.
fn run_with(node: &Node, id: &str, options: &[&str], dead: &std::path::Path) -> Result<Running> {
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", dead.display());
    let run = ["run", "-d", "--runtime", Runtime::Kata.name(), "--mount", &mount];
    node.ctr([&run[..], options, &[image::NAME, id, "sleep", "1000"]].concat()).spawn()
}

/// Says how long it took, which must be short.
fn promptly<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let outcome = work().with_context(|| what.to_owned())?;
    println!("{what}: {:?}", began.elapsed());
    ensure!(began.elapsed() < PROMPT, "{what} took {:?}", began.elapsed());
    Ok(outcome)
}

fn kill(node: &Node, id: &str) -> Result<()> {
    node.ctr(["task", "kill", "-s", "KILL", id]).output()?.ok().map(drop)
}

/// Failed for the volume, which is named.
fn named(run: Running) -> Result<()> {
    let outcome = run.finish()?;
    println!("{:?}: {}", outcome.took, outcome.stderr);
    ensure!(outcome.code != 0, "a container with a dead volume was made");
    ensure!(outcome.stderr.contains("/dead of the mount on /data"), "{}", outcome.stderr);
    Ok(())
}

/// Waits until no mount is left that goes with this container.
fn nothing_mounted_for(id: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let table = String::from_utf8_lossy(&mounts::table()).into_owned();
        let of_it = |line: &&str| line.contains("/run/kata-containers/") && line.contains(&format!("/{id}"));
        let Some(left) = table.lines().find(of_it) else { return Ok(()) };
        ensure!(began.elapsed() < PROMPT, "left: {left}");
        // mounts have no event
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_pods_other_containers_do_not_notice() -> Result<()> {
    with_limit(20, |node| {
        let (dead, folder) = dead(node)?;
        node.detached(Runtime::Kata, "pod", &SANDBOX, &["sleep", "1000"])?;
        node.detached(Runtime::Kata, "one", &MEMBER, &["sleep", "1000"])?;
        let two = run_with(node, "two", &MEMBER, &folder)?;
        dead.wait_for_a_victim()?;
        promptly("State of all", || {
            let status = node.status("one")?;
            ensure!(status.as_deref() == Some("RUNNING"), "{status:?}");
            Ok(())
        })?;
        promptly("exec in another container", || {
            let said = node.exec("one", "x", &[], &["echo", "alive"]).output()?.ok()?.text();
            ensure!(said == "alive", "{said}");
            Ok(())
        })?;
        promptly("statistics of another container", || node.ctr(["task", "metrics", "one"]).output()?.ok())?;
        promptly("another container", || node.detached(Runtime::Kata, "three", &MEMBER, &["sleep", "1000"]))?;
        promptly("Kill of another container", || kill(node, "three"))?;
        promptly("delete -f of another container", || node.remove("one"))?;
        named(two)?;
        dead.revive();
        nothing_mounted_for("two")?;
        // the same name, and the volume as it should be
        node.ctr(["container", "rm", "two"]).output()?.ok()?;
        run_with(node, "two", &MEMBER, &folder)?.finish()?.ok()?;
        for id in ["two", "three", "pod"] {
            node.remove(id)?;
        }
        Ok(())
    })
}

#[test]
fn a_pods_first_container_fails_by_its_name() -> Result<()> {
    with_limit(8, |node| {
        let (dead, folder) = dead(node)?;
        let run = run_with(node, "alone", &[], &folder)?;
        dead.wait_for_a_victim()?;
        promptly("State of all", || node.status("alone"))?;
        named(run)?;
        promptly("removal", || node.ctr(["container", "rm", "alone"]).output()?.ok())?;
        dead.revive();
        run_with(node, "alone", &[], &folder)?.finish()?.ok()?;
        node.remove("alone")
    })
}

#[test]
fn a_container_that_waits_for_it_and_its_pod_can_be_deleted() -> Result<()> {
    with_limit(300, |node| {
        let (dead, folder) = dead(node)?;
        node.detached(Runtime::Kata, "pod", &SANDBOX, &["sleep", "1000"])?;
        let two = run_with(node, "two", &MEMBER, &folder)?;
        dead.wait_for_a_victim()?;
        promptly("State of the container", || {
            let status = node.status("two")?;
            ensure!(status.as_deref() == Some("CREATED"), "{status:?}");
            Ok(())
        })?;
        promptly("delete -f of the container", || node.ctr(["task", "delete", "-f", "two"]).output())?;
        promptly("its creator's answer", || {
            let outcome = two.finish()?;
            ensure!(outcome.code != 0, "it was made");
            Ok(())
        })?;
        node.ctr(["container", "rm", "two"]).output()?.ok()?;
        // of the pod, while a container of it waits
        let three = run_with(node, "three", &MEMBER, &folder)?;
        dead.wait_for_another_victim(1)?;
        promptly("delete -f of the pod", || node.ctr(["task", "delete", "-f", "pod"]).output()?.ok())?;
        promptly("the creator's answer", || {
            let outcome = three.finish()?;
            ensure!(outcome.code != 0, "it was made");
            Ok(())
        })?;
        for id in ["three", "pod"] {
            node.ctr(["container", "rm", id]).output()?.ok()?;
        }
        let alive = processes::of_node(node.tag()).into_iter().filter(|one| one.name.starts_with("qemu")).count();
        ensure!(alive == 0, "{alive} VMs are left");
        dead.revive();
        Ok(())
    })
}
