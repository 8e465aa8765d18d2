//! The pod's network: what is in its namespace is in the VM, traffic passes both ways, and the namespace is afterwards
//! as it was before.

use anyhow::{Context as _, Result, ensure};
use e2e::{BOTH, Node, Runtime, ctr::Invocation, events::Events, processes, with_node};
use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    time::Duration,
};

/// A bridge of the host and a namespace with a veth at it, as CNI's bridge plugin leaves them.
struct Pod {
    namespace: String,
    bridge: String,
    network: u8,
}

fn ip(line: &str) -> Result<String> {
    Ok(Invocation::new("ip", line.split_whitespace()).output()?.ok()?.text())
}

impl Pod {
    fn make(network: u8, mtu: u32) -> Result<Self> {
        let (namespace, bridge) = (format!("ke{network}"), format!("kebr{network}"));
        let pod = Self { namespace, bridge, network };
        pod.unmake();
        let Self { namespace, bridge, .. } = &pod;
        for line in [
            format!("netns add {namespace}"),
            format!("link add {bridge} mtu {mtu} type bridge"),
            format!("addr add 10.89.{network}.1/24 dev {bridge}"),
            format!("addr add fd89:{network}::1/64 dev {bridge} nodad"),
            format!("link add kev{network} mtu {mtu} type veth peer name eth0 netns {namespace} mtu {mtu}"),
            format!("link set kev{network} master {bridge} up"),
            format!("link set {bridge} up"),
            format!("-n {namespace} link set lo up"),
            format!("-n {namespace} addr add 10.89.{network}.2/24 brd + dev eth0"),
            format!("-n {namespace} addr add fd89:{network}::2/64 dev eth0 nodad"),
            format!("-n {namespace} link set eth0 up"),
            format!("-n {namespace} route add default via 10.89.{network}.1"),
            format!("-n {namespace} route add 10.90.0.0/16 via 10.89.{network}.1 metric 50 mtu 1300"),
            format!("-n {namespace} route add 10.91.0.1/32 dev eth0 scope link"),
            format!("-n {namespace} -6 route add default via fd89:{network}::1"),
        ] {
            ip(&line)?;
        }
        Ok(pod)
    }

    fn unmake(&self) {
        let _ = ip(&format!("netns del {}", self.namespace));
        let _ = ip(&format!("link del kev{}", self.network));
        let _ = ip(&format!("link del {}", self.bridge));
    }

    fn option(&self) -> String {
        format!("network:/run/netns/{}", self.namespace)
    }

    /// Links and queueing disciplines in the namespace.
    fn state(&self) -> Result<String> {
        let namespace = &self.namespace;
        let qdiscs = Invocation::new("tc", ["-n", namespace, "qdisc", "show"]).output()?.ok()?.text();
        Ok(format!("{}\n{qdiscs}", ip(&format!("-n {namespace} -o link show"))?))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.unmake();
    }
}

fn run(node: &Node, runtime: Runtime, pod: &Pod, id: &str, script: &str) -> Result<String> {
    let options = ["--with-ns", &pod.option()];
    Ok(node.run(runtime, id, &options, &["sh", "-c", script]).output()?.ok()?.text())
}

/// With a namespace of its own, and with nothing but the loopback in the end.
fn with_pod(network: u8, mtu: u32, test: impl FnOnce(&Node, &Pod) -> Result<()>) -> Result<()> {
    with_node(|node| {
        let pod = Pod::make(network, mtu)?;
        let before = pod.state()?;
        test(node, &pod)?;
        let after = pod.state()?;
        ensure!(before == after, "the namespace before:\n{before}\nand after:\n{after}");
        Ok(())
    })
}

#[test]
fn interfaces_addresses_and_routes_are_the_same_as_with_runc() -> Result<()> {
    with_pod(11, 1400, |node, pod| {
        let script = "ip -o addr show dev eth0 | sed 's/^[0-9]*: //; s/ *valid_lft.*//; s/\\\\.*//' | sort; \
                      ip route | sort; ip -6 route | grep -v '^fe80\\|^ff00\\|^multicast' | sort; \
                      cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address";
        let mut shown = Vec::new();
        for runtime in BOTH {
            shown.push(run(node, runtime, pod, runtime.tag(), script)?);
        }
        ensure!(shown[0] == shown[1], "runc:\n{}\nkata:\n{}", shown[0], shown[1]);
        ensure!(shown[1].contains("10.90.0.0/16") && shown[1].contains("fd89:11::2/64"), "{}", shown[1]);
        Ok(())
    })
}

#[test]
fn the_host_is_reached_by_both_families() -> Result<()> {
    with_pod(12, 1500, |node, pod| {
        let script = "ping -c 2 -W 3 10.89.12.1 && ping -6 -c 2 -W 3 fd89:12::1 && ping -c 1 127.0.0.1";
        let shown = run(node, Runtime::Kata, pod, "pings", script)?;
        ensure!(shown.matches(" 0% packet loss").count() == 3, "{shown}");
        Ok(())
    })
}

