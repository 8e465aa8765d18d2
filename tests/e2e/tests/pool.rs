//! Pods whose VM waited in a pool: what they do not have in common, and that nothing is left whoever dies.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{
    Node, NodeSetup, Outcome, Runtime,
    cri::{Network, with_cri},
    ctr::{Invocation, Running},
    install::Install,
    journal::Journal,
    pod_network::Pod,
    processes::{self, MARK, Process},
    with_node_setup,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// Prints what machines must not share, a line each.
const SELF: &str =
    "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1";
/// The keepers' folders, up to their process ids.
const KEEPERS: &str = "/run/kata-containers/sandboxes/pool@";
/// A machine is made in a second or so; this one may be busy.
const LIMIT: Duration = Duration::from_secs(30);

/// A node with a pool's server.
struct PoolNode<'a> {
    node: &'a Node,
    server: Option<Running>,
    said: Journal,
}

/// A folder for the pool's files, and a configuration with it.
fn configuration(number: i64, is_warm: bool) -> Result<(tempfile::TempDir, NodeSetup)> {
    let own = tempfile::Builder::new().prefix("kepool").tempdir_in("/dev/shm")?;
    let at = |name: &str| toml::Value::from(own.path().join(name).display().to_string());
    let config = Install::locate()?.config_table_with(
        "factory",
        &[
            ("enable_template", is_warm.into()),
            ("template_path", at("templates")),
            ("vm_cache_number", number.into()),
            ("vm_cache_endpoint", at("pool.sock")),
        ],
    )?;
    Ok((own, NodeSetup { config: Some(config), ..NodeSetup::default() }))
}

fn with_pool(number: i64, is_warm: bool, test: impl FnOnce(&mut PoolNode<'_>) -> Result<()>) -> Result<()> {
    let (_own, setup) = configuration(number, is_warm)?;
    with_node_setup(setup, |node| PoolNode::beside(node, test))
}

impl PoolNode<'_> {
    fn beside(node: &Node, test: impl FnOnce(&mut PoolNode<'_>) -> Result<()>) -> Result<()> {
        let mut pool = PoolNode { node, server: None, said: Journal::default() };
        let tested = pool.serve().and_then(|()| test(&mut pool));
        let ended = pool.end();
        tested.and(ended)
    }

    fn command(&self, words: &[&str]) -> Invocation {
        let program = self.node.install().kata_runtime().display().to_string();
        let config = self.node.config().display().to_string();
        Invocation::new(&program, [&["--config", &config, "factory"], words].concat()).env(MARK, self.node.tag())
    }

    /// Starts the server and waits until it has a machine.
    fn serve(&mut self) -> Result<()> {
        let mut server = self.command(&["init"]).limit(Duration::from_secs(600)).spawn()?;
        self.said.follow(server.stdout.take().context("no output")?);
        self.server = Some(server);
        self.wait_ready(0)
    }

    fn wait_ready(&self, from: usize) -> Result<()> {
        let ready = self.said.wait_from(from, LIMIT, |line| line.starts_with("ready: "));
        ready.map(drop).with_context(|| format!("none is ready: {:?}", self.said.lines_from(0)))
    }

    /// As an administrator does.
    fn end(&mut self) -> Result<()> {
        self.command(&["destroy"]).output()?.ok()?;
        self.server.take().map_or(Ok(()), |server| server.finish()?.ok().map(drop))
    }

    fn run(&self, id: &str, options: &[&str], script: &str) -> Result<Outcome> {
        self.node.run(Runtime::Kata, id, options, &["sh", "-c", script]).output()?.ok()
    }

    /// Whether the container that was started since `from` was in a machine of the pool.
    fn is_from_pool(&self, id: &str, from: usize) -> Result<bool> {
        let sandbox = format!("sandbox={id}");
        // the shim's words come by a pipe of their own
        let wanted = |line: &str| line.contains("start-trace step=created") && line.contains(&sandbox);
        self.node.log.wait_from(from, Duration::from_secs(5), wanted).context("no trace of the start")?;
        let lines = self.node.log.lines_from(from);
        let says = |words: &str| lines.iter().any(|line| line.contains(words) && line.contains(&sandbox));
        let (is_taken, is_started) =
            (says("a machine of the pool"), says("step=vmm-started") || says("step=clone-started"));
        ensure!(is_taken != is_started, "both or neither:\n{}", lines.join("\n"));
        Ok(is_taken)
    }
}

/// A machine that waits.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    keeper: i32,
    vmm: i32,
}

