//! Pods through CRI: several containers in one VM, what they share and what not, and `crictl` as a person uses it.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, NodeSetup, Runtime,
    cri::{Cri, Network, with_cri, with_pods, with_pods_everywhere},
    ctr::Invocation,
    install::Install,
    inventory::Inventory,
    processes,
    pty::Terminal,
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const FOREVER: [&str; 2] = ["sleep", "100000"];

fn none() -> Value {
    json!({})
}

#[test]
fn containers_of_a_pod_share_what_they_should() -> Result<()> {
    with_pods_everywhere(|cri| {
        let mut seen = Vec::new();
        for runtime in BOTH {
            let own = json!({"linux": {"security_context": {"namespace_options": {"pid": 1}}}});
            let pod = cri.run_pod(runtime, &format!("shares-{}", runtime.tag()), &own)?;
            let server = ["sh", "-c", "while :; do echo hello | nc -l -p 7777; done"];
            let one = cri.run(&pod, "one", &server, &own)?;
            let two = cri.run(&pod, "two", &FOREVER, &own)?;
            let vms = processes::of_node(cri.node.tag()).iter().filter(|p| p.name.starts_with("qemu")).count();
            ensure!(vms == usize::from(runtime == Runtime::Kata), "{vms} virtual machines");
            // the network, by localhost
            let heard = cri.sh(&two, "for i in 1 2 3 4 5 6 7 8 9; do nc 127.0.0.1 7777 && break; sleep 0.1; done")?;
            ensure!(heard == "hello", "{heard:?}");
            // memory and the host name
            cri.sh(&one, "echo shared > /dev/shm/word; echo own > /tmp/word")?;
            ensure!(cri.sh(&two, "cat /dev/shm/word; ls /tmp")? == "shared", "/dev/shm or /tmp");
            let names = (cri.sh(&one, "hostname; cat /etc/hostname")?, cri.sh(&two, "hostname; cat /etc/hostname")?);
            ensure!(names.0 == names.1 && names.0.starts_with("shares-"), "{names:?}");
            // processes are each container's own
            let processes = cri.sh(&two, "ps -o args | grep -c '[n]c -l' || true")?;
            ensure!(processes == "0", "two sees {processes} processes of one");
            ensure!(
                cri.sh(&two, "readlink /proc/1/exe; tr '\\0' ' ' < /proc/1/cmdline")?.contains("sleep"),
                "process 1"
            );
            seen.push(cri.sh(&two, "df /dev/shm | tail -n 1 | awk '{print $2}'; stat -c %a /dev/shm")?);
            cri.remove(&pod)?;
        }
        ensure!(seen[0] == seen[1], "/dev/shm: runc {} kata {}", seen[0], seen[1]);
        Ok(())
    })
}

#[test]
fn a_process_namespace_is_shared_when_asked() -> Result<()> {
    with_pods(|cri| {
        for runtime in BOTH {
            let share = json!({"linux": {"security_context": {"namespace_options": {"pid": 0}}}});
            let pod = cri.run_pod(runtime, &format!("pids-{}", runtime.tag()), &share)?;
            let one = cri.run(&pod, "one", &["sh", "-c", "sleep 54321 & sleep 12345"], &share)?;
            let two = cri.run(&pod, "two", &FOREVER, &share)?;
            let shown = cri.sh(&two, "ps -o args")?;
            ensure!(shown.contains("sleep 12345") && shown.contains("sleep 54321"), "{shown}");
            ensure!(!shown.contains("kata-agent"), "{shown}");
            ensure!(!cri.sh(&two, "tr '\\0' ' ' < /proc/1/cmdline")?.contains("100000"), "process 1 is the sandbox's");
            // process 1 has another root, which is nobody's working folder
            let words = ["-a", &cri.node.address(), "-n", "k8s.io", "task", "exec", "--exec-id", "astray"];
            let words = [&words[..], &["--cwd", "/proc/1/root", &two, "ls"]].concat();
            let astray = Invocation::new("ctr", words).output()?;
            ensure!(astray.code != 0 && astray.stderr.contains("outside of"), "{} {astray:?}", runtime.tag());
            // with a container its processes end, and nobody else's
            cri.say(["stop", "--timeout", "0", &one])?;
            let shown = cri.sh(&two, "ps -o args")?;
            ensure!(!shown.contains("sleep 12345") && !shown.contains("sleep 54321"), "after the stop: {shown}");
            cri.remove(&pod)?;
        }
        Ok(())
    })
}