/// A stream of this many bytes each way, over frames as large as the MTU allows.
fn stream(network: u8, mtu: u32) -> Result<()> {
    const SIZE: usize = 32 << 20;
    with_pod(network, mtu, |node, pod| {
        let listener = TcpListener::bind((format!("10.89.{network}.1").as_str(), 0))?;
        let port = listener.local_addr()?.port();
        let server = std::thread::spawn(move || -> Result<usize> {
            let (mut there, _) = listener.accept()?;
            there.set_read_timeout(Some(Duration::from_secs(60)))?;
            there.write_all(&vec![b'h'; SIZE])?;
            Ok(SIZE)
        });
        let script = format!(
            "nc 10.89.{network}.1 {port} > /tmp/got < /dev/null; \
             test $(tr -d h < /tmp/got | wc -c) = 0 && wc -c < /tmp/got"
        );
        let shown = run(node, Runtime::Kata, pod, "down", &script)?;
        ensure!(shown == SIZE.to_string(), "{shown} of {SIZE} bytes");
        server.join().ok().context("the server")??;

        let listener = TcpListener::bind((format!("10.89.{network}.1").as_str(), 0))?;
        let port = listener.local_addr()?.port();
        let server = std::thread::spawn(move || -> Result<usize> {
            let (mut there, _) = listener.accept()?;
            there.set_read_timeout(Some(Duration::from_secs(60)))?;
            let mut got = Vec::new();
            there.read_to_end(&mut got)?;
            ensure!(got.iter().all(|byte| *byte == b'g'), "wrong bytes");
            Ok(got.len())
        });
        let script = format!("head -c {SIZE} /dev/zero | tr '\\0' g | nc 10.89.{network}.1 {port}");
        run(node, Runtime::Kata, pod, "up", &script)?;
        let got = server.join().ok().context("the server")??;
        ensure!(got == SIZE, "{got} of {SIZE} bytes");
        Ok(())
    })
}

#[test]
fn streams_are_intact_with_small_frames() -> Result<()> {
    stream(13, 1400)
}

#[test]
fn streams_are_intact_with_large_frames() -> Result<()> {
    stream(14, 9000)
}

#[test]
fn the_host_reaches_a_server_in_the_pod() -> Result<()> {
    with_pod(15, 1500, |node, pod| {
        let options = ["--with-ns", &pod.option()];
        let script = "echo ready; while :; do echo hello | nc -l -p 8080; done";
        node.detached(Runtime::Kata, "server", &options, &["sh", "-c", script])?;
        let mut said = String::new();
        for _ in 0..50 {
            // the server's loop has a moment without a listener
            if let Ok(mut there) = TcpStream::connect("10.89.15.2:8080") {
                there.set_read_timeout(Some(Duration::from_secs(5)))?;
                there.read_to_string(&mut said)?;
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        node.remove("server")?;
        ensure!(said == "hello\n", "{said:?}");
        Ok(())
    })
}

#[test]
fn what_cannot_be_is_refused_and_untouched() -> Result<()> {
    with_pod(16, 1500, |node, pod| {
        let options = ["--with-ns", &pod.option()];
        // another process of the host lives in the namespace
        let args = ["netns", "exec", pod.namespace.as_str(), "sleep", "1000"];
        let mut user = std::process::Command::new("ip").args(args).spawn()?;
        let refused = node.run(Runtime::Kata, "used", &options, &["true"]).output();
        let _ = user.kill();
        let _ = user.wait();
        let refused = refused?;
        ensure!(refused.code != 0 && refused.stderr.contains("used by process"), "{}", refused.stderr);
        // another sandbox has it
        node.detached(Runtime::Kata, "first", &options, &["sleep", "1000"])?;
        let second = node.run(Runtime::Kata, "second", &options, &["true"]).output()?;
        ensure!(second.code != 0 && second.stderr.contains("another sandbox"), "{}", second.stderr);
        let pings = node.exec("first", "p", &[], &["ping", "-c", "1", "-W", "3", "10.89.16.1"]).output()?;
        node.remove("first")?;
        pings.ok()?;
        // the host's own
        let host = node.run(Runtime::Kata, "host", &["--net-host"], &["true"]).output()?;
        ensure!(host.code != 0 && host.stderr.contains("host network"), "{}", host.stderr);
        // a kind of interface that no VM can have
        ip(&format!("-n {} link add br9 type bridge", pod.namespace))?;
        ip(&format!("-n {} addr add 10.99.0.1/24 dev br9", pod.namespace))?;
        let bridge = node.run(Runtime::Kata, "bridge", &options, &["true"]).output()?;
        ip(&format!("-n {} link del br9", pod.namespace))?;
        ensure!(bridge.code != 0 && bridge.stderr.contains("br9"), "{}", bridge.stderr);
        Ok(())
    })
}

#[test]
fn a_crash_leaves_the_namespace_as_it_was() -> Result<()> {
    with_pod(17, 1500, |node, pod| {
        let events = Events::watch(node)?;
        let limit = Duration::from_secs(10);
        let options = ["--with-ns", &pod.option()];
        for (id, victim) in [("c1", "containerd-shim-kata"), ("c2", "qemu-system")] {
            node.detached(Runtime::Kata, id, &options, &["sleep", "1000"])?;
            ensure!(pod.state()?.contains("tap0_kata"), "no tap: {}", pod.state()?);
            processes::wait_for(node.tag(), victim, Duration::from_secs(5))?.kill()?;
            events.wait_exit(id, limit)?;
            if victim == "qemu-system" {
                node.remove(id)?;
            } else {
                // containerd calls `delete` by itself
                events.wait("/tasks/delete", id, limit)?;
                node.ctr(["container", "rm", id]).output()?.ok()?;
            }
        }
        Ok(())
    })
}
