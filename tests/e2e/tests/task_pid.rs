//! The process id of a task: what clients and hooks find by it is the container's, and nothing of the host's.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Node, Runtime,
    ctr::Invocation,
    events::Events,
    task_api::{Bundle, Shim, specification},
    with_node,
};
use serde_json::json;
use std::{collections::BTreeSet, fs, path::Path, time::Duration};

/// What everybody can see of a process by its folder in `/proc`.
fn shows_nothing_of_the_host(pid: u32) -> Result<()> {
    let at = |name: &str| format!("/proc/{pid}/{name}");
    for kind in ["net", "mnt", "ipc", "uts", "pid", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).with_context(|| format!("{pid} {kind}"));
        let (own, hosts) = (of(&pid.to_string())?, of("self")?);
        ensure!(own != hosts, "the {kind} namespace is the host's");
    }
    let mounts = fs::read_to_string(at("mountinfo")).context("mounts")?;
    let foreign: Vec<_> = mounts.lines().filter(|line| line.split(' ').nth(4) != Some("/")).collect();
    ensure!(foreign.is_empty(), "mounts of the host: {foreign:?}");
    for fd in fs::read_dir(at("fd")).context("fd")? {
        let to = fs::read_link(fd?.path()).context("an fd")?;
        ensure!(to.to_string_lossy().starts_with("socket:"), "an open file: {}", to.display());
    }
    ensure!(fs::read(at("environ"))?.is_empty(), "it has an environment");
    let status = fs::read_to_string(at("status"))?;
    for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"] {
        ensure!(status.contains(line), "no {line:?} in {status}");
    }
    Ok(())
}

#[test]
fn its_root_is_the_containers() -> Result<()> {
    with_node(|node| {
        let hosts = node.dir().join("of-the-host");
        fs::write(&hosts, "")?;
        for runtime in BOTH {
            let id = runtime.tag();
            node.detached(runtime, id, &[], &["sh", "-c", "echo from-inside > /mark; sleep 1000"])?;
            let waits = ["sh", "-c", "while ! [ -s /mark ]; do sleep 0.02; done"];
            node.exec(id, "wait", &[], &waits).output()?.ok()?;
            let pid = node.task_pid(id)?;
            let root = format!("/proc/{pid}/root");
            let mark = fs::read_to_string(format!("{root}/mark")).with_context(|| format!("{runtime:?}"))?;
            ensure!(mark == "from-inside\n", "{runtime:?}: {mark:?}");
            ensure!(!Path::new(&format!("{root}{}", hosts.display())).exists(), "{runtime:?}: the host's files");
            // as `nerdctl cp` writes
            fs::write(format!("{root}/from-outside"), "copied")?;
            let seen = node.exec(id, "see", &[], &["cat", "/from-outside"]).output()?.ok()?.text();
            ensure!(seen == "copied", "{runtime:?}: {seen}");
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline"))?.replace('\0', " ");
            ensure!(command.contains("sleep 1000"), "{runtime:?}: {command}");
            if runtime == Runtime::Kata {
                shows_nothing_of_the_host(pid)?;
            }
            node.remove(id)?;
            ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "{runtime:?}: process {pid} is left");
        }
        Ok(())
    })
}

#[test]
fn who_kills_it_kills_the_container() -> Result<()> {
    with_node(|node| {
        for runtime in BOTH {
            let id = runtime.tag();
            let events = Events::watch(node)?;
            node.detached(runtime, id, &[], &["sleep", "1000"])?;
            let pid = i32::try_from(node.task_pid(id)?)?;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
            events.wait_exit(id, Duration::from_secs(20))?;
            let deleted = node.ctr(["task", "delete", id]).output()?.ok()?;
            ensure!(deleted.stderr.contains("137"), "{runtime:?}: {deleted:?}");
            node.ctr(["container", "rm", id]).output()?.ok()?;
        }
        Ok(())
    })
}

/// A network namespace without a path is made, and whoever finds it by the task's process puts interfaces into it: hooks
/// (nerdctl), or a client after the create (Docker). The first process has all of them.
#[test]
fn its_network_is_the_pods() -> Result<()> {
    with_node(|node| {
        let links = links()?;
        let hook = format!(
            "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); {}",
            veth("$pid", "hook0", "10.90.1").replace('\n', "; ")
        );
        let hooks = json!({"createRuntime": [{
            "path": "/bin/sh", "args": ["sh", "-ec", hook], "env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"], "timeout": 10
        }]});
        let script = "ip -4 -o addr show dev eth-hook0 | grep -q 10.90.1.2/24 && ip -4 -o addr show dev eth-late0 | \
                      grep -q 10.90.2.2/24 && ping -c 1 -W 3 10.90.1.1 && ping -c 1 -W 3 10.90.2.1 && exit 7; ip addr > /seen; exit 8";
        let bundle = Bundle::make(node, "net", &["true"])?;
        let mut spec = specification(&["sh", "-c", script]);
        spec["hooks"] = hooks;
        let pings = json!(["CAP_NET_RAW"]);
        spec["process"]["capabilities"] = json!({"bounding": pings, "effective": pings, "permitted": pings});
        bundle.write(&spec)?;
        let shim = Shim::start(node, "net", &bundle)?;
        let tested = (|| {
            let pid = shim.create("net")?;
            let later = Invocation::new("sh", ["-ec", &veth(&pid.to_string(), "late0", "10.90.2")]).output()?;
            later.ok()?;
            shim.start_container("net")?;
            let status = shim.wait("net")?;
            let seen = fs::read_to_string(bundle.path.join("rootfs/seen")).unwrap_or_default();
            ensure!(status == 7, "the first process did not have both interfaces: exit status {status}\n{seen}");
            shim.delete("net").map(drop)
        })();
        shim.shut_down()?;
        tested?;
        let now = links_gone(&links)?;
        ensure!(now == links, "links of the host: {links:?} before, {now:?} after");
        Ok(())
    })
}