#[test]
fn crictl_works_as_with_runc() -> Result<()> {
    with_pods_everywhere(|cri| {
        let mut seen = Vec::new();
        for runtime in BOTH {
            let pod = cri.run_pod(runtime, &format!("tools-{}", runtime.tag()), &none())?;
            let echo = ["sh", "-c", "echo out; echo err >&2; while read line; do echo got $line; done; sleep 1000"];
            let one = cri.run(&pod, "one", &echo, &json!({"stdin": true}))?;
            // the two come in two streams, in any order
            for line in ["out\n", "err\n"] {
                cri.logs_with(&one, line)?;
            }
            // exec: a code, both outputs, a time limit
            let code = cri.crictl(["exec", "--sync", &one, "sh", "-c", "exit 42"]).output()?;
            ensure!(code.code != 0 && code.stderr.contains("42"), "{}", code.stderr);
            let late = cri.crictl(["exec", "--sync", "--timeout", "1", &one, "sleep", "1000"]).output()?;
            ensure!(late.code != 0, "an exec with a time limit of 1 s ended well");
            let missing = cri.crictl(["exec", "--sync", &one, "no-such-program"]).output()?;
            ensure!(missing.code != 0 && missing.stderr.contains("no-such-program"), "{}", missing.stderr);
            let streamed = cri.crictl(["exec", "-i", &one, "cat"]).output_with(b"through\n")?.ok()?;
            ensure!(streamed.text() == "through", "{}", streamed.text());
            // without a client there is no input, and it has an end
            let reads = cri.run(&pod, "reads", &["sh", "-c", "cat; echo read; exec sleep 1000"], &none())?;
            cri.logs_with(&reads, "read")?;
            for options in [&["exec", "--sync"][..], &["exec"]] {
                let script = [&reads, "sh", "-c", "cat; echo ended"];
                let ended = cri.crictl([options, &script].concat()).output()?.ok()?;
                ensure!(ended.text() == "ended", "{ended:?}");
            }
            cri.say(["rm", "-f", &reads])?;
            // exec with a terminal
            let mut args = cri.arguments();
            args.extend(["exec", "-it", &one, "sh"].map(String::from));
            let mut terminal = Terminal::start(&cri.program(), &args, 30, 100)?;
            terminal.send("stty size; tty; exit 3\n")?;
            terminal.expect("30 100", Duration::from_secs(20))?;
            terminal.expect("/dev/pts/", Duration::from_secs(20))?;
            let (status, shown) = terminal.finish(Duration::from_secs(20))?;
            ensure!(status != 0, "a shell that ended with 3: {shown}");
            // attach
            let attached = cri.crictl(["attach", "-i", &one]).output_with(b"word\n")?;
            ensure!(cri.logs_with(&one, "got word")?.contains("got word"), "{}", attached.stderr);
            // what is shown of it
            let status = cri.inspect("inspect", &one)?;
            let state = status.pointer("/status/state").and_then(Value::as_str).context("a state")?.to_owned();
            let pod_state = cri.inspect("inspectp", &pod.id)?;
            let pod_state = pod_state.pointer("/status/state").and_then(Value::as_str).context("a state")?.to_owned();
            let stats: Value = serde_json::from_str(&cri.say(["stats", "-o", "json", "--id", &one])?)?;
            let number = |at: &str| -> Result<u64> {
                let text = stats.pointer(at).and_then(|v| v.as_str().map(str::to_owned).or(Some(v.to_string())));
                text.with_context(|| format!("{at} in {stats}"))?.parse().with_context(|| format!("{at} in {stats}"))
            };
            ensure!(number("/stats/0/cpu/usageCoreNanoSeconds/value")? > 0, "{stats}");
            let memory = number("/stats/0/memory/workingSetBytes/value")?;
            ensure!((10_000..100_000_000).contains(&memory), "{stats}");
            // limits change while it runs
            cri.say(["update", "--memory", "134217728", "--cpu-share", "512", &one])?;
            seen.push((state, pod_state));
            // a container dies and is made again; the pod's stop is idempotent
            cri.say(["stop", "--timeout", "0", &one])?;
            cri.say(["stop", "--timeout", "0", &one])?;
            cri.say(["rm", &one])?;
            let again = cri.run(&pod, "one", &FOREVER, &json!({"metadata": {"attempt": 1}}))?;
            ensure!(cri.sh(&again, "echo back")? == "back", "the container made again");
            cri.say(["stopp", &pod.id])?;
            cri.say(["stopp", &pod.id])?;
            cri.say(["rmp", &pod.id])?;
        }
        ensure!(seen[0] == seen[1], "runc {:?}, kata {:?}", seen[0], seen[1]);
        Ok(())
    })
}

/// Where a tree of cgroup version 1, or the one tree of version 2, has its folders.
fn cgroup_tree(controller: &str) -> PathBuf {
    let old = Path::new("/sys/fs/cgroup").join(controller);
    if old.is_dir() { old } else { "/sys/fs/cgroup".into() }
}

/// Commands of what runs in a cgroup.
fn commands_in(folder: &Path) -> Result<String> {
    let processes =
        std::fs::read_to_string(folder.join("cgroup.procs")).with_context(|| folder.display().to_string())?;
    let command = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Ok(processes.lines().map(command).collect())
}

