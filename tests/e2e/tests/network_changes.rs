//! The pod's network while it runs: what changes in its namespace changes in the VM.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Node,
    events::Events,
    for_both_models,
    pod_network::{Model, Pod, ip, seen_in, with_pod},
    processes,
};
use std::time::{Duration, Instant};

/// Within which a change must be seen inside the guest, on a machine that may be busy: an event that is lost is never seen.
/// How long it takes is printed.
const LIMIT: Duration = Duration::from_secs(10);

for_both_models!(
    an_interface_that_comes_later_is_the_same,
    the_only_interface_comes_later,
    addresses_routes_and_neighbours_come_and_go,
    names_and_sizes_change,
    what_is_refused_keeps_nothing_else_out,
    the_same_address_twice_is_as_on_the_host,
    twenty_times_leaves_nothing,
    an_interface_that_vanishes_at_once_does_no_harm,
    a_burst_ends_as_the_host_has_it,
    what_does_not_fit_comes_when_there_is_room,
    a_crash_after_a_change_leaves_nothing,
);

fn seen(node: &Node, condition: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
    let took = seen_in(node, "pod", condition, change)?;
    eprintln!("{:>5} ms: {condition}", took.as_millis());
    ensure!(took < LIMIT, "{condition}: seen after {took:?}");
    Ok(())
}

fn pings(node: &Node, from: &str, to: &str) -> Result<()> {
    let command = ["ping", "-c", "2", "-W", "3", "-I", from, to];
    let outcome = node.exec("pod", "ping", &[], &command).output()?;
    outcome.ok().with_context(|| format!("no answer from {to} at {from}")).map(drop)
}

fn start(node: &Node, pod: &Pod) -> Result<()> {
    pod.start(node, "pod")
}

fn an_interface_that_comes_later_is_the_same(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(31, 1500),
        |node, pod| {
            start(node, pod)?;
            seen(node, "ip -4 -o addr show dev net1 | grep -q '10.88.31.2/24 brd 10.88.31.255'", || {
                pod.add_second_veth("net1", 1500)?;
                pod.ip("link set net1 mtu 1400")?;
                pod.ip("addr add 10.88.31.2/24 brd + dev net1")?;
                pod.ip("link set net1 up").map(drop)
            })?;
            let script = "cat /sys/class/net/net1/address /sys/class/net/net1/mtu";
            let shown = node.exec("pod", "show", &[], &["sh", "-c", script]).output()?.ok()?.text();
            let mac = pod.ip("-o link show dev net1")?;
            let (shown_mac, shown_mtu) = shown.split_once('\n').context("two lines")?;
            ensure!(mac.contains(shown_mac) && shown_mtu == "1400", "{mac}\nin the guest {shown}");
            pings(node, "net1", "10.88.31.1")?;
            pings(node, "eth0", "10.89.31.1")?;
            seen(node, "! test -e /sys/class/net/net1", || pod.ip("link del net1").map(drop))?;
            pings(node, "eth0", "10.89.31.1")?;
            node.remove("pod")
        },
    )
}

/// As Docker does it from version 26 on: first the container, then its network.
fn the_only_interface_comes_later(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::bare(32, 1500),
        |node, pod| {
            start(node, pod)?;
            let shown = node.exec("pod", "ls", &[], &["ls", "/sys/class/net"]).output()?.ok()?.text();
            ensure!(!shown.contains("eth0"), "{shown}");
            seen(node, "ip route | grep -q 'default via 10.89.32.1 dev eth0'", || {
                pod.add_veth("eth0", 1500)?;
                pod.ip("addr add 10.89.32.2/24 dev eth0")?;
                pod.ip("link set eth0 up")?;
                pod.ip("route add default via 10.89.32.1").map(drop)
            })?;
            pings(node, "eth0", "10.89.32.1")?;
            // and goes
            seen(node, "! test -e /sys/class/net/eth0", || pod.ip("link del eth0").map(drop))?;
            node.remove("pod")
        },
    )
}

