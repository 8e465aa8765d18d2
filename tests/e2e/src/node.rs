//! One private containerd with the product in its PATH, from its start to the proof that nothing of it is left.

use crate::{
    Outcome, Runtime,
    containerd::{Containerd, Programs},
    ctr::Invocation,
    image,
    install::Install,
    inventory,
    journal::Journal,
    leaks::Leaks,
    mounts,
    processes::{self, MARK},
};
use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sha2::{Digest as _, Sha256};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// The namespace in containerd that all test containers live in.
pub const NAMESPACE: &str = "kata-e2e";

/// The namespace in containerd that CRI uses.
pub const CRI_NAMESPACE: &str = "k8s.io";

/// Where runc keeps what it knows of containers of our namespace.
const RUNC_STATE: &str = "/run/containerd/runc/kata-e2e";

/// Where the product has the run folders of sandboxes.
const SANDBOXES: &str = "/run/kata-containers/sandboxes";

/// How long things may take to go before they count as left behind.
const SETTLE: Duration = Duration::from_secs(5);

/// What to set up otherwise than usual.
#[derive(Debug, Default)]
pub struct NodeSetup {
    /// The text of configuration.toml instead of the installed one.
    pub config: Option<String>,
    /// Serve CRI too.
    pub cri: bool,
    /// Pods that name no runtime are VMs.
    pub is_kata_default: bool,
    /// Which containerd to run; Debian's unless told otherwise.
    pub containerd: Containerd,
    /// More lines for containerd's own configuration.
    pub settings: String,
}

/// The private containerd and what belongs to it.
#[derive(Debug)]
pub struct Node {
    install: Install,
    dir: tempfile::TempDir,
    tag: String,
    config: PathBuf,
    containerd: Containerd,
    programs: Programs,
    daemon: Mutex<Child>,
    /// What containerd and the shims log.
    pub log: Journal,
}

/// Runs `test` on a fresh node with the installed configuration; see `with_node_setup`.
pub fn with_node(test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    with_node_setup(NodeSetup::default(), test)
}

/// Runs `test` on a fresh node of each containerd there is, one after the other, and tells of all that failed.
pub fn with_every_containerd(test: impl Fn(&Node) -> Result<()>) -> Result<()> {
    every_containerd(|setup| with_node_setup(setup, &test))
}

/// Does something for each containerd there is, one after the other, and tells of all that failed.
pub fn every_containerd(work: impl Fn(NodeSetup) -> Result<()>) -> Result<()> {
    let mut failed = Vec::new();
    for containerd in Containerd::chosen()? {
        if let Err(error) = work(NodeSetup { containerd, ..NodeSetup::default() }) {
            failed.push(format!("with containerd {}: {error:#}", containerd.name()));
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!(failed.join("\n\n")) }
}

/// Runs `test` on a fresh node, ends it, and fails if the test failed or left anything behind.
///
/// Nodes of several test processes wait for one another: they look at the whole machine for what is left.
pub fn with_node_setup(setup: NodeSetup, test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let lock = File::create(std::env::temp_dir().join("kata-e2e.lock"))?;
    let _alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| anyhow!("locking kata-e2e.lock: {e}"))?;
    let install = Install::locate()?;
    let tag = format!("{}-{}", std::process::id(), word());
    // short, because containerd makes sockets below it; on a file system that overlay can use as upper layer
    let dir = tempfile::Builder::new().prefix("ke").tempdir_in("/var/tmp")?;
    let before = Leaks::look(&tag, dir.path());
    let node = Node::start(install, tag, dir, setup)?;
    let tested = test(&node);
    let left = match &tested {
        Ok(()) => node.expect_empty().and_then(|()| Leaks::expect_none_since(&before, &node.tag, node.dir(), SETTLE)),
        Err(_) => Ok(()),
    };
    let log = node.log.lines_from(0);
    drop(node);
    tested.and(left).map_err(|e| {
        let booted = log.iter().position(|l| l.contains("successfully booted")).map_or(0, |n| n + 1);
        let tail: Vec<_> = log[booted..].iter().filter(|l| is_telling(l)).map(String::as_str).collect();
        let tail = tail[tail.len().saturating_sub(40)..].join("\n  ");
        e.context(format!("the last lines of containerd's log:\n  {tail}\n"))
    })
}

