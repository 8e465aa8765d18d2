//! Drives a shim by its binary and its Task API, as containerd does, with bundles that containerd would not make.

use crate::{Node, ctr::Invocation, ctr::Outcome, image, node::NAMESPACE, processes::MARK};
use anyhow::{Context as _, Result, anyhow, ensure};
use containerd_shim_protos::{
    Client, TaskClient, api,
    api::Mount,
    protobuf::{EnumOrUnknown, MessageField, well_known_types::any::Any},
    ttrpc,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The Task API's own limit here; a VM starts in a second or two.
const LIMIT: Duration = Duration::from_secs(30);

/// A bundle: a folder with a root file system and config.json.
#[derive(Debug)]
pub struct Bundle {
    /// The folder.
    pub path: PathBuf,
}

impl Bundle {
    /// Makes one below the node's folder, with busybox in it, that runs `args`.
    pub fn make(node: &Node, name: &str, args: &[&str]) -> Result<Self> {
        let path = node.dir().join("bundles").join(name);
        fs::create_dir_all(path.join("rootfs"))?;
        image::lay_out(&path.join("rootfs"))?;
        let bundle = Self { path };
        bundle.write(&specification(args))?;
        Ok(bundle)
    }

    /// Replaces config.json.
    pub fn write(&self, spec: &Value) -> Result<()> {
        self.write_text(&spec.to_string())
    }

    /// Replaces config.json by any text.
    pub fn write_text(&self, text: &str) -> Result<()> {
        Ok(fs::write(self.path.join("config.json"), text)?)
    }
}

/// A small specification that runs `args`.
pub fn specification(args: &[&str]) -> Value {
    let namespaces: Vec<_> = ["pid", "network", "ipc", "uts", "mount"].iter().map(|t| json!({"type": t})).collect();
    json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "hostname": "direct",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": namespaces},
    })
}

/// Calls the shim's binary with an action, as containerd does.
pub fn call(node: &Node, id: &str, bundle: &Path, action: &str) -> Result<Outcome> {
    let address = node.address();
    let bundle_text = bundle.display().to_string();
    let shim = node.install().shim();
    let flags = ["-namespace", NAMESPACE, "-address", &address, "-publish-binary", "containerd"];
    let args: Vec<&str> = [&flags[..], &["-id", id, "-bundle", &bundle_text, action]].concat();
    Invocation::new(&shim.display().to_string(), args)
        .env("TTRPC_ADDRESS", format!("{address}.ttrpc"))
        .env("KATA_CONF_FILE", node.config())
        .env(MARK, node.tag())
        .current_dir(bundle)
        .limit(LIMIT)
        .output()
}

/// A shim that was started without containerd.
pub struct Shim<'a> {
    node: &'a Node,
    id: String,
    bundle: PathBuf,
    address: String,
    tasks: TaskClient,
}

impl std::fmt::Debug for Shim<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim").field("id", &self.id).field("bundle", &self.bundle).finish_non_exhaustive()
    }
}

impl<'a> Shim<'a> {
    /// Starts one for this bundle and connects to it.
    pub fn start(node: &'a Node, id: &str, bundle: &Bundle) -> Result<Self> {
        let answer = call(node, id, &bundle.path, "start")?.ok()?.text();
        ensure!(answer.starts_with("unix://"), "the answer to start is {answer:?}");
        let client = Client::connect(&answer).map_err(|e| anyhow!("{e}")).with_context(|| answer.clone())?;
        let tasks = TaskClient::new(client);
        Ok(Self { node, id: id.to_owned(), bundle: bundle.path.clone(), address: answer, tasks })
    }

    fn context() -> ttrpc::context::Context {
        ttrpc::context::with_duration(LIMIT)
    }

    /// Creates the container `id` in this shim; its root file system is in the bundle.
    pub fn create(&self, id: &str) -> Result<u32> {
        self.create_from(id, Vec::new())
    }

    /// Creates the container `id` with a root file system that is to be mounted.
    pub fn create_from(&self, id: &str, rootfs: Vec<Mount>) -> Result<u32> {
        self.create_as(api::CreateTaskRequest { id: id.to_owned(), rootfs, ..Default::default() })
    }

    /// Creates a container as it is asked for; its bundle is this shim's.
    pub fn create_as(&self, mut request: api::CreateTaskRequest) -> Result<u32> {
        request.bundle = self.bundle.display().to_string();
        Ok(self.tasks.create(Self::context(), &request).map_err(|e| said(&e))?.pid)
    }