#[test]
fn a_pod_counts_for_its_cgroup() -> Result<()> {
    const PARENT: &str = "/kata-e2e-parent";
    let everything = |cri: &Cri<'_>| -> Result<()> {
        let placed = json!({"linux": {"cgroup_parent": PARENT}});
        let pod = cri.run_pod(Runtime::Kata, "counts", &placed)?;
        let one = cri.run(&pod, "one", &FOREVER, &none())?;
        let folder = cgroup_tree("memory").join(&PARENT[1..]).join(&pod.id);
        let commands = commands_in(&folder)?;
        ensure!(commands.contains("qemu-system") && commands.contains("virtiofsd"), "{commands}");
        let stats: Value = serde_json::from_str(&cri.say(["statsp", "-o", "json", "--id", &pod.id])?)?;
        let memory = stats.pointer("/stats/0/linux/memory/workingSetBytes/value").map(ToString::to_string);
        let memory: u64 = memory.with_context(|| stats.to_string())?.trim_matches('"').parse()?;
        ensure!(memory > 20 << 20, "the whole VM takes {memory} bytes: {stats}");
        ensure!(stats.to_string().contains(&one), "{one} is not in {stats}");
        cri.remove(&pod)?;
        ensure!(!folder.exists() && !cgroup_tree("memory").join(&PARENT[1..]).exists(), "{folder:?} is left");
        Ok(())
    };
    with_pods(everything)?;
    let processors = |cri: &Cri<'_>| -> Result<()> {
        let pod = cri.run_pod(Runtime::Kata, "apart", &json!({"linux": {"cgroup_parent": PARENT}}))?;
        let overhead = cgroup_tree("memory").join("kata_overhead").join(&pod.id);
        let commands = commands_in(&overhead)?;
        ensure!(commands.contains("qemu-system") && commands.contains("virtiofsd"), "{commands}");
        let threads = std::fs::read_to_string(cgroup_tree("cpu").join(&PARENT[1..]).join(&pod.id).join("tasks"))?;
        ensure!(threads.lines().count() == 1, "threads of the pod's one processor: {threads:?}");
        cri.remove(&pod)
    };
    if !cgroup_tree("cpu").join("tasks").exists() {
        println!("skipped: threads of a VM apart: this host has no cgroup version 1");
        return Ok(());
    }
    let config = Install::locate()?.config_table_with("runtime", &[("sandbox_cgroup_only", false.into())])?;
    with_cri(NodeSetup { config: Some(config), ..NodeSetup::default() }, Network::default(), processors)
}

#[test]
fn a_limit_of_memory_is_kept_and_told() -> Result<()> {
    with_pods(|cri| {
        let pod = cri.run_pod(Runtime::Kata, "oom", &none())?;
        let limit = json!({"linux": {"resources": {"memory_limit_in_bytes": 20 << 20}}});
        // again and again: the reason is lost when the kernel tells it after the container is gone
        for round in 0..6 {
            let hungry = cri.run(&pod, &format!("hungry{round}"), &["tail", "/dev/zero"], &limit)?;
            cri.wait_exited(&hungry)?;
            // the end and its reason are told by two events, in any order
            cri.wait_shown(&hungry, "OOMKilled")?;
        }
        cri.remove(&pod)
    })
}

/// The scheduler of a guest without KVM does not go by weights before.
#[test]
fn weights_count_when_there_are_two() -> Result<()> {
    with_pods(|cri| {
        let pod = cri.run_pod(Runtime::Kata, "weights", &none())?;
        let shares = |count: u32| json!({"linux": {"resources": {"cpu_shares": count}}});
        let weight = |id: &str| cri.sh(id, "cat /sys/fs/cgroup/cpu.weight 2>/dev/null || echo none");
        let one = cri.run(&pod, "one", &FOREVER, &shares(1024))?;
        // what the driver tells such a guest's kernel
        let is_translated = cri.sh(&one, "cat /proc/cmdline")?.contains("cgroup_disable=pressure");
        let alone = if is_translated { "none" } else { "39" };
        ensure!(weight(&one)? == alone, "alone: {}", weight(&one)?);
        cri.say(["update", "--cpu-share", "2048", &one])?;
        let two = cri.run(&pod, "two", &FOREVER, &shares(4096))?;
        // (shares - 2) * 9999 / 262142 + 1, as runc does
        ensure!((weight(&one)?, weight(&two)?) == ("79".into(), "157".into()), "{} {}", weight(&one)?, weight(&two)?);
        cri.say(["update", "--cpu-share", "512", &two])?;
        ensure!(weight(&two)? == "20", "changed: {}", weight(&two)?);
        cri.remove(&pod)
    })
}

