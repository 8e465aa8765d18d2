//! Pods through CRI: several containers in one VM, what they share and what not, and `crictl` as a person uses it.

#![allow(unsafe_code, reason = "a socket option that nothing wraps")]

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Containerd, NodeSetup, Runtime,
    compile::compile,
    cri::{Cri, HOST, Network, with_cri},
    every_containerd,
    install::Install,
    inventory::Inventory,
    pod_network::Model,
    processes,
    pty::Terminal,
};
use nix::libc;
use serde_json::{Value, json};
use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const FOREVER: [&str; 2] = ["sleep", "100000"];

/// With each containerd and with each way into the VM, but not with every pair of them, unless `KATA_POD_MATRIX` is set.
fn with_pods(test: impl Fn(&Cri<'_>) -> Result<()>) -> Result<()> {
    with_pods_of(Network::default(), test)
}

fn with_pods_of(network: Network, test: impl Fn(&Cri<'_>) -> Result<()>) -> Result<()> {
    let everything = std::env::var_os("KATA_POD_MATRIX").is_some();
    let chosen = Containerd::chosen()?;
    let is_alone = chosen.len() == 1;
    for containerd in chosen {
        let usual = match containerd {
            Containerd::Debian => Some(Model::TcFilter),
            Containerd::V2 => Some(Model::MacVtap),
            // between the two, and like both
            Containerd::V1_7 => is_alone.then_some(Model::TcFilter),
        };
        for model in Model::ALL.into_iter().filter(|model| everything || usual == Some(*model)) {
            let config = Some(model.config()?);
            with_cri(NodeSetup { config, containerd, ..NodeSetup::default() }, network, &test)
                .with_context(|| format!("with containerd {} and {model:?}", containerd.name()))?;
        }
    }
    Ok(())
}

fn with_pods_everywhere(test: impl Fn(&Cri<'_>) -> Result<()>) -> Result<()> {
    every_containerd(|setup| with_cri(setup, Network::default(), &test))
}

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

/// containerd reads the pod's interface in its namespace, kubelet (cAdvisor) what `/proc` shows of the sandbox's process.
#[test]
fn network_statistics_are_the_pods() -> Result<()> {
    const AMOUNT: u64 = 1 << 20;
    let counted = |cri: &Cri<'_>, pod: &str| -> Result<(u64, u64)> {
        let stats: Value = serde_json::from_str(&cri.say(["statsp", "-o", "json", "--id", pod])?)?;
        let number = |name: &str| -> Result<u64> {
            let at = format!("/stats/0/linux/network/defaultInterface/{name}/value");
            let number = stats.pointer(&at).and_then(|v| v.as_u64().or_else(|| v.as_str()?.parse().ok()));
            number.with_context(|| format!("no {at} in {stats}"))
        };
        let name = stats.pointer("/stats/0/linux/network/defaultInterface/name").and_then(Value::as_str);
        ensure!(name == Some("eth0"), "{name:?} in {stats}");
        Ok((number("rxBytes")?, number("txBytes")?))
    };
    with_pods(|cri| {
        let placed = json!({"linux": {"cgroup_parent": "/kata-e2e-parent"}});
        let pod = cri.run_pod(Runtime::Kata, "netstats", &placed)?;
        let one = cri.run(
            &pod,
            "one",
            &["nc", "-ll", "-p", "7777", "-e", "sh", "-c", "head -c 1048576 | wc -c; head -c 1048576 /dev/zero"],
            &none(),
        )?;
        let before = counted(cri, &pod.id)?;
        let (v4, _) = cri.addresses(&pod)?;
        let mut stream = Cri::until(|| Ok((cri.sh(&one, "netstat -ltn")?.contains(":7777"), String::new())))
            .and_then(|_| Ok(TcpStream::connect((v4.as_str(), 7777))?))?;
        stream.write_all(&vec![0; AMOUNT as usize])?;
        let mut back = Vec::new();
        stream.read_to_end(&mut back)?;
        ensure!(back.len() as u64 > AMOUNT, "{} bytes came back", back.len());
        let after = counted(cri, &pod.id)?;
        let (rx, tx) = (after.0 - before.0, after.1 - before.1);
        println!("{}: {rx} bytes in, {tx} out", cri.node.containerd().name());
        for (way, bytes) in [("in", rx), ("out", tx)] {
            ensure!((AMOUNT..2 * AMOUNT).contains(&bytes), "{bytes} bytes {way} for {AMOUNT}");
        }
        let shown = cri.inspect("inspectp", &pod.id)?;
        let pid = shown.pointer("/info/pid").and_then(Value::as_u64).context("a process of the sandbox")?;
        let devices = std::fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        let line =
            devices.lines().find_map(|line| line.trim().strip_prefix("eth0:")).with_context(|| devices.clone())?;
        let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        // the host's own eth0 would be far off
        let is_near = |now: u64, before: u64| (before..before + AMOUNT / 2).contains(&now);
        ensure!(
            fields.len() == 16 && is_near(fields[0], after.0) && is_near(fields[8], after.1),
            "{after:?}, but {line}"
        );
        cri.remove(&pod)
    })
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
fn pods_reach_each_other_and_the_host() -> Result<()> {
    with_pods(|cri| {
        let dns = json!({
            "dns_config": {"servers": ["10.88.77.1"], "searches": ["e2e.example"], "options": ["ndots:5"]},
            "port_mappings": [{"protocol": 0, "container_port": 8080, "host_port": 28080}],
        });
        let first = cri.run_pod(Runtime::Kata, "net1", &dns)?;
        let second = cri.run_pod(Runtime::Kata, "net2", &none())?;
        let server = ["nc", "-ll", "-p", "8080", "-e", "cat"];
        let one = cri.run(&first, "server", &server, &none())?;
        let two = cri.run(&second, "client", &FOREVER, &none())?;
        let resolver = cri.sh(&one, "cat /etc/resolv.conf")?;
        ensure!(resolver.contains("nameserver 10.88.77.1") && resolver.contains("ndots:5"), "{resolver}");
        let (v4, v6) = cri.addresses(&first)?;
        for (from, target) in [(&two, v4.as_str()), (&two, HOST.0), (&one, HOST.0)] {
            let shown = cri.sh(from, &format!("ping -c 2 -W 3 {target}"))?;
            ensure!(shown.contains(" 0% packet loss"), "{shown}");
        }
        for (from, target) in [(&two, v6.as_str()), (&one, HOST.1)] {
            let shown = cri.sh(from, &format!("ping -6 -c 2 -W 3 {target}"))?;
            ensure!(shown.contains(" 0% packet loss"), "{shown}");
        }
        // TCP, both families, and UDP between the pods
        for target in [v4.as_str(), v6.as_str()] {
            let heard = cri.sh(&two, &format!("echo over-tcp | nc -w 3 {target} 8080"))?;
            ensure!(heard == "over-tcp", "{heard:?}");
        }
        // busybox has no datagram client but its resolver
        let script = format!("nslookup -type=a over-udp.example {HOST_V4} > /dev/null; true", HOST_V4 = HOST.0);
        let heard = datagram(HOST.0, || cri.sh(&two, &script).map(drop))?;
        ensure!(heard.windows(8).any(|part| part == b"over-udp"), "{heard:?}");
        // the host reaches a published port; by the bridge's address, as others would
        let mut there = TcpStream::connect((HOST.0, 28080))?;
        there.set_read_timeout(Some(Duration::from_secs(10)))?;
        there.write_all(b"published\n")?;
        let mut heard = [0; 10];
        there.read_exact(&mut heard)?;
        ensure!(&heard == b"published\n", "{heard:?}");
        // a name server on the bridge is asked
        let script = "timeout 5 nslookup some-service.e2e.example > /dev/null; true";
        let question = datagram(HOST.0, || cri.sh(&one, script).map(drop))?;
        ensure!(question.windows(12).any(|part| part == b"some-service"), "{question:?}");
        cri.remove(&second)?;
        cri.remove(&first)
    })
}

/// Answers every byte of every connection, however many there are.
const ECHO: &str = r#"
#include <arpa/inet.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int arguments, char **all_arguments) {
    (void)all_arguments;
    struct pollfd all[1024];
    int count = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(9090)};
    /* with any argument on the loopback interface only */
    if (arguments > 1) at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    all[0].fd = socket(AF_INET, SOCK_STREAM, 0);
    all[0].events = POLLIN;
    if (bind(all[0].fd, (struct sockaddr *)&at, sizeof at) || listen(all[0].fd, 1024)) return 1;
    write(1, "up\n", 3);
    while (poll(all, count, -1) > 0) {
        for (int i = count - 1; i >= 0; i--) {
            char bytes[4096];
            if (!all[i].revents) continue;
            if (i == 0) {
                if (count == 1024) return 2;
                all[count].fd = accept(all[0].fd, 0, 0);
                all[count].events = POLLIN;
                all[count++].revents = 0;
                continue;
            }
            ssize_t got = read(all[i].fd, bytes, sizeof bytes);
            if (got > 0) { write(all[i].fd, bytes, got); continue; }
            close(all[i].fd);
            all[i] = all[--count];
        }
    }
    return 3;
}
"#;

/// What brings a program into a container, at the top of its root.
fn program_mount(cri: &Cri<'_>, name: &str, text: &str) -> Result<Value> {
    let path = cri.node.dir().join(name);
    std::fs::write(&path, compile(cri.node.dir(), &format!("{name}-program"), text)?)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(json!({"mounts": [{"container_path": format!("/{name}"), "host_path": path, "readonly": true}]}))
}

#[test]
fn two_hundred_connections_pass_at_once() -> Result<()> {
    with_pods(|cri| {
        let pod = cri.run_pod(Runtime::Kata, "many", &none())?;
        let one = cri.run(&pod, "one", &["/echo"], &program_mount(cri, "echo", ECHO)?)?;
        cri.logs_with(&one, "up")?;
        let (v4, _) = cri.addresses(&pod)?;
        let mut all = Vec::new();
        for number in 0..200 {
            let mut there = TcpStream::connect((v4.as_str(), 9090))?;
            there.set_read_timeout(Some(Duration::from_secs(20)))?;
            write!(there, "line {number:3}")?;
            all.push(there);
        }
        for (number, there) in all.iter_mut().enumerate() {
            let mut heard = [0; 8];
            there.read_exact(&mut heard)?;
            ensure!(heard == *format!("line {number:3}").as_bytes(), "connection {number}: {heard:?}");
        }
        cri.remove(&pod)
    })
}

/// What comes first to the name server's port of `address` while `work` is done.
fn datagram(address: &str, work: impl FnOnce() -> Result<()>) -> Result<Vec<u8>> {
    let asked = std::net::UdpSocket::bind((address, 53))?;
    asked.set_read_timeout(Some(Duration::from_secs(20)))?;
    let question = std::thread::spawn(move || -> Result<Vec<u8>> {
        let mut packet = vec![0; 512];
        let length = asked.recv(&mut packet)?;
        packet.truncate(length);
        Ok(packet)
    });
    work()?;
    question.join().ok().context("the name server")?
}

/// Packets of this socket are whole or refused (ipv6(7), `IPV6_MTU_DISCOVER`).
fn no_fragments(socket: &std::net::UdpSocket) -> Result<()> {
    let wanted = libc::IPV6_PMTUDISC_DO;
    let size = size_of_val(&wanted) as libc::socklen_t;
    // SAFETY: an open socket and an integer that outlives the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            (&raw const wanted).cast(),
            size,
        )
    };
    if done < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
}