/// Whether a line of containerd's log helps to understand a failure.
fn is_telling(line: &str) -> bool {
    const NOISE: [&str; 7] = [
        "level=debug",
        "starting signal loop",
        "cleanup warnings",
        "loading plugin",
        "start-trace",
        "copy shim log",
        "cleaning up",
    ];
    !NOISE.iter().any(|n| line.contains(n))
}

/// A word that tells this node from others.
fn word() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.subsec_nanos()
}

impl Node {
    fn start(install: Install, tag: String, dir: tempfile::TempDir, setup: NodeSetup) -> Result<Self> {
        let config = match setup.config {
            None if !Install::wants_templates() => install.config(),
            given => {
                let text = given.map_or_else(|| install.config_table().map(|table| table.to_string()), Ok)?;
                let path = dir.path().join("configuration.toml");
                fs::write(&path, text)?;
                path
            }
        };
        let containerd = setup.containerd;
        let default = if setup.is_kata_default { Runtime::Kata } else { Runtime::Runc };
        let cri = setup.cri.then_some(default);
        fs::write(dir.path().join("containerd.toml"), containerd.settings(dir.path(), cri) + &setup.settings)?;
        let log = Journal::default();
        let programs = containerd.programs(&install)?;
        let daemon = Mutex::new(launch(&programs, dir.path(), &tag, &config, &log)?);
        let node = Self { install, dir, tag, config, containerd, programs, daemon, log };
        let archive = image::archive()?.display().to_string();
        node.ctr(["image", "import", &archive]).output()?.ok()?;
        if setup.cri {
            let args = ["-a", &node.address(), "-n", CRI_NAMESPACE, "image", "import", &archive];
            Invocation::new(&node.programs.ctr, args).output()?.ok()?;
        }
        Ok(node)
    }

    /// The installation under test.
    pub fn install(&self) -> &Install {
        &self.install
    }

    /// The word in the environment of all processes of this node.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// A folder for the test's own files; goes with the node.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// containerd's address.
    pub fn address(&self) -> String {
        address(self.dir())
    }

    /// Which containerd this is.
    pub fn containerd(&self) -> Containerd {
        self.containerd
    }

