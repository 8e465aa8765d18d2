//! Kinds of interfaces other than veth, and veths with a peculiarity.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Runtime, for_both_models,
    pod_network::{Model, Pod, ip, seen_in, with_pod},
    tap::Carrier,
};
use std::time::Duration;

for_both_models!(
    a_macvlan_is_as_with_runc,
    an_ipvlan_is_as_with_runc,
    a_vlan_is_as_with_runc,
    a_dummy_is_as_with_runc,
    one_on_top_of_another_is_refused,
    a_tap_of_a_program_is_as_with_runc,
    two_cards_with_one_mac_address_are_told_apart,
    nobody_is_asked_where_nobody_answers,
);

/// A link of the host that goes with the test.
struct Link(String);

impl Link {
    fn add(line: &str) -> Result<Self> {
        let name = line.split_whitespace().next().context("no name")?.to_owned();
        let _ = ip(&format!("link del {name}"));
        ip(&format!("link add {line}"))?;
        Ok(Self(name))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = ip(&format!("link del {}", self.0));
    }
}

/// A wire to the pod's bridge, for interfaces that need one of the host below them.
fn uplink(pod: &Pod, name: &str) -> Result<Link> {
    let link = Link::add(&format!("{name} type veth peer name {name}b"))?;
    ip(&format!("link set {name}b master {} up", pod.bridge))?;
    ip(&format!("link set {name} up"))?;
    Ok(link)
}

const LOOK: &str = "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip -4 -o addr show dev eth0 | \
                    sed 's/^[0-9]*: //; s/ *valid_lft.*//'; ip route";

/// An interface on top of one of the host's, from the start on and later.
fn on_top(model: Model, network: u8, kind: &str) -> Result<()> {
    let address = |pod: &Pod, name: &str, host: u8| -> Result<()> {
        pod.ip(&format!("addr add 10.89.{network}.{host}/24 brd + dev {name}"))?;
        pod.ip(&format!("link set {name} up")).map(drop)
    };
    let make = || {
        let mut pod = Pod::bare(network, 1500)?;
        pod.keep(uplink(&pod, &format!("keup{network}"))?);
        ip(&format!("link add link keup{network} name eth0 netns {} {kind}", pod.namespace))?;
        address(&pod, "eth0", 2)?;
        pod.ip(&format!("route add default via 10.89.{network}.1"))?;
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        let shown = [Runtime::Runc, Runtime::Kata].map(|runtime| pod.run(node, runtime, runtime.tag(), LOOK));
        let [runc, kata] = shown;
        let (runc, kata) = (runc?, kata?);
        ensure!(runc == kata, "runc:\n{runc}\nkata:\n{kata}");
        pod.start(node, "pod")?;
        let gateway = format!("10.89.{network}.1");
        let ping = ["ping", "-c", "2", "-W", "3", &gateway];
        node.exec("pod", "ping", &[], &ping).output()?.ok()?;
        // and one more
        seen_in(node, "pod", &format!("ip -4 -o addr show dev net1 | grep -q 10.89.{network}.3/24"), || {
            ip(&format!("link add link keup{network} name net1 netns {} {kind}", pod.namespace))?;
            address(pod, "net1", 3)
        })?;
        seen_in(node, "pod", "! test -e /sys/class/net/net1", || pod.ip("link del net1").map(drop))?;
        node.exec("pod", "ping", &[], &ping).output()?.ok()?;
        node.remove("pod")
    })
}

fn a_macvlan_is_as_with_runc(model: Model) -> Result<()> {
    on_top(model, 51, "type macvlan mode bridge")
}

/// Whether the host's kernel has that kind of link; `make nested` makes a host whose kernel has all.
fn has(kind: &str) -> Result<bool> {
    let _below = Link::add("keprobe type veth peer name keprobeb")?;
    let on = if kind.contains("dummy") { "" } else { "link keprobe" };
    match Link::add(&format!("keprobei {on} {kind}")) {
        Ok(_) => Ok(true),
        Err(error) => {
            ensure!(format!("{error:#}").contains("Unknown device type"), "{error:#}");
            eprintln!("skipped: the kernel of this host has no {kind}");
            Ok(false)
        }
    }
}

