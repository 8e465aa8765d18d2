//! What is cut off while a pod's later containers are made leaves neither the pod nor the host with a rest of them.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use e2e::{
    NodeSetup, Runtime,
    cri::{Cri, Network, Pod, with_cri},
    ctr::Running,
    every_containerd,
    inventory::Inventory,
    processes,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

/// A start of a pod's second container takes about 100 ms here.
const MOMENTS: [u64; 4] = [20, 35, 50, 80];

/// Cuts the start of a pod's second container off at each moment, then removes it and makes the next.
fn is_cut_off(cut: impl Fn(&Cri<'_>, Running) -> Result<()>) -> Result<()> {
    every_containerd(|setup| {
        with_cri(setup, Network::default(), |cri| {
            let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": 0}}}});
            let pod = cri.run_pod(Runtime::Kata, "cut-off", &shared)?;
            let one = cri.run(&pod, "one", &["sleep", "100000"], &shared)?;
            let mut before = None;
            for moment in MOMENTS {
                cut_off_at(cri, &pod, moment, &cut)
                    .and_then(|()| nothing_stays(cri, &one, &mut before))
                    .with_context(|| format!("cut off after {moment} ms"))?;
            }
            cri.remove(&pod)
        })
    })
}

fn cut_off_at(cri: &Cri<'_>, pod: &Pod, moment: u64, cut: impl Fn(&Cri<'_>, Running) -> Result<()>) -> Result<()> {
    let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": 0}}}});
    let two = cri.create(pod, "two", &["sleep", "200000"], &shared)?;
    let began = Instant::now();
    let start = cri.crictl(["start", &two]).spawn()?;
    thread::sleep(Duration::from_millis(moment).saturating_sub(began.elapsed()));
    cut(cri, start)?;
    // containerd refuses for as long as it undoes the start
    Cri::until(|| {
        let removed = cri.crictl(["rm", "--force", &two]).output()?;
        Ok((removed.code == 0, removed.stderr))
    })?;
    let two = cri.run(pod, "two", &["sleep", "300000"], &shared).context("the next")?;
    cri.say(["rm", "--force", &two])?;
    Ok(())
}

fn nothing_stays(cri: &Cri<'_>, one: &str, before: &mut Option<Inventory>) -> Result<()> {
    let running = programs(cri, one)?;
    ensure!(running == "pause sleep", "in the guest: {running}");
    match before {
        None => *before = Some(Inventory::take_at_rest(cri.node)?),
        Some(before) => {
            let after = Inventory::take_when(cri.node, |now| now.same_of_ours(before))?;
            ensure!(after.same_of_ours(before), "something stays:\n{}", before.beside(&after));
        }
    }
    Ok(())
}

/// The programs that a container of the pod sees, but for the shell that looks.
fn programs(cri: &Cri<'_>, container: &str) -> Result<String> {
    let look = "for p in /proc/[0-9]*; do [ ${p#/proc/} = $$ ] || { read name < $p/comm && echo $name; }; done";
    let seen = cri.sh(container, look)?;
    let mut names: Vec<_> = seen.lines().collect();
    names.sort_unstable();
    Ok(names.join(" "))
}

#[test]
fn a_client_that_goes_away_leaves_no_container() -> Result<()> {
    is_cut_off(|_, start| {
        let _ = kill(start.pid(), Signal::SIGKILL);
        start.finish().map(drop)
    })
}

#[test]
fn a_containerd_that_dies_leaves_no_container() -> Result<()> {
    is_cut_off(|cri, start| {
        cri.node.kill_containerd()?;
        start.finish()?;
        cri.node.restart_containerd()
    })
}

/// containerd asks for the deletion at once, and gives up after 5 s: what it has asked for is done all the same.
#[test]
fn a_creation_that_outlasts_its_deletion_leaves_no_container() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": 0}}}});
        let pod = cri.run_pod(Runtime::Kata, "slow", &shared)?;
        let one = cri.run(&pod, "one", &["sleep", "100000"], &shared)?;
        let two = cri.create(&pod, "two", &["sleep", "200000"], &shared)?;
        let vm = processes::wait_for(cri.node.tag(), "qemu-system", Duration::from_secs(5))?;
        let tell = |signal| kill(Pid::from_raw(vm.pid), signal);
        tell(Signal::SIGSTOP)?;
        let start = cri.crictl(["start", &two]).spawn()?;
        thread::sleep(Duration::from_secs(1));
        let _ = kill(start.pid(), Signal::SIGKILL);
        start.finish()?;
        thread::sleep(Duration::from_secs(7));
        tell(Signal::SIGCONT)?;
        Cri::until(|| {
            let removed = cri.crictl(["rm", "--force", &two]).output()?;
            Ok((removed.code == 0, removed.stderr))
        })?;
        Cri::until(|| {
            let running = programs(cri, &one)?;
            Ok((running == "pause sleep", running))
        })?;
        cri.remove(&pod)
    })
}
