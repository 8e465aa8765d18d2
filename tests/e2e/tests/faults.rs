//! Deaths: of the VMM, its helpers, the shim, the guest and containerd, at rest and in the middle of a start.
//! Each is told to the user within a second, and leaves nothing behind.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{
    Node, Runtime,
    ctr::{Invocation, Running},
    events::Events,
    image,
    processes::{self, Process},
    with_every_containerd, with_node,
};
use std::time::{Duration, Instant};

/// The limit for a death to be known.
const AT_ONCE: Duration = Duration::from_secs(1);

fn process(node: &Node, name: &str) -> Result<Process> {
    processes::wait_for(node.tag(), name, Duration::from_secs(5))
}

/// Kills a process under a running container and wants the exit event within the limit.
fn dies_at_rest(victim: &str) -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let killed = Instant::now();
        process(node, victim)?.kill()?;
        let (at, event) = events.wait_exit("c1", Duration::from_secs(10))?;
        let took = at.saturating_duration_since(killed);
        ensure!(took < AT_ONCE, "the exit event came {took:?} after the death of {victim}");
        let status = serde_json::from_str::<serde_json::Value>(&event.content)?["exit_status"].as_u64();
        ensure!(status.is_some_and(|s| s != 0), "exit status {status:?} after a kill -9");
        ensure!(node.status("c1")?.as_deref() == Some("STOPPED"), "status {:?}", node.status("c1")?);
        node.remove("c1")
    })
}

#[test]
fn the_death_of_qemu_ends_the_task() -> Result<()> {
    dies_at_rest("qemu-system")
}

#[test]
fn the_death_of_virtiofsd_ends_the_task() -> Result<()> {
    dies_at_rest("virtiofsd")
}

/// Kills a process while the guest boots, and wants the create's error within the limit.
fn dies_in_start(victim: &str) -> Result<()> {
    with_node(|node| {
        let run = node.run(Runtime::Kata, "c1", &[], &["true"]).spawn()?;
        let process = process(node, victim)?;
        let killed = Instant::now();
        process.kill()?;
        let done = run.finish()?;
        let took = killed.elapsed();
        ensure!(done.code != 0, "the run succeeded without {victim}");
        ensure!(took < AT_ONCE, "the error came {took:?} after the death of {victim}: {}", done.stderr);
        let said = done.stderr.to_lowercase();
        let name = if victim == "qemu-system" { "qemu" } else { victim };
        ensure!(said.contains(name) && said.contains("kill"), "the error does not say what died: {}", done.stderr);
        node.run(Runtime::Kata, "c1", &[], &["true"]).output()?.ok()?;
        Ok(())
    })
}

#[test]
fn the_death_of_qemu_before_the_agent_answers_ends_the_create() -> Result<()> {
    dies_in_start("qemu-system")
}

#[test]
fn the_death_of_virtiofsd_before_the_agent_answers_ends_the_create() -> Result<()> {
    dies_in_start("virtiofsd")
}

#[test]
fn the_death_of_the_shim_is_cleaned_up() -> Result<()> {
    with_every_containerd(|node| {
        let events = Events::watch(node)?;
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        process(node, "containerd-shim-kata")?.kill()?;
        // containerd calls `delete` by itself and tells of the exit
        events.wait_exit("c1", Duration::from_secs(10))?;
        events.wait("/tasks/delete", "c1", Duration::from_secs(10))?;
        node.ctr(["container", "rm", "c1"]).output()?.ok()?;
        Ok(())
    })
}

/// Waits until nothing of the node's shims and VMs runs.
fn nothing_runs(node: &Node, after: &str) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let left = processes::of_node(node.tag());
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("{after}: still running: {left:#?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn finish(run: Running, moment: u64) -> Result<()> {
    // the run may have been over already; what counts is that it ends at all
    run.finish().map(drop).with_context(|| format!("shim killed after {moment} ms"))
}

#[test]
fn the_death_of_the_shim_at_any_moment_of_a_start() -> Result<()> {
    with_node(|node| {
        for moment in [20, 40, 60, 80, 120, 200, 350, 500, 700, 850, 1000, 1100, 1200, 1350] {
            let began = Instant::now();
            let run =
                node.run(Runtime::Kata, "again", &[], &["sleep", "1000"]).limit(Duration::from_secs(30)).spawn()?;
            std::thread::sleep(Duration::from_millis(moment).saturating_sub(began.elapsed()));
            // every process of the shim: also `start`, when it is still at work
            let mut shims = processes::of_node(node.tag());
            shims.retain(|p| p.name == "containerd-shim-kata-v2");
            if shims.is_empty() {
                shims.push(process(node, "containerd-shim-kata")?);
            }
            for shim in shims {
                let _ = shim.kill();
            }
            finish(run, moment)?;
            nothing_runs(node, &format!("shim killed after {moment} ms"))?;
            // ctr leaves the container when its task was lost
            let _ = node.ctr(["task", "delete", "-f", "again"]).output()?;
            let _ = node.ctr(["container", "rm", "again"]).output()?;
        }
        let alive = node.run(Runtime::Kata, "again", &[], &["echo", "alive"]).output()?.ok()?.text();
        ensure!(alive == "alive", "{alive:?}");
        Ok(())
    })
}