fn an_ipvlan_is_as_with_runc(model: Model) -> Result<()> {
    let kind = "type ipvlan mode l2";
    if has(kind)? { on_top(model, 52, kind) } else { Ok(()) }
}

fn a_vlan_is_as_with_runc(model: Model) -> Result<()> {
    if !has("type vlan id 5")? {
        return Ok(());
    }
    let make = || {
        let mut pod = Pod::bare(56, 1500)?;
        pod.keep(uplink(&pod, "keup56")?);
        pod.keep(Link::add(&format!("kevl56 link {} type vlan id 5", pod.bridge))?);
        ip("addr add 10.88.56.1/24 dev kevl56")?;
        ip("link set kevl56 up")?;
        ip(&format!("link add link keup56 name eth0 netns {} type vlan id 5", pod.namespace))?;
        pod.ip("addr add 10.88.56.2/24 brd + dev eth0")?;
        pod.ip("link set eth0 up")?;
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        let [runc, kata] = [Runtime::Runc, Runtime::Kata].map(|runtime| pod.run(node, runtime, runtime.tag(), LOOK));
        let (runc, kata) = (runc?, kata?);
        ensure!(runc == kata, "runc:\n{runc}\nkata:\n{kata}");
        let shown = pod.run(node, Runtime::Kata, "ping", "ping -c 3 -W 3 10.88.56.1")?;
        ensure!(shown.contains(" 0% packet loss"), "{shown}");
        Ok(())
    })
}

fn a_dummy_is_as_with_runc(model: Model) -> Result<()> {
    if !has("type dummy")? {
        return Ok(());
    }
    let make = || {
        let pod = Pod::make(57, 1500)?;
        pod.ip("link add net1 type dummy")?;
        pod.ip("addr add 10.88.57.2/24 brd + dev net1")?;
        pod.ip("link set net1 up")?;
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        let look = LOOK.replace("eth0", "net1") + "; ping -c 1 -W 3 10.88.57.2 | grep packets";
        let [runc, kata] = [Runtime::Runc, Runtime::Kata].map(|runtime| pod.run(node, runtime, runtime.tag(), &look));
        let (runc, kata) = (runc?, kata?);
        ensure!(runc == kata, "runc:\n{runc}\nkata:\n{kata}");
        Ok(())
    })
}

fn one_on_top_of_another_is_refused(model: Model) -> Result<()> {
    with_pod(
        model,
        || Pod::make(58, 1500),
        |node, pod| {
            pod.ip("link add link eth0 name top type macvlan mode bridge")?;
            pod.ip("addr add 10.88.58.2/24 dev top")?;
            let options = pod.options();
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            let refused = node.run(Runtime::Kata, "top", &options, &["true"]).output()?;
            pod.ip("link del top")?;
            ensure!(refused.code != 0 && refused.stderr.contains("top is on top of eth0"), "{}", refused.stderr);
            Ok(())
        },
    )
}

fn a_tap_of_a_program_is_as_with_runc(model: Model) -> Result<()> {
    let make = || {
        let mut pod = Pod::bare(53, 1500)?;
        pod.keep(Carrier::start(&pod.namespace, "eth0", "ketap53")?);
        ip(&format!("link set ketap53 master {} up", pod.bridge))?;
        pod.ip("addr add 10.89.53.2/24 brd + dev eth0")?;
        pod.ip("link set eth0 up")?;
        pod.ip("route add default via 10.89.53.1")?;
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        let [runc, kata] = [Runtime::Runc, Runtime::Kata].map(|runtime| pod.run(node, runtime, runtime.tag(), LOOK));
        let (runc, kata) = (runc?, kata?);
        ensure!(runc == kata, "runc:\n{runc}\nkata:\n{kata}");
        let shown = pod.run(node, Runtime::Kata, "ping", "ping -c 3 -W 3 10.89.53.1")?;
        ensure!(shown.contains(" 0% packet loss"), "{shown}");
        Ok(())
    })
}