fn addresses_routes_and_neighbours_come_and_go(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(33, 1500),
        |node, pod| {
            start(node, pod)?;
            let add = |line: &str| pod.ip(line).map(drop);
            let address = "ip -o addr show dev eth0 | grep -q";
            seen(node, &format!("{address} 10.89.33.77/24"), || add("addr add 10.89.33.77/24 dev eth0"))?;
            seen(node, &format!("{address} fd89:33::77/64"), || add("addr add fd89:33::77/64 dev eth0 nodad"))?;
            seen(node, "ip route | grep -q '10.92.0.0/16 via 10.89.33.1 dev eth0'", || {
                add("route add 10.92.0.0/16 via 10.89.33.1")
            })?;
            seen(node, "ip -6 route | grep -q 'fd93::/32 via fd89:33::1'", || {
                add("route add fd93::/32 via fd89:33::1")
            })?;
            seen(node, "ip neigh | grep -q '10.89.33.99.*02:00:00:00:00:99.*PERMANENT'", || {
                add("neigh add 10.89.33.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent")
            })?;
            // each goes again, and the others stay
            seen(node, "! ip neigh | grep -q '10.89.33.99.*PERMANENT'", || add("neigh del 10.89.33.99 dev eth0"))?;
            seen(node, "! ip -6 route | grep -q fd93", || add("route del fd93::/32 via fd89:33::1"))?;
            seen(node, "! ip route | grep -q 10.92.0.0/16", || add("route del 10.92.0.0/16 via 10.89.33.1"))?;
            seen(node, &format!("! {address} fd89:33::77/64"), || add("addr del fd89:33::77/64 dev eth0"))?;
            seen(node, &format!("! {address} 10.89.33.77/24"), || add("addr del 10.89.33.77/24 dev eth0"))?;
            let shown = node.exec("pod", "show", &[], &["sh", "-c", "ip route; ip -6 route"]).output()?.ok()?.text();
            for route in
                ["10.90.0.0/16 via 10.89.33.1", "10.91.0.1 dev eth0", "default via 10.89.33.1", "via fd89:33::1"]
            {
                ensure!(shown.contains(route), "{route} is missing in\n{shown}");
            }
            pings(node, "eth0", "10.89.33.1")?;
            node.remove("pod")
        },
    )
}

fn names_and_sizes_change(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(34, 1500),
        |node, pod| {
            start(node, pod)?;
            seen(node, "test \"$(cat /sys/class/net/eth0/mtu)\" = 1400", || {
                pod.ip("link set eth0 mtu 1400").map(drop)
            })?;
            // a bridge takes the smallest of its ports, so this one is told nothing
            seen(node, "ip route 2>/dev/null | grep -q 'default via 10.89.34.1 dev a-name-of-15-ch'", || {
                pod.ip("link set eth0 down")?;
                pod.ip("link set eth0 name a-name-of-15-ch")?;
                pod.ip("link set a-name-of-15-ch up")?;
                pod.ip("route add default via 10.89.34.1").map(drop)
            })?;
            pings(node, "a-name-of-15-ch", "10.89.34.1")?;
            node.remove("pod")?;
            // as it was, for the comparison
            pod.ip("link set a-name-of-15-ch down")?;
            pod.ip("link set a-name-of-15-ch mtu 1500 name eth0")?;
            pod.ip("link set eth0 up")?;
            pod.ip("addr add fd89:34::2/64 dev eth0 nodad")?;
            pod.ip("-6 route add default via fd89:34::1")?;
            pod.ip("route add default via 10.89.34.1")?;
            pod.ip("route add 10.90.0.0/16 via 10.89.34.1 metric 50 mtu 1300")?;
            pod.ip("route add 10.91.0.1/32 dev eth0 scope link").map(drop)
        },
    )
}

fn what_is_refused_keeps_nothing_else_out(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(35, 1500),
        |node, pod| {
            start(node, pod)?;
            let from = node.log.len();
            // a gateway that the host reaches by an interface that the guest does not get
            pod.ip("link add br9 type bridge")?;
            pod.ip("addr add 10.99.0.1/24 dev br9")?;
            pod.ip("link set br9 up")?;
            seen(node, "ip route | grep -q 10.94.0.0/16", || {
                pod.ip("route add 10.93.0.0/16 via 10.99.0.2 dev eth0 onlink")?;
                pod.ip("route add 10.94.0.0/16 via 10.89.35.1").map(drop)
            })?;
            let told = node.log.wait_from(from, LIMIT, |line| line.contains("br9") && line.contains("level=warn"));
            ensure!(told.is_some(), "nothing is said about br9");

            // the guest's own route is in the way of one, by a container that may do so
            let from = node.log.len();
            let take = "ip route del default; ip addr flush dev eth0";
            node.exec("pod", "take", &[], &["sh", "-c", take]).output()?.ok()?;
            pod.ip("route add 10.95.0.0/16 via 10.89.35.1")?;
            let told =
                node.log.wait_from(from, LIMIT, |line| line.contains("level=warn") && line.contains("10.95.0.0/16"));
            ensure!(
                told.is_some() || node.log.lines_from(from).iter().any(|line| line.contains("unreachable")),
                "no word"
            );
            ensure!(node.status("pod")?.as_deref() == Some("RUNNING"), "the pod ended");
            // the next change of the interface sets everything right
            seen(node, "ip route | grep -q 10.95.0.0/16 && ip route | grep -q default", || {
                pod.ip("addr add 10.89.35.3/24 dev eth0").map(drop)
            })?;
            pings(node, "eth0", "10.89.35.1")?;
            node.remove("pod")?;
            for line in [
                "link del br9",
                "addr del 10.89.35.3/24 dev eth0",
                "route del 10.93.0.0/16",
                "route del 10.94.0.0/16",
                "route del 10.95.0.0/16",
            ] {
                pod.ip(line)?;
            }
            Ok(())
        },
    )
}

