//! The pod's network from the start on: what is in its namespace is in the VM, traffic passes both ways, and the namespace
//! is afterwards as it was before.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, NodeSetup, Runtime,
    events::Events,
    for_both_models,
    install::Install,
    pod_network::{Model, Pod, ip, with_pod},
    processes, with_node_setup,
};
use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    time::Duration,
};

for_both_models!(
    interfaces_addresses_and_routes_are_the_same_as_with_runc,
    the_host_is_reached_by_both_families,
    streams_are_intact_with_small_frames,
    streams_are_intact_with_large_frames,
    the_host_reaches_a_server_in_the_pod,
    groups_are_joined,
    what_cannot_be_is_refused_and_untouched,
    a_crash_leaves_the_namespace_as_it_was,
    two_interfaces_in_two_subnets,
    an_interface_without_an_address_is_as_with_runc,
);

fn interfaces_addresses_and_routes_are_the_same_as_with_runc(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(11, 1400),
        |node, pod| {
            let script = "ip -o addr show dev eth0 | sed 's/^[0-9]*: //; s/ *valid_lft.*//; s/ tentative//; s/\\\\.*//' | sort; \
                      ip route | sort; ip -6 route | grep -v '^fe80\\|^ff00\\|^multicast' | sort; \
                      cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address";
            let mut shown = Vec::new();
            for runtime in BOTH {
                shown.push(pod.run(node, runtime, runtime.tag(), script)?);
            }
            ensure!(shown[0] == shown[1], "runc:\n{}\nkata:\n{}", shown[0], shown[1]);
            ensure!(shown[1].contains("10.90.0.0/16") && shown[1].contains("fd89:11::2/64"), "{}", shown[1]);
            Ok(())
        },
    )
}

fn the_host_is_reached_by_both_families(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(12, 1500),
        |node, pod| {
            let script = "ping -c 2 -W 3 10.89.12.1 && ping -6 -c 2 -W 3 fd89:12::1 && ping -c 1 127.0.0.1";
            let shown = pod.run(node, Runtime::Kata, "pings", script)?;
            ensure!(shown.matches(" 0% packet loss").count() == 3, "{shown}");
            Ok(())
        },
    )
}

/// A stream of this many bytes each way, over frames as large as the MTU allows.
fn stream(model: Model, network: u8, mtu: u32) -> Result<()> {
    const SIZE: usize = 32 << 20;
    with_pod(
        model,
        || Pod::make(network, mtu),
        |node, pod| {
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
            let shown = pod.run(node, Runtime::Kata, "down", &script)?;
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
            pod.run(node, Runtime::Kata, "up", &script)?;
            let got = server.join().ok().context("the server")??;
            ensure!(got == SIZE, "{got} of {SIZE} bytes");
            Ok(())
        },
    )
}

fn streams_are_intact_with_small_frames(model: Model) -> Result<()> {
    stream(model, 13, 1400)
}

fn streams_are_intact_with_large_frames(model: Model) -> Result<()> {
    stream(model, 14, 9000)
}

fn the_host_reaches_a_server_in_the_pod(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(15, 1500),
        |node, pod| {
            pod.start(node, "server")?;
            let script = "while :; do echo hello | nc -l -p 8080; done";
            let server = node.exec("server", "nc", &[], &["sh", "-c", script]).spawn()?;
            let mut said = String::new();
            for _ in 0..100 {
                // the server's loop has a moment without a listener
                if let Ok(mut there) = TcpStream::connect("10.89.15.2:8080") {
                    there.set_read_timeout(Some(Duration::from_secs(5)))?;
                    there.read_to_string(&mut said)?;
                    break;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            node.remove("server")?;
            drop(server.finish());
            ensure!(said == "hello\n", "{said:?}");
            Ok(())
        },
    )
}

/// Frames for a group that only the guest knows of arrive: neighbour discovery is such a group for each address.
fn groups_are_joined(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(16, 1500),
        |node, pod| {
            pod.start(node, "group")?;
            let add = ["ip", "addr", "add", "fd89:16::77/64", "dev", "eth0"];
            node.exec("group", "add", &[], &add).output()?.ok()?;
            // nobody listens on that port, which only the guest can know
            let address = "[fd89:16::77]:9".parse()?;
            let mut outcome = Ok(());
            // the guest looks whether the address is free before it uses it
            for _ in 0..5 {
                outcome = TcpStream::connect_timeout(&address, Duration::from_secs(3)).map(drop);
                if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
                    break;
                }
            }
            node.remove("group")?;
            let error = outcome.err().context("somebody listens")?;
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
            Ok(())
        },
    )
}