    /// Adds a process with a terminal, whose output goes to `stdout`.
    pub fn exec_terminal(&self, id: &str, exec_id: &str, args: &[&str], stdout: &str) -> Result<()> {
        let spec =
            json!({"terminal": true, "user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"});
        let spec = Any { value: spec.to_string().into_bytes(), ..Default::default() };
        let request = api::ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal: true,
            stdout: stdout.to_owned(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.tasks.exec(Self::context(), &request).map_err(|e| said(&e))?;
        Ok(())
    }

    /// Sets the size of an exec's terminal.
    pub fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        let request = api::ResizePtyRequest { id, exec_id, width, height, ..Default::default() };
        self.tasks.resize_pty(Self::context(), &request).map_err(|e| said(&e))?;
        Ok(())
    }

    /// Starts an exec, waits for its end, deletes it, and returns its exit status.
    pub fn run_exec(&self, id: &str, exec_id: &str) -> Result<u32> {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        let start = api::StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        self.tasks.start(Self::context(), &start).map_err(|e| said(&e))?;
        let wait = api::WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        self.tasks.wait(Self::context(), &wait).map_err(|e| said(&e))?;
        let delete = api::DeleteRequest { id, exec_id, ..Default::default() };
        Ok(self.tasks.delete(Self::context(), &delete).map_err(|e| said(&e))?.exit_status)
    }

    /// Starts the container.
    pub fn start_container(&self, id: &str) -> Result<u32> {
        let request = api::StartRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.tasks.start(Self::context(), &request).map_err(|e| said(&e))?.pid)
    }

    /// Asks for the container's start over a connection of its own, and goes away `after` that, which must be before the
    /// answer.
    pub fn start_and_leave(&self, id: &str, after: Duration) -> Result<()> {
        let client = Client::connect(&self.address).map_err(|e| anyhow!("{e}"))?;
        let request = api::StartRequest { id: id.to_owned(), ..Default::default() };
        let context = ttrpc::context::with_duration(after);
        match TaskClient::new(client).start(context, &request) {
            Ok(_) => Err(anyhow!("the start was answered within {after:?}")),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                Err(anyhow!("{}", status.message))
            }
            Err(_) => Ok(()),
        }
    }

    /// Runs one more process to its end, of which nobody reads or writes the streams, and returns its exit status.
    pub fn exec(&self, id: &str, exec: &str, args: &[&str]) -> Result<u32> {
        let process = json!({"user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"});
        let spec = Any { value: process.to_string().into_bytes(), ..Default::default() };
        let request = api::ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.tasks.exec(Self::context(), &request).map_err(|e| said(&e))?;
        self.run_exec(id, exec)
    }

    /// Sends a signal to its first process.
    pub fn kill(&self, id: &str, signal: u32) -> Result<()> {
        let request = api::KillRequest { id: id.to_owned(), signal, ..Default::default() };
        self.tasks.kill(Self::context(), &request).map_err(|e| said(&e))?;
        Ok(())
    }

    /// Waits for its end and returns its exit status.
    pub fn wait(&self, id: &str) -> Result<u32> {
        self.wait_within(id, LIMIT)
    }

    /// The same, of one that takes longer.
    pub fn wait_within(&self, id: &str, limit: Duration) -> Result<u32> {
        let request = api::WaitRequest { id: id.to_owned(), ..Default::default() };
        let context = ttrpc::context::with_duration(limit);
        Ok(self.tasks.wait(context, &request).map_err(|e| said(&e))?.exit_status)
    }

    /// The state of the container.
    pub fn state(&self, id: &str) -> Result<EnumOrUnknown<api::Status>> {
        let request = api::StateRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.tasks.state(Self::context(), &request).map_err(|e| said(&e))?.status)
    }

    /// Deletes the container.
    pub fn delete(&self, id: &str) -> Result<u32> {
        let request = api::DeleteRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.tasks.delete(Self::context(), &request).map_err(|e| said(&e))?.exit_status)
    }

    /// Asks the shim to end, and has `delete` clean up after it as containerd would.
    pub fn shut_down(self) -> Result<()> {
        let request = api::ShutdownRequest { id: self.id.clone(), now: true, ..Default::default() };
        // the connection may end before the answer has come
        let _ = self.tasks.shutdown(Self::context(), &request);
        call(self.node, &self.id, &self.bundle, "delete")?.ok()?;
        Ok(())
    }
}

/// The message of an error, as containerd would show it.
fn said(error: &ttrpc::Error) -> anyhow::Error {
    match error {
        ttrpc::Error::RpcStatus(status) => anyhow!("{:?}: {}", status.code(), status.message),
        other => anyhow!("{other}"),
    }
}