/// As ipvlans of one interface have; the guest knows them by their places.
fn two_cards_with_one_mac_address_are_told_apart(model: Model) -> Result<()> {
    const MAC: &str = "02:00:00:00:54:01";
    let add = |pod: &Pod, name: &str| {
        pod.ip(&format!("link set {name} address {MAC}"))?;
        pod.ip(&format!("link set {name} up")).map(drop)
    };
    let make = || {
        let pod = Pod::bare(54, 1500)?;
        for (name, address) in [("eth0", "10.89.54.2/24"), ("net1", "10.88.54.2/24")] {
            if name == "eth0" {
                pod.add_veth(name, 1500)?;
            } else {
                pod.add_second_veth(name, 1400)?;
            }
            pod.ip(&format!("addr add {address} dev {name}"))?;
            add(&pod, name)?;
        }
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        pod.start(node, "pod")?;
        let script = "ping -c 1 -W 3 -I eth0 10.89.54.1 && ping -c 1 -W 3 -I net1 10.88.54.1 && \
                      cat /sys/class/net/eth0/mtu /sys/class/net/net1/mtu /sys/class/net/*/address";
        let shown = node.exec("pod", "two", &[], &["sh", "-c", script]).output()?.ok()?.text();
        ensure!(shown.contains("\n1500\n1400\n") && shown.matches(MAC).count() == 2, "{shown}");
        // and a third one later
        seen_in(node, "pod", "ip -4 -o addr show dev net2 | grep -q 10.88.54.3/24", || {
            pod.add_second_veth("net2", 1300)?;
            pod.ip("addr add 10.88.54.3/24 dev net2")?;
            add(pod, "net2")
        })?;
        let script = "cat /sys/class/net/eth0/mtu /sys/class/net/net1/mtu /sys/class/net/net2/mtu";
        let shown = node.exec("pod", "three", &[], &["sh", "-c", script]).output()?.ok()?.text();
        ensure!(shown == "1500\n1400\n1300", "{shown}");
        seen_in(node, "pod", "! test -e /sys/class/net/net2", || pod.ip("link del net2").map(drop))?;
        let pings = ["ping", "-c", "1", "-W", "3", "-I", "net1", "10.88.54.1"];
        node.exec("pod", "ping", &[], &pings).output()?.ok()?;
        node.remove("pod")
    })
}

/// An interface with the flag NOARP, as ipvlan has it in its modes l3 and l3s.
fn nobody_is_asked_where_nobody_answers(model: Model) -> Result<()> {
    let make = || {
        let pod = Pod::make(55, 1500)?;
        pod.ip("link set eth0 arp off")?;
        let mac = |line: &str| -> Result<String> {
            let words = line.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
            Ok(words.context("no MAC address")?.to_owned())
        };
        let (ours, theirs) =
            (mac(&ip(&format!("-o link show dev {}", pod.bridge))?)?, mac(&pod.ip("-o link show dev eth0")?)?);
        pod.ip(&format!("neigh add 10.89.55.1 lladdr {ours} dev eth0 nud permanent"))?;
        ip(&format!("neigh add 10.89.55.2 lladdr {theirs} dev {} nud permanent", pod.bridge))?;
        Ok(pod)
    };
    with_pod(model, make, |node, pod| {
        pod.start(node, "pod")?;
        let shown = node.exec("pod", "show", &[], &["ip", "link", "show", "dev", "eth0"]).output()?.ok()?.text();
        ensure!(shown.contains("NOARP"), "{shown}");
        let pings = ["ping", "-c", "2", "-W", "3", "10.89.55.1"];
        node.exec("pod", "ping", &[], &pings).output()?.ok()?;
        let took = seen_in(node, "pod", "! ip link show dev eth0 | grep -q NOARP", || {
            pod.ip("link set eth0 arp on").map(drop)
        })?;
        ensure!(took < Duration::from_secs(2), "{took:?}");
        node.remove("pod")?;
        pod.ip("link set eth0 arp off").map(drop)
    })
}