/// Docker's name server for a user network listens at 127.0.0.11 in the container's network namespace on the host, and
/// resolv.conf names it between create and start.
#[test]
fn its_name_server_is_asked_from_the_guest() -> Result<()> {
    with_node(|node| {
        let file = node.dir().join("resolv.conf");
        fs::write(&file, "nameserver 192.0.2.1\n")?;
        let bundle = Bundle::make(node, "names", &["true"])?;
        let script = "nslookup web 127.0.0.11 | grep -q 'Address.* 10.1.2.3' && exit 7";
        let mut spec = specification(&["sh", "-c", script]);
        let mounts = spec["mounts"].as_array_mut().context("mounts")?;
        mounts.push(json!({"destination": "/etc/resolv.conf", "type": "bind", "source": file, "options": ["rbind"]}));
        bundle.write(&spec)?;
        let shim = Shim::start(node, "names", &bundle)?;
        let tested = (|| {
            let pid = shim.create("names")?;
            let server = name_server(pid)?;
            fs::write(&file, "nameserver 127.0.0.11\n")?;
            shim.start_container("names")?;
            let status = shim.wait("names")?;
            ensure!(status == 7, "the name was not found: exit status {status}");
            ensure!(server.is_finished(), "the server was not asked");
            shim.delete("names").map(drop)
        })();
        shim.shut_down()?;
        tested
    })
}

/// Answers the first question for an IPv4 address with 10.1.2.3, in the network namespace of a process.
fn name_server(pid: u32) -> Result<std::thread::JoinHandle<()>> {
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let listening = (|| {
            let network = fs::File::open(format!("/proc/{pid}/ns/net"))?;
            nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Invocation::new("ip", ["link", "set", "lo", "up"]).output()?.ok()?;
            Ok::<_, anyhow::Error>(std::net::UdpSocket::bind("127.0.0.11:53")?)
        })();
        let socket = match listening {
            Ok(socket) => socket,
            Err(error) => return drop(tell.send(Err(error))),
        };
        let _ = tell.send(Ok(()));
        let mut question = [0; 512];
        while let Ok((count, from)) = socket.recv_from(&mut question) {
            let asked = &question[..count];
            // RFC 1035, section 4.1: header, question (with its type and class last), answer
            let is_for_ipv4 = asked[count - 4..] == [0, 1, 0, 1];
            let header = [asked[0], asked[1], 0x81, 0x80, 0, 1, 0, u8::from(is_for_ipv4), 0, 0, 0, 0];
            let record: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3];
            let record = if is_for_ipv4 { record } else { &[] };
            let _ = socket.send_to(&[&header[..], &asked[12..], record].concat(), from);
            if is_for_ipv4 {
                return;
            }
        }
    });
    told.recv().context("the server's thread")??;
    Ok(thread)
}

/// A pair with one end in the process's network namespace, as a CNI plugin makes it. Its name there is `eth-` and its own.
fn veth(pid: &str, name: &str, net: &str) -> String {
    format!(
        "ip link add {name} type veth peer name eth-{name} netns {pid}\nip addr add {net}.1/24 dev {name}\n\
         ip link set {name} up\nnsenter --net=/proc/{pid}/ns/net ip addr add {net}.2/24 dev eth-{name}\n\
         nsenter --net=/proc/{pid}/ns/net ip link set eth-{name} up"
    )
}

fn links() -> Result<BTreeSet<String>> {
    let all = fs::read_dir("/sys/class/net")?;
    Ok(all.flatten().map(|link| link.file_name().to_string_lossy().into_owned()).collect())
}

/// The kernel takes a namespace and what is in it away a moment after its last process.
fn links_gone(before: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let end = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let now = links()?;
        if now == *before || std::time::Instant::now() > end {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two virtual machines cannot share one network: who asks for another container's is told so.
#[test]
fn another_containers_network_is_refused() -> Result<()> {
    with_node(|node| {
        node.detached(Runtime::Kata, "first", &[], &["sleep", "1000"])?;
        let pid = node.task_pid("first")?;
        let network = format!("network:/proc/{pid}/ns/net");
        let empty = node.run(Runtime::Kata, "none", &["--with-ns", &network], &["true"]).output()?;
        ensure!(empty.code != 0 && empty.stderr.contains("another sandbox uses"), "{empty:?}");
        Invocation::new("sh", ["-ec", &veth(&pid.to_string(), "first0", "10.91.1")]).output()?.ok()?;
        let second = node.run(Runtime::Kata, "second", &["--with-ns", &network], &["true"]).output()?;
        ensure!(second.code != 0 && second.stderr.contains("another sandbox uses"), "{second:?}");
        node.remove("first")
    })
}

/// A crash of the shim leaves neither the process nor the namespace; the leak check of the node sees both.
#[test]
fn it_dies_with_the_shim() -> Result<()> {
    with_node(|node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let pid = node.task_pid("c1")?;
        shim(node)?.kill()?;
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while Path::new(&format!("/proc/{pid}")).exists() {
            ensure!(std::time::Instant::now() < end, "process {pid} is left");
            std::thread::sleep(Duration::from_millis(20));
        }
        // containerd may have seen it, or not yet
        node.ctr(["task", "delete", "-f", "c1"]).output()?;
        node.ctr(["container", "rm", "c1"]).output()?.ok().map(drop)
    })
}

fn shim(node: &Node) -> Result<e2e::processes::Process> {
    e2e::processes::wait_for(node.tag(), "containerd-shim", Duration::from_secs(5))
}
