//! `docker` as people use it: a daemon of the test's own above the node's containerd.

use crate::{
    Node, NodeSetup, Runtime, containerd::client, cri::Cri, ctr::Invocation, host::Host, image, node, processes::MARK,
    with_node_setup, world,
};
use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

/// The image's name.
pub const IMAGE: &str = "kata-test";

/// A daemon, in a world of its own.
#[derive(Debug)]
pub struct Docker<'a> {
    /// The node whose containerd it uses.
    pub node: &'a Node,
    programs: PathBuf,
    cli: PathBuf,
    daemon: Mutex<Child>,
}

/// Runs `test` on a node in a world of its own, and fails also when anything is left behind.
pub fn with_docker(setup: NodeSetup, test: impl FnOnce(&Docker<'_>) -> Result<()> + Send) -> Result<()> {
    world::in_a_world(|| {
        with_node_setup(setup, |node| {
            let programs = client("docker")?;
            let daemon = Mutex::new(launch(node, &programs)?);
            // from here on dropping it ends the daemon
            let docker = Docker { node, programs, cli: client("docker-cli")?.join("docker"), daemon };
            docker.ready()?;
            docker.import()?;
            let tested = test(&docker);
            // after a failed test
            let left = docker.run(["ps", "-aq"]).output()?.text();
            for id in left.lines() {
                let _ = docker.run(["rm", "-f", "-v", id]).output();
            }
            if tested.is_err() {
                eprintln!("the last words of dockerd:\n{}", docker.last_words());
            }
            tested
        })
    })
}

fn launch(node: &Node, programs: &Path) -> Result<Child> {
    let at = |name: &str| node.dir().join(name).display().to_string();
    fs::write(at("daemon.json"), r#"{"live-restore": true, "shutdown-timeout": 5}"#)?;
    let log = File::options().create(true).append(true).open(at("dockerd.log"))?;
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").context("PATH")?);
    Command::new(programs.join("dockerd"))
        .args(["--config-file", &at("daemon.json"), "--containerd", &node.address()])
        .args(["--containerd-namespace", node::NAMESPACE, "--containerd-plugins-namespace", "kata-e2e-plugins"])
        .args(["--data-root", &at("docker"), "--exec-root", &at("exec"), "--pidfile", &at("docker.pid")])
        .args(["--userland-proxy-path", &programs.join("docker-proxy").display().to_string()])
        // a folder that is there for containers of ours anyway
        .args(["--cgroup-parent", &format!("/{}", node::NAMESPACE)])
        .args(["-H", &format!("unix://{}", at("docker.sock"))])
        .env("PATH", path)
        .env("HOME", node.dir())
        .env(MARK, node.tag())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting dockerd")
}

impl Docker<'_> {
    fn ready(&self) -> Result<()> {
        let asked = Cri::until(|| {
            let ended = self.daemon.lock().unwrap_or_else(PoisonError::into_inner).try_wait()?;
            ensure!(ended.is_none(), "dockerd ended: {ended:?}");
            let told = self.run(["version", "--format", "{{.Server.Version}}"]).output()?;
            Ok((told.code == 0, told.stderr))
        });
        asked.with_context(|| self.last_words()).map(drop)
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.node.dir().join("dockerd.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().filter(|line| !line.contains("level=info")).collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// The test image's files, as a root file system: the daemon's own store does not read layouts.
    fn import(&self) -> Result<()> {
        let (root, archive) = (self.node.dir().join("root-of-image"), self.node.dir().join("root.tar"));
        image::lay_out(&root)?;
        let packed = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".").status()?;
        ensure!(packed.success(), "tar");
        let changes = ["-c", "ENV PATH=/bin:/usr/bin", "-c", "CMD [\"sh\"]"];
        self.say([&["import"], &changes[..], &[&archive.display().to_string(), IMAGE]].concat()).map(drop)
    }

    /// `docker` with these arguments.
    pub fn run<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        let all: Vec<String> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        Invocation::new(&self.cli.display().to_string(), all)
            .env("DOCKER_HOST", format!("unix://{}", self.node.dir().join("docker.sock").display()))
            .env("HOME", self.node.dir())
    }

    /// What it prints, which must succeed.
    pub fn say<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        Ok(self.run(args).output()?.ok()?.text())
    }

    /// `docker run` of the test image with these options and words.
    pub fn container(&self, runtime: Runtime, options: &[&str], words: &[&str]) -> Invocation {
        self.run([&["run", "--runtime", runtime.name()], options, &[IMAGE], words].concat())
    }

    /// What a shell script in a running container prints.
    pub fn sh(&self, name: &str, script: &str) -> Result<String> {
        self.say(["exec", name, "sh", "-c", script])
    }

    /// What the container has logged once `text` is in it.
    pub fn logs_with(&self, name: &str, text: &str) -> Result<String> {
        Cri::until(|| {
            let logs = self.say(["logs", name])?;
            Ok((logs.contains(text), logs))
        })
    }

    /// Waits until `docker inspect` shows this.
    pub fn wait_shown(&self, name: &str, template: &str, wanted: &str) -> Result<()> {
        let shown = Cri::until(|| {
            let shown = self.say(["inspect", "-f", template, name])?;
            Ok((shown == wanted, shown))
        });
        shown.map(drop).with_context(|| format!("{name}: {template} is to be {wanted}"))
    }

    /// Ends the daemon, as an update does, and starts it again.
    pub fn restart_daemon(&self) -> Result<()> {
        self.end_daemon()?;
        *self.daemon.lock().unwrap_or_else(PoisonError::into_inner) = launch(self.node, &self.programs)?;
        self.ready()
    }

    fn end_daemon(&self) -> Result<()> {
        let mut daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        if daemon.try_wait()?.is_none() {
            kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM)?;
            daemon.wait()?;
        }
        Ok(())
    }

    /// What the host looks like, but for what containerd and dockerd keep in the node's folder.
    pub fn host(&self) -> Result<Host> {
        Host::settled(&[self.node.dir()])
    }

    /// Fails unless the host is as it was, but for what the client leaves with each runtime.
    pub fn expect_host(&self, before: &Host, litter: &BTreeSet<String>) -> Result<()> {
        Host::expect_as(before, &[self.node.dir()], litter)
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        let _ = self.end_daemon();
    }
}