fn the_same_address_twice_is_as_on_the_host(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(36, 1500),
        |node, pod| {
            start(node, pod)?;
            seen(node, "ip -o addr show dev net1 2>/dev/null | grep -q 10.89.36.2/24", || {
                pod.add_second_veth("net1", 1500)?;
                pod.ip("addr add 10.89.36.2/24 dev net1")?;
                pod.ip("link set net1 up").map(drop)
            })?;
            let shown = node.exec("pod", "show", &[], &["ip", "-o", "addr"]).output()?.ok()?.text();
            ensure!(shown.matches("10.89.36.2/24").count() == 2, "{shown}");
            seen(node, "! test -e /sys/class/net/net1", || pod.ip("link del net1").map(drop))?;
            pings(node, "eth0", "10.89.36.1")?;
            node.remove("pod")
        },
    )
}

fn twenty_times_leaves_nothing(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(37, 1500),
        |node, pod| {
            start(node, pod)?;
            let mut before = None;
            for round in 0..20 {
                // what a start still gives back, and what stays from a first change on, is no leak; every round's is
                if round == 1 {
                    before = Some(settled(node, pod, None)?);
                }
                seen(node, "ip -4 -o addr show dev net1 2>/dev/null | grep -q 10.88.37.2/24", || {
                    pod.add_second_veth("net1", 1500)?;
                    pod.ip("addr add 10.88.37.2/24 dev net1")?;
                    pod.ip("link set net1 up").map(drop)
                })?;
                seen(node, "! test -e /sys/class/net/net1", || pod.ip("link del net1").map(drop))?;
            }
            let before = before.context("twenty rounds")?;
            let after = settled(node, pod, Some(&before))?;
            ensure!(before == after, "before\n{before:#?}\nafter\n{after:#?}");
            pings(node, "eth0", "10.89.37.1")?;
            node.remove("pod")
        },
    )
}

/// What the namespace and the pod's processes hold once that is `wanted`, or does not change for a second when nothing
/// is: the host's side follows the guest's by a moment, and nothing tells when it is done.
fn settled(node: &Node, pod: &Pod, wanted: Option<&(String, Held)>) -> Result<(String, Held)> {
    let (mut last, mut since) = ((pod.state()?, held(node)?), Instant::now());
    while since.elapsed() < Duration::from_secs(wanted.map_or(1, |_| 10)) && wanted != Some(&last) {
        std::thread::sleep(Duration::from_millis(100));
        let now = (pod.state()?, held(node)?);
        if now != last && wanted.is_none() {
            since = Instant::now();
        }
        last = now;
    }
    Ok(last)
}

/// What a process has or a file lists, and how many of them.
type Held = Vec<(String, usize)>;

/// How many descriptors the pod's processes have, and how long its journal is.
fn held(node: &Node) -> Result<Held> {
    let mut all = Vec::new();
    for process in processes::of_node(node.tag()) {
        let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", process.pid)).map(Iterator::count);
        // QEMU's helper threads and virtiofsd's files come and go as they like
        if process.name.contains("containerd-shim") || process.name.contains("qemu-system") {
            all.push((format!("descriptors of {}", process.name), count("fd")?));
        }
    }
    for entry in std::fs::read_dir("/run/kata-containers/sandboxes")?.flatten() {
        if let Ok(journal) = std::fs::read_to_string(entry.path().join("journal")) {
            all.push((format!("steps of {}", entry.file_name().display()), journal.lines().count()));
        }
    }
    all.sort();
    Ok(all)
}