    /// Its programs.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The configuration that shims of this node read.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// `ctr` with these arguments, talking to this node.
    pub fn ctr<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        let mut all = vec!["-a".to_owned(), self.address(), "-n".to_owned(), NAMESPACE.to_owned()];
        all.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        // of the host's cgroups v1, on the stderr that we compare; containerd 2's ctr alone knows the variable
        Invocation::new(&self.programs.ctr, all).env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "1")
    }

    /// `ctr run --rm` of the test image.
    pub fn run(&self, runtime: Runtime, id: &str, options: &[&str], command: &[&str]) -> Invocation {
        self.run_image(runtime, image::NAME, id, options, command)
    }

    /// `ctr run --rm` of one of the images of `image`.
    pub fn run_image(&self, runtime: Runtime, image: &str, id: &str, options: &[&str], command: &[&str]) -> Invocation {
        self.ctr([&["run", "--rm", "--runtime", runtime.name()], options, &[image, id], command].concat())
    }

    /// `ctr run -d` of the test image, which must work.
    pub fn detached(&self, runtime: Runtime, id: &str, options: &[&str], command: &[&str]) -> Result<Outcome> {
        let args = [&["run", "-d", "--runtime", runtime.name()], options, &[image::NAME, id], command].concat();
        self.ctr(args).output()?.ok()
    }

    /// `ctr task exec` in a running container.
    pub fn exec(&self, id: &str, exec_id: &str, options: &[&str], command: &[&str]) -> Invocation {
        self.ctr([&["task", "exec", "--exec-id", exec_id], options, &[id], command].concat())
    }

    /// The status that `ctr task ls` shows, such as `RUNNING`.
    pub fn status(&self, id: &str) -> Result<Option<String>> {
        let list = self.ctr(["task", "ls"]).output()?.ok()?.text();
        let row = list.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).find(|r| r.first() == Some(&id));
        Ok(row.and_then(|r| r.get(2).map(|s| (*s).to_owned())))
    }

    /// The process id that `ctr task ls` shows.
    pub fn task_pid(&self, id: &str) -> Result<u32> {
        let list = self.ctr(["task", "ls"]).output()?.ok()?.text();
        let row = list.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).find(|r| r.first() == Some(&id));
        let pid =
            row.and_then(|r| r.get(1).map(|pid| pid.parse())).with_context(|| format!("no task {id}:\n{list}"))?;
        pid.with_context(|| list.clone())
    }

    /// Ends a container in whatever state it is, and removes it.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.ctr(["task", "delete", "-f", id]).output()?.ok()?;
        self.ctr(["container", "rm", id]).output()?.ok()?;
        Ok(())
    }

    fn daemon_pid(&self) -> u32 {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner).id()
    }

    /// How many files containerd has open.
    pub fn open_files(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.daemon_pid())).context("containerd's files")?.count())
    }

    /// containerd's resident memory, KiB.
    pub fn memory_kib(&self) -> Result<u64> {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.daemon_pid())).context("containerd's status")?;
        inventory::field(&status, "VmRSS:").context("containerd's memory")
    }

    /// kill -9 of containerd.
    pub fn kill_containerd(&self) -> Result<()> {
        let mut daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        daemon.kill()?;
        daemon.wait()?;
        Ok(())
    }

    /// Starts containerd again after `kill_containerd`.
    pub fn restart_containerd(&self) -> Result<()> {
        let fresh = launch(&self.programs, self.dir.path(), &self.tag, &self.config, &self.log)?;
        *self.daemon.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Fails when containerd still knows a task or a container.
    fn expect_empty(&self) -> Result<()> {
        for kind in ["task", "container"] {
            let left = self.ctr([kind, "ls", "-q"]).output()?.ok()?.text();
            if !left.is_empty() {
                bail!("containerd still has a {kind}: {left}");
            }
        }
        Ok(())
    }

    fn teardown(&self) {
        let mut daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM);
        let _ = daemon.wait();
        // after a failed test only: what the product should have ended
        for process in processes::of_node(&self.tag) {
            let _ = process.kill();
        }
        // and what runc's containers were, which do not end with their shim
        let containers = Path::new(RUNC_STATE);
        for left in fs::read_dir(containers).into_iter().flatten().flatten() {
            let _ = Command::new("runc")
                .arg("--root")
                .arg(containers)
                .args(["delete", "--force"])
                .arg(left.file_name())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
        let sandboxes = self.sandboxes();
        let mut folders = sandboxes.clone();
        folders.push(self.dir.path().to_owned());
        mounts::unmount_below(&folders);
        let mounts = String::from_utf8_lossy(&mounts::table()).into_owned();
        for left in sandboxes {
            // never through a mount that could not be taken off
            if !mounts.contains(&left.display().to_string()) {
                let _ = fs::remove_dir_all(left);
            }
        }
    }

    /// Run folders of this node's sandboxes.
    fn sandboxes(&self) -> Vec<PathBuf> {
        let end = sandboxes_end(&self.address());
        let all = fs::read_dir(SANDBOXES).into_iter().flatten().flatten().map(|entry| entry.path());
        all.filter(|path| path.to_string_lossy().ends_with(&end)).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.teardown();
    }
}

/// The address of the containerd that has everything in a folder.
pub(crate) fn address(dir: &Path) -> String {
    dir.join("c.sock").display().to_string()
}

/// How the names of its sandboxes' run folders end: with a hash of its address.
pub(crate) fn sandboxes_end(address: &str) -> String {
    Sha256::digest(address).iter().take(4).fold("@".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// Starts containerd and returns when it serves.
pub(crate) fn launch(programs: &Programs, dir: &Path, tag: &str, config: &Path, log: &Journal) -> Result<Child> {
    let from = log.len();
    let mut child = Command::new(&programs.daemon)
        .arg("--config")
        .arg(dir.join("containerd.toml"))
        .env("PATH", &programs.path)
        .env("KATA_CONF_FILE", config)
        .env(MARK, tag)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", programs.daemon))?;
    log.follow(child.stderr.take().context("containerd's stderr")?);
    if log.wait_from(from, Duration::from_secs(20), |l| l.contains("containerd successfully booted")).is_none() {
        let _ = child.kill();
        let _ = child.wait();
        bail!("containerd did not start within 20 s:\n{}", log.lines_from(from).join("\n"));
    }
    Ok(child)
}