impl PoolNode<'_> {
    fn waiting(&self) -> Result<Vec<Waiting>> {
        let status = self.command(&["status"]).output()?.ok()?.text();
        let number = |line: &str, after: &str| line.split(after).nth(1)?.split_whitespace().next()?.parse().ok();
        let one = |line: &str| Some(Waiting { keeper: number(line, "keeper ")?, vmm: number(line, "pid ")? });
        Ok(status.lines().filter_map(one).collect())
    }

    /// The one that a pool of one has, when it has it.
    fn only(&self) -> Result<Waiting> {
        let end = Instant::now() + LIMIT;
        loop {
            if let [one] = self.waiting()?[..] {
                return Ok(one);
            }
            ensure!(Instant::now() < end, "none is ready: {:?}", self.said.lines_from(0));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until so many are ready.
    fn wait_full(&self, number: usize) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while self.waiting()?.len() < number {
            ensure!(Instant::now() < end, "not {number} are ready: {:?}", self.said.lines_from(0));
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Starts a container that stays, in the machine that waits.
    fn take(&self, id: &str) -> Result<Waiting> {
        let (one, from) = (self.only()?, self.node.log.len());
        self.node.detached(Runtime::Kata, id, &[], &["sleep", "1000"])?;
        ensure!(self.is_from_pool(id, from)?, "{id} is not in the machine that waited");
        ensure!(Path::new(&format!("/proc/{}", one.vmm)).exists(), "another machine than the one that waited");
        Ok(one)
    }

    /// Waits until nothing of a machine is there any more.
    fn gone(one: Waiting) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(5);
        let folder = format!("{KEEPERS}{}", one.keeper);
        loop {
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            let is_left = Path::new(&folder).exists() || mounts.contains(&folder) || is_alive(one.vmm);
            if !is_left {
                return Ok(());
            }
            ensure!(Instant::now() < end, "left of {one:?}: {:?}", fs::read_to_string(format!("{folder}/journal")));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How often the log has warned of the pool since `from`.
    fn warnings(&self, from: usize) -> usize {
        let is_one = |line: &&String| line.contains("level=warn") && line.contains("pool");
        self.node.log.lines_from(from).iter().filter(is_one).count()
    }
}

fn is_alive(pid: i32) -> bool {
    // a zombie has none
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
}

#[test]
fn pods_of_the_pool_have_nothing_in_common() -> Result<()> {
    with_pool(2, true, |pool| {
        let again = pool.command(&["init"]).output()?;
        ensure!(again.code != 0 && again.stderr.contains("already exists"), "two servers: {}", again.stderr);
        let mut seen = BTreeSet::new();
        for id in ["a", "b", "c", "d"] {
            pool.wait_full(1)?;
            let from = pool.node.log.len();
            let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
            let shown = pool.run(id, &[], &format!("{SELF}; date +%s; grep warm /proc/mounts; true"))?.text();
            ensure!(pool.is_from_pool(id, from)?, "{id} is not of the pool");
            let lines: Vec<_> = shown.lines().collect();
            // and no mount of the time before the pod
            let [uuid, boot_id, random, now] = lines[..] else { bail!("{shown}") };
            for value in [uuid, boot_id, random] {
                ensure!(seen.insert(value.to_owned()), "{value} is in two machines:\n{shown}");
            }
            let now: u64 = now.parse()?;
            ensure!((before..before + 30).contains(&now), "the clock of {id} says {now}, the host's said {before}");
        }
        // of another size
        let from = pool.node.log.len();
        pool.run("larger", &["--memory-limit", "134217728"], "true")?;
        ensure!(!pool.is_from_pool("larger", from)?, "a machine of the wrong size");
        // its own network, of which the machine had nothing
        pool.wait_full(2)?;
        let (pod, from) = (Pod::make(49, 1500)?, pool.node.log.len());
        let shown = pod.run(pool.node, Runtime::Kata, "net", "ping -c 1 -W 5 10.89.49.1 >/dev/null && echo reached")?;
        ensure!(shown.trim() == "reached", "{shown}");
        ensure!(pool.is_from_pool("net", from)?, "a pod with a network is not of the pool");
        pool.end()?;
        let from = pool.node.log.len();
        pool.run("cold", &[], "true")?;
        ensure!(!pool.is_from_pool("cold", from)?, "from a pool that has ended");
        ensure!(pool.warnings(from) == 1, "{:?}", pool.node.log.lines_from(from));
        Ok(())
    })
}

/// The pod's first container only holds its namespaces, which the others join: nobody may have been the first before.
#[test]
fn a_kubernetes_pod_takes_one() -> Result<()> {
    let (_own, setup) = configuration(1, true)?;
    with_cri(setup, Network::default(), |cri| {
        PoolNode::beside(cri.node, |pool| {
            let from = pool.node.log.len();
            let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": 0}}}});
            let pod = cri.run_pod(Runtime::Kata, "pooled", &shared)?;
            ensure!(pool.is_from_pool(&pod.id, from)?, "the pod is not of the pool");
            let file = cri.node.dir().join("volume").display().to_string();
            fs::write(&file, "from the host")?;
            let mut more = shared.clone();
            more["mounts"] = json!([{"container_path": "/file", "host_path": file}]);
            cri.run(&pod, "one", &["sleep", "54321"], &shared)?;
            let two = cri.run(&pod, "two", &["sleep", "1000"], &more)?;
            let seen = cri.sh(&two, "cat /file; echo written >/file; ps | grep -c '[s]leep 54321'; hostname")?;
            ensure!(seen.starts_with("from the host1") && seen.contains("pooled"), "{seen}");
            ensure!(fs::read_to_string(&file)? == "written\n", "what the guest wrote is not on the host");
            cri.remove(&pod)
        })
    })
}

#[test]
fn whoever_dies_nothing_is_left() -> Result<()> {
    with_pool(1, false, |pool| {
        // a keeper that waits
        let one = pool.only()?;
        send(one.keeper, Signal::SIGKILL)?;
        PoolNode::gone(one)?;

        // one that hands its machine out
        let one = pool.only()?;
        send(one.keeper, Signal::SIGSTOP)?;
        let from = pool.node.log.len();
        let pod = pool.node.run(Runtime::Kata, "left", &[], &["true"]).spawn()?;
        let end = Instant::now() + LIMIT;
        while !pool.waiting()?.is_empty() {
            ensure!(Instant::now() < end, "it is not handed out");
            std::thread::sleep(Duration::from_millis(10));
        }
        send(one.keeper, Signal::SIGKILL)?;
        pod.finish()?.ok()?;
        ensure!(!pool.is_from_pool("left", from)? && pool.warnings(from) == 1, "{:?}", pool.node.log.lines_from(from));
        PoolNode::gone(one)?;

        // one whose machine a pod has: with it the pod ends
        let one = pool.take("kept")?;
        send(one.keeper, Signal::SIGKILL)?;
        let end = Instant::now() + LIMIT;
        while pool.node.status("kept")?.as_deref() == Some("RUNNING") {
            ensure!(Instant::now() < end, "the pod lives on");
            std::thread::sleep(Duration::from_millis(20));
        }
        pool.node.remove("kept")?;
        PoolNode::gone(one)?;

        // a pod's shim
        let one = pool.take("shimless")?;
        let is_shim = |process: &Process| process.name == "containerd-shim-kata-v2";
        processes::of_node(pool.node.tag()).into_iter().find(is_shim).context("no shim")?.kill()?;
        PoolNode::gone(one)?;
        let end = Instant::now() + LIMIT;
        while pool.node.status("shimless")?.as_deref() == Some("RUNNING") {
            ensure!(Instant::now() < end, "containerd does not see it");
            std::thread::sleep(Duration::from_millis(20));
        }
        pool.node.ctr(["container", "rm", "shimless"]).output()?.ok()?;

        // the server: what waits goes, and what pods have goes on
        let taken = pool.take("goes-on")?;
        let waits = pool.only()?;
        let server = pool.server.take().context("no server")?;
        kill(server.pid(), Signal::SIGKILL)?;
        let _ = server.finish();
        PoolNode::gone(waits)?;
        let said = pool.node.exec("goes-on", "x", &[], &["echo", "alive"]).output()?.ok()?.text();
        ensure!(said == "alive", "{said}");
        let from = pool.node.log.len();
        pool.run("cold", &[], "true")?;
        ensure!(!pool.is_from_pool("cold", from)?, "from a dead pool");
        pool.node.remove("goes-on")?;
        PoolNode::gone(taken)
    })
}