/// The answer of a host that got a datagram for a port that nobody listens on.
fn refused_port(socket: &std::net::UdpSocket) -> Result<bool> {
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    let answer = socket.recv(&mut [0; 1]);
    Ok(answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
}

#[test]
fn frames_of_every_size_pass() -> Result<()> {
    for mtu in [1400, 9000] {
        with_pods_of(Network { mtu, ..Network::default() }, |cri| {
            let pod = cri.run_pod(Runtime::Kata, &format!("mtu{mtu}"), &none())?;
            let one = cri.run(&pod, "one", &FOREVER, &none())?;
            ensure!(cri.sh(&one, "cat /sys/class/net/eth0/mtu")? == mtu.to_string(), "MTU in the pod");
            // IPv6 is never fragmented on its way, and its sender does it only for what is larger than the MTU: 40 bytes
            // of IPv6 and 8 of UDP
            let (_, v6) = cri.addresses(&pod)?;
            // by then the addresses have been checked for duplicates
            cri.sh(&one, &format!("ping -6 -c 1 -W 10 {}", HOST.1))?;
            let sent = |size: usize| -> Result<bool> {
                let socket = std::net::UdpSocket::bind((HOST.1, 0))?;
                no_fragments(&socket)?;
                // connected, so that the refusal comes back
                socket.connect((v6.as_str(), 9))?;
                Ok(socket.send(&vec![0; size]).is_ok() && refused_port(&socket)?)
            };
            let most = mtu as usize - 48;
            ensure!(sent(most)?, "a frame of the MTU {mtu} did not reach the pod");
            ensure!(!sent(most + 1)?, "a frame larger than the MTU {mtu} passed");
            cri.remove(&pod)
        })?;
    }
    Ok(())
}

/// Sends "kata\n" over and over, in large pieces: what busybox has would measure its own small ones.
const SOURCE: &str = r#"
#include <arpa/inet.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int count, char **arguments) {
    static char text[5 * 65536];
    if (count != 4) return 1;
    for (size_t i = 0; i < sizeof text; i++) text[i] = "kata\n"[i % 5];
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(arguments[2]))};
    int there = socket(AF_INET, SOCK_STREAM, 0);
    if (inet_pton(AF_INET, arguments[1], &to.sin_addr) != 1) return 2;
    if (connect(there, (struct sockaddr *)&to, sizeof to)) return 3;
    size_t at = 0, left = strtoull(arguments[3], 0, 10);
    while (left > 0) {
        size_t most = sizeof text - at % sizeof text;
        ssize_t sent = write(there, text + at % sizeof text, most < left ? most : left);
        if (sent <= 0) return 4;
        at += sent;
        left -= sent;
    }
}
"#;

