//! Pods as Kubernetes makes them: `crictl` against the node's containerd, with CNI's own plugins for the network.

use crate::{
    Containerd, Node, NodeSetup, Runtime, containerd::client, ctr::Invocation, every_containerd, image,
    pod_network::Model, with_node_setup,
};
use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// The bridge that CNI makes for the pods of a test.
pub const BRIDGE: &str = "kecri0";

/// The bridge's own addresses: the host as pods see it.
pub const HOST: (&str, &str) = ("10.88.77.1", "fd88:77::1");

/// Where Debian has CNI's plugins.
pub(crate) const PLUGINS: &str = "/usr/lib/cni";

/// Talks to one node.
#[derive(Debug)]
pub struct Cri<'a> {
    /// The node.
    pub node: &'a Node,
    crictl: PathBuf,
    count: AtomicU32,
}

/// One pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its sandbox's id.
    pub id: String,
    config: PathBuf,
}

/// What a pod's network is to be.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// Of bridge and interfaces.
    pub mtu: u32,
    /// Whether CNI gives addresses; without, it makes interfaces only.
    pub addresses: bool,
}

impl Default for Network {
    fn default() -> Self {
        Self { mtu: 1500, addresses: true }
    }
}

/// Runs `test` on a node with CRI, and fails also when anything is left behind.
pub fn with_cri(setup: NodeSetup, network: Network, test: impl FnOnce(&Cri<'_>) -> Result<()>) -> Result<()> {
    with_node_setup(NodeSetup { cri: true, ..setup }, |node| {
        let crictl = client("cri-tools")?.join("crictl");
        if !Path::new(PLUGINS).join("bridge").is_file() {
            bail!("{PLUGINS}/bridge: not found: run `apt-get install containernetworking-plugins`");
        }
        write_cni(node, network)?;
        let cri = Cri { node, crictl, count: AtomicU32::new(0) };
        let tested = test(&cri);
        let ended = cri.crictl(["rmp", "--all", "--force"]).output().and_then(crate::Outcome::ok);
        let _ = Invocation::new("ip", ["link", "del", BRIDGE]).output();
        tested.and(ended.map(drop))
    })
}

/// The text that makes containerd serve CRI with both runtimes.
pub(crate) fn settings(containerd: Containerd, dir: &Path, default: Runtime) -> String {
    let (cri, pause, plugins) = match containerd {
        Containerd::Debian | Containerd::V1_7 => {
            let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
            (cri, format!("[{cri}]\nsandbox_image = {:?}\n", image::PAUSE), format!("bin_dir = {PLUGINS:?}"))
        }
        Containerd::V2 => {
            let cri = "plugins.\"io.containerd.cri.v1.runtime\"";
            let images = "plugins.\"io.containerd.cri.v1.images\"";
            let pause = format!("[{images}.pinned_images]\nsandbox = {:?}\n[{cri}]\n", image::PAUSE);
            (cri, pause, format!("bin_dirs = [{PLUGINS:?}]"))
        }
    };
    let mut text = format!(
        "{pause}disable_apparmor = true\n\
         restrict_oom_score_adj = true\n\
         [{cri}.cni]\n{plugins}\nconf_dir = {:?}\n\
         [{cri}.containerd]\ndefault_runtime_name = {:?}\n",
        dir.join("cni").display().to_string(),
        default.tag(),
    );
    for runtime in crate::BOTH {
        let (tag, name, guest_only) = (runtime.tag(), runtime.name(), runtime == Runtime::Kata);
        let table = format!("[{cri}.containerd.runtimes.{tag}]");
        text +=
            &[table, format!("runtime_type = {name:?}"), format!("privileged_without_host_devices = {guest_only}\n")]
                .join("\n");
    }
    text
}

fn write_cni(node: &Node, network: Network) -> Result<()> {
    let dir = node.dir().join("cni");
    fs::create_dir_all(&dir)?;
    let range = |subnet: &str, gateway: &str| json!([{"subnet": subnet, "gateway": gateway}]);
    let addresses = json!({
        "type": "host-local", "dataDir": node.dir().join("cni-leases"),
        "ranges": [range("10.88.77.0/24", HOST.0), range("fd88:77::/64", HOST.1)],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    });
    let list = json!({
        "cniVersion": "0.4.0", "name": "kata-e2e",
        "plugins": [
            {
                "type": "bridge", "bridge": BRIDGE, "isGateway": network.addresses, "ipMasq": false, "mtu": network.mtu,
                "ipam": if network.addresses { addresses } else { json!({}) },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    // a draft first: containerd watches the folder
    fs::write(dir.join("draft"), list.to_string())?;
    fs::rename(dir.join("draft"), dir.join("10-kata.conflist"))?;
    Ok(())
}

impl Cri<'_> {
    /// `crictl` with these arguments.
    pub fn crictl<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        let mut all = self.arguments();
        all.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        Invocation::new(&self.crictl.display().to_string(), all)
    }

    /// The program, for those that give it a terminal.
    pub fn program(&self) -> String {
        self.crictl.display().to_string()
    }

    /// What `crictl` needs before its command.
    pub fn arguments(&self) -> Vec<String> {
        let address = format!("unix://{}", self.node.address());
        vec!["-r".into(), address.clone(), "-i".into(), address, "--timeout".into(), "60s".into()]
    }

    /// What `crictl` prints, which must succeed.
    pub fn say<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        Ok(self.crictl(args).output()?.ok()?.text())
    }

    fn file(&self, name: &str, content: &Value) -> Result<PathBuf> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let path = self.node.dir().join(format!("{name}-{count}.json"));
        fs::write(&path, content.to_string())?;
        Ok(path)
    }

    /// The configuration of a pod, with `more` put over it.
    pub fn pod_config(&self, name: &str, more: &Value) -> Result<PathBuf> {
        let mut config = json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "namespace": "e2e", "attempt": 1},
            "hostname": name,
            "log_directory": self.node.dir().join("logs").join(name),
            "linux": {},
        });
        merge(&mut config, more);
        self.file("pod", &config)
    }

    /// Runs a pod's sandbox.
    pub fn run_pod(&self, runtime: Runtime, name: &str, more: &Value) -> Result<Pod> {
        let config = self.pod_config(name, more)?;
        let path = config.display().to_string();
        let id = self.say(["runp", "--runtime", runtime.tag(), &path])?;
        Ok(Pod { id, config })
    }

    /// Makes a container of the test image in a pod.
    pub fn create(&self, pod: &Pod, name: &str, command: &[&str], more: &Value) -> Result<String> {
        self.try_create(pod, name, command, more)?.ok().map(|done| done.text())
    }

    /// As `create`, with whatever comes of it.
    pub fn try_create(&self, pod: &Pod, name: &str, command: &[&str], more: &Value) -> Result<crate::Outcome> {
        let mut config = json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": image::NAME},
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        merge(&mut config, more);
        let config = self.file("container", &config)?.display().to_string();
        self.crictl(["create", &pod.id, &config, &pod.config.display().to_string()]).output()
    }

    /// Makes and starts one.
    pub fn run(&self, pod: &Pod, name: &str, command: &[&str], more: &Value) -> Result<String> {
        let id = self.create(pod, name, command, more)?;
        self.say(["start", &id])?;
        Ok(id)
    }

    /// What a shell script in a running container prints, by `crictl exec --sync`.
    pub fn sh(&self, container: &str, script: &str) -> Result<String> {
        let args = ["exec", "--sync", container, "sh", "-c", script];
        Ok(self.crictl(args).limit(Duration::from_secs(120)).output()?.ok()?.text())
    }

    /// The container's log once it has `text`.
    pub fn logs_with(&self, container: &str, text: &str) -> Result<String> {
        Self::until(|| {
            let logs = self.crictl(["logs", container]).output()?.ok()?;
            let all = format!("{}\n{}", logs.text(), logs.stderr);
            Ok((all.contains(text), all))
        })
    }

    /// What `inspect` shows once the container has ended.
    pub fn wait_exited(&self, container: &str) -> Result<String> {
        self.wait_shown(container, "CONTAINER_EXITED")
    }

    /// What `inspect` shows once `words` are in it.
    pub fn wait_shown(&self, container: &str, words: &str) -> Result<String> {
        Self::until(|| {
            let shown = self.say(["inspect", container])?;
            Ok((shown.contains(words), shown))
        })
    }

    /// Asks until the answer is good; CRI tells such things only to those who ask.
    ///
    /// # Errors
    /// The last answer, when 20 seconds have passed.
    pub fn until(ask: impl Fn() -> Result<(bool, String)>) -> Result<String> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match ask()? {
                (true, answer) => return Ok(answer),
                (false, answer) if Instant::now() > end => bail!("not within 20 s: {answer}"),
                _ => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Takes a pod away with all that is in it.
    pub fn remove(&self, pod: &Pod) -> Result<()> {
        self.say(["stopp", &pod.id])?;
        self.say(["rmp", &pod.id])?;
        Ok(())
    }

    /// `crictl inspect` or `inspectp`, parsed.
    pub fn inspect(&self, what: &str, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.say([what, id])?)?)
    }

    /// The pod's addresses, IPv4 first.
    pub fn addresses(&self, pod: &Pod) -> Result<(String, String)> {
        let shown = self.inspect("inspectp", &pod.id)?;
        let text = |at: &str| shown.pointer(at).and_then(Value::as_str).map(str::to_owned);
        let first = text("/status/network/ip").filter(|ip| !ip.is_empty());
        let more = text("/status/network/additionalIps/0/ip");
        first.zip(more).with_context(|| format!("two addresses of the pod in {shown}"))
    }
}

/// With each containerd and with each way into the VM, but not with every pair of them, unless `KATA_POD_MATRIX` is set.
pub fn with_pods(test: impl Fn(&Cri<'_>) -> Result<()>) -> Result<()> {
    with_pods_of(Network::default(), test)
}

/// The same, whose pods have this network.
pub fn with_pods_of(network: Network, test: impl Fn(&Cri<'_>) -> Result<()>) -> Result<()> {
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

/// With each containerd, by the way into the VM that is the default.
pub fn with_pods_everywhere(test: impl Fn(&Cri<'_>) -> Result<()>) -> Result<()> {
    every_containerd(|setup| with_cri(setup, Network::default(), &test))
}

/// Puts `more` over `base`, object by object.
fn merge(base: &mut Value, more: &Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (base, more) => *base = more.clone(),
    }
}