fn an_interface_that_vanishes_at_once_does_no_harm(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(38, 1500),
        |node, pod| {
            start(node, pod)?;
            // at every moment of its way into the VM
            for delay in (0..600).step_by(40) {
                pod.add_second_veth("net1", 1500)?;
                pod.ip("addr add 10.88.38.2/24 dev net1")?;
                pod.ip("link set net1 up")?;
                std::thread::sleep(Duration::from_millis(delay));
                pod.ip("link del net1")?;
            }
            seen(node, "ip -4 -o addr show dev net1 2>/dev/null | grep -q 10.88.38.2/24", || {
                pod.add_second_veth("net1", 1500)?;
                pod.ip("addr add 10.88.38.2/24 dev net1")?;
                pod.ip("link set net1 up").map(drop)
            })?;
            pings(node, "net1", "10.88.38.1")?;
            seen(node, "test \"$(ls /sys/class/net | tr '\\n' ' ')\" = 'eth0 lo '", || {
                pod.ip("link del net1").map(drop)
            })?;
            pings(node, "eth0", "10.89.38.1")?;
            node.remove("pod")
        },
    )
}

fn a_burst_ends_as_the_host_has_it(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(39, 1500),
        |node, pod| {
            start(node, pod)?;
            let addresses = (1..=100).map(|n| format!("addr add 10.87.39.{n}/32 dev eth0"));
            let routes = (1..=100).map(|n| format!("route add 10.86.{n}.0/24 via 10.89.39.1"));
            let batch = node.dir().join("batch");
            std::fs::write(&batch, addresses.chain(routes).collect::<Vec<_>>().join("\n"))?;
            let both =
                "test $(ip -o addr show dev eth0 | grep -c 10.87.39) = 100 && test $(ip route | grep -c 10.86) = 100";
            seen(node, both, || ip(&format!("-n {} -batch {}", pod.namespace, batch.display())).map(drop))?;
            let undo = std::fs::read_to_string(&batch)?.replace(" add ", " del ");
            std::fs::write(&batch, undo)?;
            seen(node, "! ip route | grep -q 10.86 && ! ip -o addr | grep -q 10.87", || {
                ip(&format!("-n {} -batch {}", pod.namespace, batch.display())).map(drop)
            })?;
            pings(node, "eth0", "10.89.39.1")?;
            node.remove("pod")
        },
    )
}

/// A VM has thirty places for cards.
fn what_does_not_fit_comes_when_there_is_room(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(41, 1500),
        |node, pod| {
            start(node, pod)?;
            let from = node.log.len();
            let all = "test $(ls /sys/class/net | wc -l) = 31";
            let took = seen_in(node, "pod", all, || {
                for number in 1..=30 {
                    pod.add_second_veth(&format!("net{number}"), 1500)?;
                    pod.ip(&format!("link set net{number} up"))?;
                }
                Ok(())
            })?;
            eprintln!("29 interfaces after {took:?}");
            let told = node.log.wait_from(from, LIMIT, |line| line.contains("no slot is free"));
            let (_, left_out) = told.context("nothing is said about the last one")?;
            let name = (1..=30).map(|number| format!("interface net{number} ")).find(|name| left_out.contains(name));
            let name = name.with_context(|| format!("which one? {left_out}"))?.replace("interface ", "");
            let gone = if name == "net1 " { "net2" } else { "net1" };
            seen(node, &format!("test -e /sys/class/net/{name} && ! test -e /sys/class/net/{gone}"), || {
                pod.ip(&format!("link del {gone}")).map(drop)
            })?;
            pings(node, "eth0", "10.89.41.1")?;
            node.remove("pod")?;
            for number in 1..=30 {
                let _ = pod.ip(&format!("link del net{number}"));
            }
            Ok(())
        },
    )
}

fn a_crash_after_a_change_leaves_nothing(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(40, 1500),
        |node, pod| {
            let events = Events::watch(node)?;
            start(node, pod)?;
            pod.add_second_veth("net1", 1500)?;
            let before = pod.state()?;
            seen(node, "ip -4 -o addr show dev net1 2>/dev/null | grep -q 10.88.40.2/24", || {
                pod.ip("link set net1 up")?;
                pod.ip("addr add 10.88.40.2/24 dev net1").map(drop)
            })?;
            ensure!(pod.state()?.contains("tap1_kata"), "{}", pod.state()?);
            processes::wait_for(node.tag(), "containerd-shim-kata", Duration::from_secs(5))?.kill()?;
            events.wait_exit("pod", Duration::from_secs(10))?;
            events.wait("/tasks/delete", "pod", Duration::from_secs(10))?;
            node.ctr(["container", "rm", "pod"]).output()?.ok()?;
            pod.ip("addr del 10.88.40.2/24 dev net1")?;
            pod.ip("link set net1 down")?;
            let after = pod.state()?;
            let without_pods = |state: &str| state.replace("tap0_kata", "").contains("_kata");
            ensure!(!without_pods(&after) && !after.contains("_kata"), "before\n{before}\nafter\n{after}");
            ensure!(!after.contains("ingress"), "{after}");
            pod.ip("link del net1").map(drop)
        },
    )
}