#[test]
fn a_gibibyte_through_one_stream_is_intact() -> Result<()> {
    const SIZE: u64 = 1 << 30;
    with_pods(|cri| {
        let pod = cri.run_pod(Runtime::Kata, "stream", &none())?;
        let one = cri.run(&pod, "one", &FOREVER, &program_mount(cri, "source", SOURCE)?)?;
        let listener = TcpListener::bind((HOST.0, 0))?;
        let port = listener.local_addr()?.port();
        let receiver = std::thread::spawn(move || -> Result<(u64, u64)> {
            let (mut there, _) = listener.accept()?;
            there.set_read_timeout(Some(Duration::from_secs(60)))?;
            let (mut chunk, mut size, mut wrong) = (vec![0; 1 << 20], 0_u64, 0_u64);
            loop {
                let count = there.read(&mut chunk)?;
                if count == 0 {
                    return Ok((size, wrong));
                }
                for byte in &chunk[..count] {
                    // the text is "kata\n" over and over
                    let expected = b"kata\n"[(size % 5) as usize];
                    wrong += u64::from(*byte != expected);
                    size += 1;
                }
            }
        });
        let arguments = ["exec", "--sync", &one, "/source", HOST.0, &port.to_string(), &SIZE.to_string()];
        cri.crictl(arguments).limit(Duration::from_secs(300)).output()?.ok()?;
        let (size, wrong) = receiver.join().ok().context("the receiver")??;
        ensure!(size == SIZE && wrong == 0, "{size} bytes of {SIZE}, {wrong} of them wrong");
        cri.remove(&pod)
    })
}