#[test]
fn a_guest_panic_ends_the_task() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        node.detached(Runtime::Kata, "c1", &["--privileged"], &["sleep", "1000"])?;
        // nothing makes a kernel stumble to order, but it can be asked what it would do
        let oops = node.exec("c1", "x0", &[], &["cat", "/proc/sys/kernel/panic_on_oops"]).output()?.ok()?.text();
        ensure!(oops == "1", "an oops is no panic: {oops}");
        let began = Instant::now();
        let exec = node.exec("c1", "x1", &[], &["sh", "-c", "echo c > /proc/sysrq-trigger"]).output()?;
        ensure!(exec.code != 0, "the exec outlived the panic that it asked for: {exec:?}");
        let (at, _) = events.wait_exit("c1", Duration::from_secs(10))?;
        let took = at.saturating_duration_since(began);
        // the panic itself happens in a guest under TCG, after an exec
        ensure!(took < AT_ONCE * 3, "the exit event came {took:?} after the order to panic");
        ensure!(node.status("c1")?.as_deref() == Some("STOPPED"), "status {:?}", node.status("c1")?);
        node.remove("c1")
    })
}

#[test]
fn the_first_process_of_a_privileged_container_panics_the_guest() -> Result<()> {
    with_node(|node| {
        let script = "echo c > /proc/sysrq-trigger; sleep 5; echo still here";
        let run = node.run(Runtime::Kata, "c1", &["--privileged"], &["sh", "-c", script]);
        let done = run.limit(Duration::from_secs(20)).output()?;
        ensure!(done.code != 0 && !done.text().contains("still here"), "no panic: {done:?}");
        Ok(())
    })
}

#[test]
fn containerd_killed_in_a_create_can_try_again() -> Result<()> {
    with_every_containerd(|node| {
        for moment in [100, 550, 600, 1100] {
            let began = Instant::now();
            let args = ["run", "-d", "--runtime", Runtime::Kata.name(), image::NAME, "retried", "sleep", "1000"];
            let run = node.ctr(args).limit(Duration::from_secs(30)).spawn()?;
            std::thread::sleep(Duration::from_millis(moment).saturating_sub(began.elapsed()));
            node.kill_containerd()?;
            run.finish()?;
            node.restart_containerd()?;
            // what a client does before it tries again; either may have nothing to do
            let deleted = node.ctr(["task", "delete", "-f", "retried"]).output()?;
            let removed = node.ctr(["container", "rm", "retried"]).output()?;
            let again = node.ctr(args).output()?.ok();
            again.with_context(|| {
                format!("containerd killed after {moment} ms; then {deleted:?} and {removed:?}, and the second try:")
            })?;
            let said = node.exec("retried", "x", &[], &["echo", "alive"]).output()?.ok()?.text();
            ensure!(said == "alive", "{said:?}");
            node.remove("retried")?;
            nothing_runs(node, &format!("containerd killed after {moment} ms"))?;
        }
        Ok(())
    })
}

/// A running container outlives containerd, and the new one finds it.
#[test]
fn containerd_killed_at_rest_finds_its_container_again() -> Result<()> {
    with_every_containerd(|node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        node.kill_containerd()?;
        node.restart_containerd()?;
        ensure!(node.status("c1")?.as_deref() == Some("RUNNING"), "status {:?}", node.status("c1")?);
        let said = node.exec("c1", "x", &[], &["echo", "alive"]).output()?.ok()?.text();
        ensure!(said == "alive", "{said:?}");
        let events = Events::watch(node)?;
        node.ctr(["task", "kill", "-s", "KILL", "c1"]).output()?.ok()?;
        events.wait_exit("c1", Duration::from_secs(10))?;
        node.remove("c1")
    })
}

/// containerd may die between a shim's start and the first call: its next run only knows the bundle, and calls `delete`.
#[test]
fn a_shim_that_was_never_asked_for_anything_is_ended() -> Result<()> {
    with_node(|node| {
        let bundle = node.dir().join("idle");
        std::fs::create_dir(&bundle)?;
        std::fs::write(bundle.join("config.json"), r#"{"ociVersion": "1.0.2"}"#)?;
        let shim = node.install().shim().display().to_string();
        let call = |action: &str| {
            let (address, place) = (node.address(), bundle.display().to_string());
            let args =
                ["-namespace", e2e::node::NAMESPACE, "-id", "idle", "-address", &address, "-bundle", &place, action];
            Invocation::new(&shim, args).env(processes::MARK, node.tag()).current_dir(&bundle).output()?.ok()
        };
        call("start")?;
        let server = processes::wait_for(node.tag(), "containerd-shim-kata", Duration::from_secs(1))?;
        call("delete")?;
        ensure!(!processes::of_node(node.tag()).contains(&server), "{server:?} still runs");
        nothing_runs(node, "a shim without a pod")
    })
}
