//! A network namespace as CNI's bridge plugin leaves it, and a look at it before and after.

use crate::{Node, NodeSetup, Runtime, ctr::Invocation, install::Install, with_node_setup};
use anyhow::{Context as _, Result, ensure};
use std::time::{Duration, Instant};

/// How the product brings interfaces into the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// `internetworking_model = "tcfilter"`, the default.
    TcFilter,
    /// `internetworking_model = "macvtap"`.
    MacVtap,
}

/// Makes a test of each function with one argument, the model, for both of them.
#[macro_export]
macro_rules! for_both_models {
    ($($name:ident),* $(,)?) => {
        mod tcfilter {
            $(#[test] fn $name() -> anyhow::Result<()> { super::$name($crate::pod_network::Model::TcFilter) })*
        }
        mod macvtap {
            $(#[test] fn $name() -> anyhow::Result<()> { super::$name($crate::pod_network::Model::MacVtap) })*
        }
    };
}

/// Runs `ip` with these arguments, separated by blanks.
pub fn ip(line: &str) -> Result<String> {
    Ok(Invocation::new("ip", line.split_whitespace()).output()?.ok()?.text())
}

/// A bridge of the host and a namespace, with a veth as `eth0` between them or with nothing.
#[derive(Debug)]
pub struct Pod {
    /// The namespace's name.
    pub namespace: String,
    /// The bridge's name; it has the addresses `10.89.N.1` and `fd89:N::1`.
    pub bridge: String,
    network: u8,
    kept: Vec<Box<dyn std::any::Any>>,
}

impl Pod {
    /// Without an interface but `lo`. `network` is the N of its addresses.
    pub fn bare(network: u8, mtu: u32) -> Result<Self> {
        let pod =
            Self { namespace: format!("ke{network}"), bridge: format!("kebr{network}"), network, kept: Vec::new() };
        pod.unmake();
        let Self { namespace, bridge, .. } = &pod;
        for line in [
            format!("netns add {namespace}"),
            format!("link add {bridge} mtu {mtu} type bridge"),
            format!("addr add 10.89.{network}.1/24 dev {bridge}"),
            format!("addr add fd89:{network}::1/64 dev {bridge} nodad"),
            format!("link set {bridge} up"),
            format!("-n {namespace} link set lo up"),
        ] {
            ip(&line)?;
        }
        Ok(pod)
    }

    /// Holds something for as long as the namespace is there.
    pub fn keep(&mut self, thing: impl std::any::Any) {
        self.kept.push(Box::new(thing));
    }

    /// With `eth0`, `10.89.N.2` and `fd89:N::2`, and routes.
    pub fn make(network: u8, mtu: u32) -> Result<Self> {
        let pod = Self::bare(network, mtu)?;
        pod.add_veth("eth0", mtu)?;
        for line in [
            format!("addr add 10.89.{network}.2/24 brd + dev eth0"),
            format!("addr add fd89:{network}::2/64 dev eth0 nodad"),
            "link set eth0 up".into(),
            format!("route add default via 10.89.{network}.1"),
            format!("route add 10.90.0.0/16 via 10.89.{network}.1 metric 50 mtu 1300"),
            "route add 10.91.0.1/32 dev eth0 scope link".into(),
            format!("-6 route add default via fd89:{network}::1"),
        ] {
            pod.ip(&line)?;
        }
        Ok(pod)
    }

    /// A veth with that name in the namespace and the other end at the bridge.
    pub fn add_veth(&self, name: &str, mtu: u32) -> Result<()> {
        self.add_veth_at(&self.bridge, name, mtu)
    }

    /// A veth with that name in the namespace and the other end at a second bridge, which has the address `10.88.N.1`:
    /// two interfaces at the same one would answer for each other.
    pub fn add_second_veth(&self, name: &str, mtu: u32) -> Result<()> {
        let second = self.second_bridge();
        if ip(&format!("link show dev {second}")).is_err() {
            ip(&format!("link add {second} type bridge"))?;
            ip(&format!("addr add 10.88.{}.1/24 dev {second}", self.network))?;
            ip(&format!("link set {second} up"))?;
        }
        self.add_veth_at(&second, name, mtu)
    }

    fn second_bridge(&self) -> String {
        format!("kebs{}", self.network)
    }

    fn add_veth_at(&self, bridge: &str, name: &str, mtu: u32) -> Result<()> {
        let Self { namespace, network, .. } = self;
        // the host's end: every one has a name of its own
        let end = format!("ke{network}{name}").chars().take(15).collect::<String>();
        ip(&format!("link add {end} mtu {mtu} type veth peer name {name} netns {namespace} mtu {mtu}"))?;
        ip(&format!("link set {end} master {bridge} up")).map(drop)
    }

    /// `ip` inside the namespace.
    pub fn ip(&self, line: &str) -> Result<String> {
        ip(&format!("-n {} {line}", self.namespace))
    }

    fn unmake(&self) {
        // veths go with the namespace; at once, while the namespace itself may take its time
        for link in ip(&format!("-n {} -o link show", self.namespace)).unwrap_or_default().lines() {
            let name = link.split(':').nth(1).and_then(|name| name.trim().split('@').next());
            if let Some(name) = name.filter(|name| *name != "lo") {
                let _ = self.ip(&format!("link del {name}"));
            }
        }
        let _ = ip(&format!("netns del {}", self.namespace));
        for bridge in [self.bridge.clone(), self.second_bridge()] {
            let _ = ip(&format!("link del {bridge}"));
        }
    }

    /// For `ctr run`.
    pub fn options(&self) -> [String; 2] {
        ["--with-ns".into(), format!("network:/run/netns/{}", self.namespace)]
    }

    /// Links, addresses, routes and queueing disciplines in the namespace.
    pub fn state(&self) -> Result<String> {
        let qdiscs = Invocation::new("tc", ["-n", &self.namespace, "qdisc", "show"]).output()?.ok()?.text();
        let show = |line: &str| self.ip(line).map(|text| text + "\n");
        let all = show("-o link show")? + &show("-o addr show")? + &show("route show")? + &show("-6 route show")?;
        // the kernel makes these, and says that a link is up, in its own time
        let all = all.replace(" state UNKNOWN ", " state UP ");
        let mut lines: Vec<_> = all.lines().chain(qdiscs.lines()).filter(|line| !line.contains("fe80:")).collect();
        lines.sort_unstable();
        Ok(lines.join("\n"))
    }

    /// Runs a script to its end in a container that has the namespace.
    pub fn run(&self, node: &Node, runtime: Runtime, id: &str, script: &str) -> Result<String> {
        let options = self.options();
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        Ok(node.run(runtime, id, &options, &["sh", "-c", script]).output()?.ok()?.text())
    }

    /// Starts a container that has the namespace, and may change the guest's network, and runs until it is removed.
    pub fn start(&self, node: &Node, id: &str) -> Result<()> {
        let options = self.options();
        let options: Vec<_> = options.iter().map(String::as_str).chain(["--cap-add", "CAP_NET_ADMIN"]).collect();
        node.detached(Runtime::Kata, id, &options, &["sleep", "10000"]).map(drop)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.unmake();
    }
}

/// Makes `change`, and waits in the container until `condition`, a shell's, is true there. Returns how long that took from
/// the change on.
pub fn seen_in(node: &Node, id: &str, condition: &str, change: impl FnOnce() -> Result<()>) -> Result<Duration> {
    // the guest shows no event to a shell, so this one looks again and again
    let script = format!("echo watching; until {condition}; do usleep 20000; done");
    let exec = format!("w{}", std::process::id());
    let mut watcher = node.exec(id, &exec, &[], &["sh", "-c", &script]).limit(Duration::from_secs(30)).spawn()?;
    let mut stdout = watcher.stdout.take().context("no stdout")?;
    let mut said = [0; 9];
    std::io::Read::read_exact(&mut stdout, &mut said).context("the watcher in the guest")?;
    let begin = Instant::now();
    change()?;
    let outcome = watcher.finish().with_context(|| format!("waiting for {condition}"));
    let took = begin.elapsed();
    if let Err(error) = outcome.and_then(crate::Outcome::ok) {
        let shown = node.exec(id, "shown", &[], &["sh", "-c", "ip addr; ip route; ip neigh"]).output()?.text();
        return Err(error.context(format!("the guest has\n{shown}")));
    }
    Ok(took)
}

impl Model {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::TcFilter, Self::MacVtap];

    /// The installed configuration with this model.
    pub fn config(self) -> Result<String> {
        let name = match self {
            Self::TcFilter => "tcfilter",
            Self::MacVtap => "macvtap",
        };
        Install::locate()?.config_table_with("runtime", &[("internetworking_model", name.into())])
    }
}

/// Runs `test` on a node with that model.
pub fn with_model(model: Model, test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    with_node_setup(NodeSetup { config: Some(model.config()?), ..NodeSetup::default() }, test)
}

/// Runs `test` on a node with that model and with a pod, which must be in the end as it was before.
pub fn with_pod(
    model: Model,
    pod: impl FnOnce() -> Result<Pod>,
    test: impl FnOnce(&Node, &Pod) -> Result<()>,
) -> Result<()> {
    with_model(model, |node| {
        let pod = pod()?;
        let before = pod.state()?;
        test(node, &pod)?;
        let after = pod.state()?;
        ensure!(before == after, "the namespace before:\n{before}\nand after:\n{after}");
        Ok(())
    })
}