fn what_cannot_be_is_refused_and_untouched(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(17, 1500),
        |node, pod| {
            let options = pod.options();
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            // another process of the host lives in the namespace
            let args = ["netns", "exec", pod.namespace.as_str(), "sleep", "1000"];
            let mut user = std::process::Command::new("ip").args(args).spawn()?;
            let refused = node.run(Runtime::Kata, "used", &options, &["true"]).output();
            let _ = user.kill();
            let _ = user.wait();
            let refused = refused?;
            ensure!(refused.code != 0 && refused.stderr.contains("uses network namespace"), "{}", refused.stderr);
            // another sandbox has it
            pod.start(node, "first")?;
            let second = node.run(Runtime::Kata, "second", &options, &["true"]).output()?;
            ensure!(second.code != 0 && second.stderr.contains("another sandbox"), "{}", second.stderr);
            let pings = node.exec("first", "p", &[], &["ping", "-c", "1", "-W", "3", "10.89.17.1"]).output()?;
            node.remove("first")?;
            pings.ok()?;
            // the host's own
            let host = node.run(Runtime::Kata, "host", &["--net-host"], &["true"]).output()?;
            ensure!(host.code != 0 && host.stderr.contains("host network"), "{}", host.stderr);
            // a kind of interface that no VM can have
            pod.ip("link add br9 type bridge")?;
            pod.ip("addr add 10.99.0.1/24 dev br9")?;
            let bridge = node.run(Runtime::Kata, "bridge", &options, &["true"]).output()?;
            pod.ip("link del br9")?;
            ensure!(bridge.code != 0 && bridge.stderr.contains("br9"), "{}", bridge.stderr);
            Ok(())
        },
    )
}

fn a_crash_leaves_the_namespace_as_it_was(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(18, 1500),
        |node, pod| {
            let events = Events::watch(node)?;
            let limit = Duration::from_secs(10);
            for (id, victim) in [("c1", "containerd-shim-kata"), ("c2", "qemu-system")] {
                pod.start(node, id)?;
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
        },
    )
}

fn two_interfaces_in_two_subnets(model: Model) -> Result<()> {
    let make = || {
        let pod = Pod::make(19, 1500)?;
        // as long as a name can be
        pod.add_second_veth("net1-fifteen-ch", 1300)?;
        pod.ip("addr add 10.88.19.2/24 dev net1-fifteen-ch")?;
        pod.ip("link set net1-fifteen-ch up")?;
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        let script = "ping -c 1 -W 3 -I eth0 10.89.19.1 && ping -c 1 -W 3 -I net1-fifteen-ch 10.88.19.1 && \
                      cat /sys/class/net/net1-fifteen-ch/mtu && ip route get 10.88.19.1";
        let shown = pod.run(node, Runtime::Kata, "two", script)?;
        ensure!(shown.matches(" 0% packet loss").count() == 2, "{shown}");
        ensure!(shown.contains("\n1300\n") && shown.contains("dev net1-fifteen-ch"), "{shown}");
        Ok(())
    })
}

/// It may be for somebody who speaks Ethernet; one that is down as well is nobody's yet.
fn an_interface_without_an_address_is_as_with_runc(model: Model) -> Result<()> {
    let make = || {
        let pod = Pod::make(20, 1500)?;
        pod.add_veth("bare", 1500)?;
        pod.ip("link set bare up")?;
        pod.add_veth("down", 1500)?;
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        let script = "ls /sys/class/net; ip -4 -o addr show dev bare; ping -c 1 -W 3 10.89.20.1";
        let shown = pod.run(node, Runtime::Kata, "bare", script)?;
        ensure!(shown.contains("bare\n") && !shown.contains("down\n"), "{shown}");
        ensure!(shown.contains(" 0% packet loss"), "{shown}");
        Ok(())
    })
}

/// With the model `none` a pod has its loopback interface only; with `disable_new_netns` it may have the host's network,
/// which stays as it is.
#[test]
fn a_pod_may_go_without() -> Result<()> {
    let links = ["sh", "-c", "ls /sys/class/net; ping -c 1 -W 2 127.0.0.1 > /dev/null && echo alive"];
    for disabled in [false, true] {
        let settings = [("internetworking_model", "none".into()), ("disable_new_netns", disabled.into())];
        let config = Some(Install::locate()?.config_table_with("runtime", &settings)?);
        with_node_setup(NodeSetup { config, ..NodeSetup::default() }, |node| {
            let pod = Pod::make(30, 1500)?;
            // of the host's the names: a new bridge comes up in its own time
            let state = || -> Result<(String, Vec<String>)> {
                let links = ip("-o link show")?;
                let names = links.lines().filter_map(|line| line.split(':').nth(1).map(str::to_owned));
                Ok((pod.state()?, names.collect()))
            };
            let before = state()?;
            let options = pod.options();
            let shown = node.run(Runtime::Kata, "own", &[&options[0], &options[1]], &links).output()?.ok()?.text();
            ensure!(shown == "lo\nalive", "{shown}");
            let host = node.run(Runtime::Kata, "host", &["--net-host"], &links).output()?;
            if disabled {
                ensure!(host.ok()?.text() == "lo\nalive", "with the host's network");
            } else {
                ensure!(host.code != 0 && host.stderr.contains("host network"), "{}", host.stderr);
            }
            let after = state()?;
            ensure!(before == after, "a network was touched: {before:#?}\n{after:#?}");
            Ok(())
        })?;
    }
    Ok(())
}
