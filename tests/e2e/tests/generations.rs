//! What differs between the generations of containerd: how each starts a shim, what it tells it, and where it keeps it.
//! What must be the same with all of them is tested beside the rest, by `with_every_containerd`.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message as _,
};
use e2e::{
    Containerd, Node, NodeSetup, Runtime, image,
    node::NAMESPACE,
    processes::{self, Process},
    with_every_containerd, with_node_setup,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// The words exchanged with the shim's `start`.
struct Conversation {
    said: Vec<u8>,
    answered: Vec<u8>,
}

/// Starts a container through a program that listens to what containerd and the product's shim say to each other.
fn overheard(node: &Node, id: &str) -> Result<Conversation> {
    let dir = node.dir().join("overheard");
    fs::create_dir_all(&dir)?;
    let listener = dir.join("containerd-shim-kata-v2");
    let (shim, at) = (node.install().shim(), dir.display());
    // `start` is the last word that containerd says; a tee would wait for the server, which keeps its stdout
    let script = format!(
        "#!/bin/sh\nfor last; do :; done\n[ \"$last\" = start ] || exec {shim} \"$@\"\n\
         cat > {at}/said\n{shim} \"$@\" < {at}/said > {at}/answered || exit\ncat {at}/answered\n",
        shim = shim.display()
    );
    fs::write(&listener, script)?;
    fs::set_permissions(&listener, fs::Permissions::from_mode(0o755))?;
    let listener = listener.display().to_string();
    let out = node.ctr(["run", "--rm", "--runtime", &listener, image::NAME, id, "echo", "heard"]).output()?.ok()?;
    ensure!(out.text() == "heard", "{:?}", out.text());
    Ok(Conversation { said: fs::read(dir.join("said"))?, answered: fs::read(dir.join("answered"))? })
}

#[test]
fn each_generation_is_answered_as_it_asks() -> Result<()> {
    with_every_containerd(|node| {
        let heard = overheard(node, "c1")?;
        let answer = String::from_utf8_lossy(&heard.answered);
        match node.containerd() {
            Containerd::Debian | Containerd::V1_7 => {
                let asked = BootstrapParams::parse_from_bytes(&heard.said).unwrap_or_default();
                ensure!(asked.instance_id != "c1", "containerd speaks protobuf: {asked}");
                ensure!(answer.starts_with("unix:///"), "the answer is not a bare address: {answer:?}");
            }
            Containerd::V2 => {
                let asked = BootstrapParams::parse_from_bytes(&heard.said).context("what containerd says")?;
                ensure!(asked.instance_id == "c1" && asked.namespace == NAMESPACE, "{asked}");
                let events = format!("{}.ttrpc", node.address());
                ensure!(asked.containerd_ttrpc_address == events, "events go to {asked}");
                let answer = BootstrapResult::parse_from_bytes(&heard.answered).context("what the shim answers")?;
                ensure!(answer.version == 3 && answer.protocol == "ttrpc", "{answer}");
                ensure!(answer.address.starts_with("unix:///"), "{answer}");
            }
        }
        Ok(())
    })
}

/// Of the guest, in KiB.
fn memory(node: &Node, id: &str, options: &[&str]) -> Result<u64> {
    let told = node.run(Runtime::Kata, id, options, &["grep", "MemTotal", "/proc/meminfo"]).output()?.ok()?.text();
    let number = told.split_whitespace().nth(1).with_context(|| told.clone())?;
    number.parse().with_context(|| told.clone())
}

#[test]
fn the_configuration_can_be_named_for_one_container() -> Result<()> {
    with_every_containerd(|node| {
        let other = node.dir().join("other.toml");
        fs::write(&other, node.install().config_with(&[("default_memory", 1024.into())])?)?;
        let usual = memory(node, "usual", &[])?;
        let named = memory(node, "named", &["--runtime-config-path", &other.display().to_string()])?;
        // the kernel keeps some of it for itself
        ensure!(usual < 700 << 10, "{usual} KiB with the installed configuration: this test needs it below 700 MiB");
        ensure!((900 << 10..=1024 << 10).contains(&named), "{named} KiB instead of 1 GiB");
        Ok(())
    })
}

/// With CRI's annotations a container joins the shim of its pod: `start` finds it, and answers with its address.
/// containerd 2.x's own CRI does not even ask.
#[test]
fn containers_join_a_pod() -> Result<()> {
    with_every_containerd(|node| {
        let kind = |kind: &str| ["--annotation".to_owned(), format!("io.kubernetes.cri.container-type={kind}")];
        let of = "io.kubernetes.cri.sandbox-id=pod";
        let [flag, sandbox] = kind("sandbox");
        node.detached(Runtime::Kata, "pod", &[&flag, &sandbox, &flag, of], &["sleep", "1000"])?;
        let [_, container] = kind("container");
        let mut boots = Vec::new();
        for id in ["member-0", "member-1"] {
            node.detached(Runtime::Kata, id, &[&flag, &container, &flag, of], &["sleep", "1000"])?;
            let file = "/proc/sys/kernel/random/boot_id";
            boots.push(node.exec(id, "boot", &[], &["cat", file]).output()?.ok()?.text());
        }
        ensure!(boots[0] == boots[1], "two VMs: {boots:?}");
        ensure!(shims(node).len() == 1, "more than one shim: {:#?}", shims(node));
        // in an order that is neither theirs nor its reverse; the pod's own container goes last
        for id in ["member-0", "member-1", "pod"] {
            node.ctr(["task", "kill", "-s", "KILL", id]).output()?.ok()?;
            node.remove(id)?;
        }
        Ok(())
    })
}

fn shims(node: &Node) -> Vec<Process> {
    let mut all = processes::of_node(node.tag());
    all.retain(|process| process.name == "containerd-shim-kata-v2");
    all
}

/// A folder for shims' sockets whose path is short enough for containerd.
struct Sockets(PathBuf);

impl Sockets {
    fn names(&self) -> Result<Vec<PathBuf>> {
        match fs::read_dir(&self.0) {
            Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    fn only(&self) -> Result<PathBuf> {
        let names = self.names()?;
        ensure!(names.len() == 1, "the shim's socket is not in {}: {names:?}", self.0.display());
        Ok(names[0].clone())
    }
}

/// containerd 2.3 and later say where sockets of shims belong.
#[test]
fn the_socket_is_where_containerd_wants_it() -> Result<()> {
    if !Containerd::chosen()?.contains(&Containerd::V2) {
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("ks").tempdir_in("/run")?;
    let sockets = Sockets(folder.path().join("s"));
    let settings = format!("[plugins.\"io.containerd.shim.v1.manager\"]\nsocket_dir = {:?}\n", sockets.0);
    with_node_setup(NodeSetup { containerd: Containerd::V2, settings, ..NodeSetup::default() }, |node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let mode = fs::metadata(sockets.only()?)?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "the socket's mode is {mode:o}");
        node.remove("c1")?;
        ensure!(sockets.names()?.is_empty(), "left behind: {:?}", sockets.names()?);
        // and a shim that could not remove it itself
        node.detached(Runtime::Kata, "c2", &[], &["sleep", "1000"])?;
        sockets.only()?;
        let events = e2e::events::Events::watch(node)?;
        for shim in shims(node) {
            shim.kill()?;
        }
        events.wait("/tasks/delete", "c2", Duration::from_secs(10))?;
        node.ctr(["container", "rm", "c2"]).output()?.ok()?;
        ensure!(sockets.names()?.is_empty(), "left behind by a killed shim: {:?}", sockets.names()?);
        // a folder that nobody can make is an error that names it
        fs::remove_dir(&sockets.0)?;
        fs::write(&sockets.0, "")?;
        let refused = node.run(Runtime::Kata, "c3", &[], &["true"]).output()?;
        fs::remove_file(&sockets.0)?;
        ensure!(refused.code != 0 && names(&refused.stderr, &sockets.0), "{refused:?}");
        Ok(())
    })
}

fn names(text: &str, path: &Path) -> bool {
    text.contains(&path.display().to_string())
}
