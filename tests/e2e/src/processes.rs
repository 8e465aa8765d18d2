//! Finds the processes of a node by a variable of their environment, and reads what they use.

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    time::{Duration, Instant},
};

/// The variable that marks every process that a node's containerd started, directly or not.
pub const MARK: &str = "KATA_E2E_NODE";

/// The helpers and servers that the product runs on the host.
const NAMES: [&str; 5] = ["qemu-system", "virtiofsd", "containerd-shim", "kata-runtime", ANCHOR];

/// What stands for a container on the host. It has no environment, and belongs to where its parent does.
pub const ANCHOR: &str = "kata-anchor";

/// A process of interest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// The file name of its first argument.
    pub name: String,
    /// All arguments, separated by blanks.
    pub command: String,
    /// The node that it belongs to, where its environment says so.
    pub node: Option<String>,
}

impl Process {
    /// Whether it belongs to the node with this mark, or may do so since nobody else is known.
    pub fn may_be_of(&self, tag: &str) -> bool {
        match &self.node {
            Some(node) => node == tag,
            None => self.name == ANCHOR || self.command.contains(crate::node::NAMESPACE),
        }
    }

    /// Sends SIGKILL.
    pub fn kill(&self) -> Result<()> {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).with_context(|| format!("killing {} {}", self.name, self.pid))
    }

    /// Proportional set size, in KiB; a process' pages that others share count by their part.
    pub fn pss_kib(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.pid);
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        let value = text.lines().find_map(|l| l.strip_prefix("Pss:")).context("no Pss: line")?;
        value.trim().trim_end_matches(" kB").trim().parse().with_context(|| path)
    }
}

/// All shims, virtual machines and their helpers on this machine, zombies left out.
pub fn all() -> Vec<Process> {
    let Ok(proc) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = proc.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(look).collect()
}

/// Those of one node.
pub fn of_node(tag: &str) -> Vec<Process> {
    all().into_iter().filter(|p| p.node.as_deref() == Some(tag)).collect()
}

/// The node that a process belongs to, where its environment says so.
pub(crate) fn mark(pid: i32) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut marks = environment
        .split(|b| *b == 0)
        .filter_map(|v| std::str::from_utf8(v).ok()?.strip_prefix(MARK)?.strip_prefix('='));
    marks.next().map(str::to_owned)
}

/// What is known of a process, where it is one of these.
pub(crate) fn look(pid: i32) -> Option<Process> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let args: Vec<_> = raw.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
    let name = args.first()?.rsplit('/').next()?.to_owned();
    if !NAMES.iter().any(|n| name.starts_with(n)) {
        return None;
    }
    let node = match (name.as_str(), parent(pid)?) {
        // its shim is gone: somebody's leak
        (ANCHOR, 1) => None,
        (ANCHOR, shim) => Some(mark(shim).unwrap_or_default()),
        _ => mark(pid),
    };
    Some(Process { pid, name, command: args.join(" ").trim_end().to_owned(), node })
}

fn parent(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// Waits for a process of the node whose name starts with `name`, that is no `start` or `delete` call of the shim.
pub fn wait_for(tag: &str, name: &str, limit: Duration) -> Result<Process> {
    let end = Instant::now() + limit;
    loop {
        let found = of_node(tag)
            .into_iter()
            .find(|p| p.name.starts_with(name) && !p.command.ends_with(" start") && !p.command.ends_with(" delete"));
        match found {
            Some(process) => return Ok(process),
            None if Instant::now() > end => anyhow::bail!("no {name} of this node within {limit:?}"),
            // the kernel tells of a new process only to its parent, which is not us
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
