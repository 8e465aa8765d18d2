//! A kubelet by itself: no API server, pods from files in a folder. Its pods have the node's default runtime, since
//! a RuntimeClass is an object of the API server's.

use crate::{
    Containerd, Node, NodeSetup, Runtime,
    containerd::client,
    cri::{Cri, Network, with_cri},
    ports,
    processes::MARK,
    world,
};
use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Where it answers without TLS.
const PORT: u16 = 10255;

/// How long a pod may take for what it is to do.
const LIMIT: Duration = Duration::from_secs(180);

/// One that runs, in a world of its own.
#[derive(Debug)]
pub struct Kubelet<'a> {
    /// Its containerd, by CRI.
    pub cri: &'a Cri<'a>,
    dir: PathBuf,
    process: Child,
}

/// Runs `test` with a kubelet whose pods have this runtime; fails also when anything is left behind.
pub fn with_kubelet(runtime: Runtime, test: impl FnOnce(&Kubelet<'_>) -> Result<()> + Send) -> Result<()> {
    let is_kata_default = runtime == Runtime::Kata;
    let setup = NodeSetup { containerd: Containerd::V2, is_kata_default, ..NodeSetup::default() };
    world::in_a_world(|| {
        with_cri(setup, Network::default(), |cri| {
            let kubelet = Kubelet::start(cri)?;
            let tested = test(&kubelet).with_context(|| kubelet.last_words());
            drop(kubelet);
            // the groups of its classes of service are there for the next kubelet
            remove_groups();
            tested
        })
    })
}

/// The folder of containerd's namespace is there anyway.
const GROUP: &str = crate::node::CRI_NAMESPACE;

fn remove_groups() {
    for controller in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        remove_group(&controller.path().join(GROUP).join("kubepods"));
    }
}

/// A kubelet that ends leaves a pod's empty group for the next one to remove. One with processes cannot be removed.
fn remove_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

impl<'a> Kubelet<'a> {
    fn start(cri: &'a Cri<'a>) -> Result<Self> {
        let node: &Node = cri.node;
        let dir = node.dir().join("kubelet");
        fs::create_dir_all(dir.join("pods"))?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "staticPodPath": dir.join("pods"),
            "containerRuntimeEndpoint": format!("unix://{}", node.address()),
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{GROUP}"), "failCgroupV1": false,
            "failSwapOn": false, "readOnlyPort": PORT, "enableServer": true,
            "volumePluginDir": dir.join("plugins"), "localStorageCapacityIsolation": false, "enforceNodeAllocatable": ["pods"],
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "fileCheckFrequency": "1s", "syncFrequency": "5s",
            "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
        });
        for controller in fs::read_dir("/sys/fs/cgroup")?.flatten() {
            // its root must be there; `unified` has no controllers here
            let _ = fs::create_dir(controller.path().join(GROUP));
        }
        fs::write(dir.join("config.json"), config.to_string())?;
        let log = File::create(dir.join("log"))?;
        let process = Command::new(client("kubelet")?.join("kubelet"))
            .arg("--config")
            .arg(dir.join("config.json"))
            .arg("--root-dir")
            .arg(dir.join("root"))
            .args(["--hostname-override", "kata-e2e", "--v", "2"])
            .env("HOME", node.dir())
            .env(MARK, node.tag())
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting kubelet")?;
        let mut this = Self { cri, dir, process };
        let end = Instant::now() + Duration::from_secs(60);
        while ports::get_path("127.0.0.1", PORT, "/pods").is_err() {
            if let Some(ended) = this.process.try_wait()? {
                bail!("kubelet ended, {ended}: {}", this.last_words());
            }
            ensure!(Instant::now() < end, "kubelet does not serve: {}", this.last_words());
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(this)
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().filter(|line| line.starts_with(['E', 'W', 'F'])).collect();
        format!("kubelet's last words:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"))
    }

    /// Gives it a pod of the test image's containers.
    pub fn add(&self, name: &str, spec: &Value) -> Result<()> {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "e2e", "labels": {"of": "test"}},
            "spec": spec,
        });
        fs::write(self.dir.join("draft"), pod.to_string())?;
        Ok(fs::rename(self.dir.join("draft"), self.dir.join("pods").join(format!("{name}.json")))?)
    }

    /// Takes it away, and waits until all of it has gone.
    pub fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.dir.join("pods").join(format!("{name}.json")))?;
        self.until(|| {
            let left = self.cri.say(["pods", "-q", "--name", name, "--state", "ready"])?;
            Ok((left.is_empty(), left))
        })
        .with_context(|| format!("{name} is to go"))
        .map(drop)
    }

    /// What it says of a pod.
    pub fn pod(&self, name: &str) -> Result<Value> {
        let all: Value = serde_json::from_str(&ports::get_path("127.0.0.1", PORT, "/pods")?)?;
        let pods = all["items"].as_array().cloned().unwrap_or_default();
        let full = format!("{name}-kata-e2e");
        Ok(pods.into_iter().find(|pod| pod["metadata"]["name"] == full.as_str()).unwrap_or_default())
    }

    /// Waits until what it says of a pod is so.
    pub fn wait(&self, name: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
        let shown = self.until(|| {
            let pod = self.pod(name)?;
            Ok((is_so(&pod), pod["status"].to_string()))
        })?;
        serde_json::from_str(&shown).with_context(|| name.to_owned())
    }

    /// Asks until the answer is good; kubelet tells such things only to those who ask.
    pub fn until(&self, ask: impl Fn() -> Result<(bool, String)>) -> Result<String> {
        let end = Instant::now() + LIMIT;
        loop {
            match ask()? {
                (true, answer) => return Ok(answer),
                (false, answer) if Instant::now() > end => bail!("not within {LIMIT:?}: {answer}"),
                _ => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }
}

impl Drop for Kubelet<'_> {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM);
        let _ = self.process.wait();
    }
}