#[test]
fn a_port_is_forwarded() -> Result<()> {
    with_pods(|cri| {
        for runtime in BOTH {
            let pod = cri.run_pod(runtime, &format!("forward-{}", runtime.tag()), &none())?;
            // on the pod's loopback only, where nobody else could reach it
            let server = cri.run(&pod, "server", &["/echo", "local"], &program_mount(cri, "echo", ECHO)?)?;
            cri.logs_with(&server, "up")?;
            let mut forward = cri.crictl(["port-forward", &pod.id, "28081:9090"]).spawn()?;
            let mut shown = String::new();
            let mut out = std::io::BufReader::new(forward.stdout.take().context("stdout")?);
            std::io::BufRead::read_line(&mut out, &mut shown)?;
            let answer = (|| -> Result<Vec<u8>> {
                let mut heard = Vec::new();
                for round in 0..3 {
                    let mut there = TcpStream::connect("127.0.0.1:28081")?;
                    there.set_read_timeout(Some(Duration::from_secs(10)))?;
                    writeln!(there, "forwarded {round}")?;
                    there.shutdown(std::net::Shutdown::Write)?;
                    there.read_to_end(&mut heard)?;
                }
                Ok(heard)
            })();
            nix::sys::signal::kill(forward.pid(), nix::sys::signal::Signal::SIGKILL)?;
            let ended = forward.finish()?;
            let answer = answer.with_context(|| format!("{runtime:?}: {shown} {}", ended.stderr))?;
            ensure!(
                answer == b"forwarded 0\nforwarded 1\nforwarded 2\n",
                "{runtime:?}: {:?} {shown} {}",
                String::from_utf8_lossy(&answer),
                ended.stderr
            );
            cri.remove(&pod)?;
        }
        Ok(())
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

#[test]
fn a_network_without_addresses_is_answered_as_with_runc() -> Result<()> {
    with_pods_of(Network { addresses: false, ..Network::default() }, |cri| {
        let mut said = Vec::new();
        for runtime in BOTH {
            let config = cri.pod_config("no-address", &none())?.display().to_string();
            let refused = cri.crictl(["runp", "--runtime", runtime.tag(), &config]).output()?;
            ensure!(refused.code != 0, "{runtime:?} has no address and does not mind");
            let words = refused.stderr.split_once("desc = ").map(|(_, words)| words.to_owned());
            let words = words.with_context(|| refused.stderr.clone())?;
            // what differs from one pod to the next
            said.push(words.split(' ').filter(|word| word.len() < 64).collect::<Vec<_>>().join(" "));
        }
        ensure!(said[0] == said[1], "{said:#?}");
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
