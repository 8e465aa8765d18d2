//! What is cut off while a pod's later containers are made leaves neither the pod nor the host with a rest of them.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use e2e::{
    NodeSetup, Runtime,
    compile::compile,
    cri::{Cri, Network, Pod, with_cri},
    ctr::Running,
    every_containerd,
    inventory::Inventory,
    node::CRI_NAMESPACE,
    processes,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

/// Has a file read ahead, and has no other file of the share's: their closing would
/// wait for the reading.
const READS: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>
#define FILES 10
int main(int count, char **words) {
    if (count == 1) {
        int copy = memfd_create("reads", MFD_CLOEXEC), program = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
        char *again[] = {words[0], "again", NULL}, *none[] = {NULL};
        while (sendfile(copy, program, NULL, 1 << 20) > 0) {}
        fexecve(copy, again, none);
        return 1;
    }
    const long size = 1L << 30;
    char *files[FILES];
    for (int n = 0; n < FILES; n++) {
        char name[16];
        snprintf(name, sizeof name, "/big%d", n);
        int file = open(name, O_RDWR | O_CREAT, 0600);
        if (file < 0 || ftruncate(file, size) || close(file)) return 1;
        file = open(name, O_RDONLY);
        files[n] = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
        if (files[n] == MAP_FAILED || close(file)) return 1;
    }
    puts("reads");
    fflush(stdout);
    for (long at = 0;; at = (at + 4096) % size)
        for (int n = 0; n < FILES; n++) madvise(files[n] + at, 4096, MADV_WILLNEED);
}
"#;

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
        if is_forgotten(cri, &two) {
            cri.node.ctr(["-n", CRI_NAMESPACE, "tasks", "rm", "--force", &two]).output()?;
        }
        let removed = cri.crictl(["rm", "--force", &two]).output()?;
        Ok((removed.code == 0, removed.stderr))
    })?;
    let two = cri.run(pod, "two", &["sleep", "300000"], &shared).context("the next")?;
    cri.say(["rm", "--force", &two])?;
    Ok(())
}

/// containerd does not undo a start that is given up after Create's answer and before it has asked for the PID (Create of
/// plugins/services/tasks/local.go, 2.4.2); whatever the runtime is, its task stays until somebody else deletes it.
fn is_forgotten(cri: &Cri<'_>, container: &str) -> bool {
    let lines = cri.node.log.lines_from(0);
    lines.iter().any(|line| line.contains(container) && line.contains("failed to get task pid: context canceled"))
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

/// The guest tells virtiofsd of such a file's closing when the reading ahead has ended. By then its file system may be gone:
/// without our patch of the guest's kernel (0005) that ended the pod.
#[test]
fn a_container_that_is_killed_while_it_reads_does_not_end_the_pod() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let none = json!({});
        let pod = cri.run_pod(Runtime::Kata, "reading", &none)?;
        let one = cri.run(&pod, "one", &["sleep", "100000"], &none)?;
        let tool = cri.node.dir().join("tool");
        fs::create_dir(&tool)?;
        compile(&tool, "reads", READS)?;
        let mounts = json!({"mounts": [{"container_path": "/tool", "host_path": tool}]});
        let processes = processes::of_node(cri.node.tag());
        let daemons = || processes.iter().filter(|one| one.name.starts_with("virtiofsd"));
        ensure!(daemons().count() > 0, "no virtiofsd in {processes:?}");
        let tell = |signal| daemons().try_for_each(|daemon| kill(Pid::from_raw(daemon.pid), signal));
        for round in 0..5 {
            let two = cri.run(&pod, &format!("two-{round}"), &["/tool/reads"], &mounts)?;
            cri.logs_with(&two, "reads")?;
            tell(Signal::SIGSTOP)?;
            let removal = cri.crictl(["rm", "--force", &two]).spawn()?;
            thread::sleep(Duration::from_millis(500));
            tell(Signal::SIGCONT)?;
            let removed = removal.finish()?;
            ensure!(removed.code == 0, "round {round}: {removed:?}");
            ensure!(cri.sh(&one, "echo here").context(round)? == "here", "round {round}");
        }
        cri.remove(&pod)
    })
}