#[test]
fn what_a_pod_cannot_have_is_refused_and_others_go_on() -> Result<()> {
    with_pods(|cri| {
        let host = |kind: &str| json!({"linux": {"security_context": {"namespace_options": {kind: 2}}}});
        for (kind, word) in [("network", "host network"), ("pid", "PID"), ("ipc", "IPC")] {
            let config = cri.pod_config(&format!("host-{kind}"), &host(kind))?.display().to_string();
            let refused = cri.crictl(["runp", "--runtime", "kata", &config]).output()?;
            ensure!(refused.code != 0 && refused.stderr.contains(word), "{kind}: {}", refused.stderr);
        }
        let pod = cri.run_pod(Runtime::Kata, "goes-on", &none())?;
        let one = cri.run(&pod, "one", &FOREVER, &none())?;
        let bad =
            cri.create(&pod, "bad", &["no-such-program"], &none()).and_then(|id| cri.crictl(["start", &id]).output());
        match bad {
            Ok(started) => ensure!(started.code != 0 && started.stderr.contains("no-such-program"), "{started:?}"),
            Err(error) => ensure!(format!("{error:#}").contains("no-such-program"), "{error:#}"),
        }
        let nowhere = json!({"mounts": [{"container_path": "/data", "host_path": "/proc/no/such/folder"}]});
        let refused = cri.try_create(&pod, "mount", &FOREVER, &nowhere)?;
        ensure!(refused.code != 0 && refused.stderr.contains("/proc/no/such/folder"), "{}", refused.stderr);
        ensure!(cri.sh(&one, "echo still here")? == "still here", "the pod's first container");
        cri.remove(&pod)
    })
}

/// With `disable_new_netns` a pod of the host's network runs, with its loopback interface alone.
#[test]
fn a_pod_of_the_hosts_network_may_go_without() -> Result<()> {
    let settings = [("internetworking_model", "none".into()), ("disable_new_netns", true.into())];
    let config = Some(Install::locate()?.config_table_with("runtime", &settings)?);
    with_cri(NodeSetup { config, ..NodeSetup::default() }, Network::default(), |cri| {
        let host = json!({"linux": {"security_context": {"namespace_options": {"network": 2}}}});
        let pod = cri.run_pod(Runtime::Kata, "host", &host)?;
        let one = cri.run(&pod, "one", &FOREVER, &none())?;
        let links = cri.sh(&one, "ls /sys/class/net")?;
        ensure!(links == "lo", "{links}");
        cri.remove(&pod)
    })
}

#[test]
fn a_pod_that_crashes_is_taken_away() -> Result<()> {
    with_pods_everywhere(|cri| {
        for (name, victim) in [("shim", "containerd-shim-kata"), ("vmm", "qemu-system")] {
            let pod = cri.run_pod(Runtime::Kata, &format!("crash-{name}"), &none())?;
            let one = cri.run(&pod, "one", &FOREVER, &none())?;
            let two = cri.run(&pod, "two", &FOREVER, &none())?;
            processes::wait_for(cri.node.tag(), victim, Duration::from_secs(5))?.kill()?;
            cri.wait_exited(&one)?;
            cri.wait_exited(&two)?;
            cri.remove(&pod)?;
        }
        Ok(())
    })
}

/// `KATA_POD_SECONDS` makes it longer.
#[test]
fn pods_come_and_go_four_at_a_time() -> Result<()> {
    let seconds = match std::env::var("KATA_POD_SECONDS") {
        Ok(text) => text.parse().with_context(|| format!("KATA_POD_SECONDS={text}: not a number of seconds"))?,
        Err(_) => 1,
    };
    with_pods(|cri| {
        let four = |round: u32| {
            std::thread::scope(|scope| {
                let one = |slot: u32| -> Result<()> {
                    let name = format!("many-{round}-{slot}");
                    let pod = cri.run_pod(Runtime::Kata, &name, &none())?;
                    let id = cri.run(&pod, "one", &FOREVER, &none())?;
                    ensure!(cri.sh(&id, "hostname")? == name, "the host name of {name}");
                    cri.remove(&pod)
                };
                let all: Vec<_> = (0..4).map(|slot| scope.spawn(move || one(slot))).collect();
                all.into_iter().try_for_each(|thread| thread.join().ok().context("a thread")?)
            })
        };
        // what is made once, such as CNI's bridge, is there after the first
        four(0)?;
        let before = Inventory::take_at_rest(cri.node)?;
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut rounds = 0;
        while Instant::now() < end {
            rounds += 1;
            four(rounds)?;
        }
        let after = Inventory::take_when(cri.node, |now| now.same_things(&before))?;
        println!("{} pods, four at a time; before and after:\n{}", rounds * 4, before.beside(&after));
        ensure!(after.same_things(&before), "something stays:\n{}", before.beside(&after));
        let left = processes::of_node(cri.node.tag());
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}
