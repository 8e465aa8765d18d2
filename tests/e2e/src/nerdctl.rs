//! `nerdctl` as people use it above a node's containerd, with CNI's own plugins for the network.

use crate::{Node, NodeSetup, Runtime, containerd::client, ctr::Invocation, host::Host, node, with_node_setup, world};
use anyhow::Result;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// Talks to one node, in a world of its own.
#[derive(Debug)]
pub struct Nerdctl<'a> {
    /// The node.
    pub node: &'a Node,
    program: PathBuf,
}

/// Runs `test` on a node in a world of its own, and fails also when anything is left behind.
pub fn with_nerdctl(setup: NodeSetup, test: impl FnOnce(&Nerdctl<'_>) -> Result<()> + Send) -> Result<()> {
    world::in_a_world(|| {
        with_node_setup(setup, |node| {
            let nerdctl = Nerdctl { node, program: client("nerdctl")?.join("nerdctl") };
            let tested = test(&nerdctl);
            // after a failed test
            let left = nerdctl.run(["ps", "-aq"]).output()?.text();
            for id in left.lines() {
                let _ = nerdctl.run(["rm", "-f", "-v", id]).output();
            }
            tested
        })
    })
}

impl Nerdctl<'_> {
    /// `nerdctl` with these arguments.
    pub fn run<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        let mut all = self.arguments();
        all.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        Invocation::new(&self.program(), all)
    }

    /// The program, for those that give it a terminal.
    pub fn program(&self) -> String {
        self.program.display().to_string()
    }

    /// What it needs before its command.
    pub fn arguments(&self) -> Vec<String> {
        let at = |name: &str| self.node.dir().join(name).display().to_string();
        let words = ["-a", &self.node.address(), "-n", node::NAMESPACE, "--cgroup-manager", "cgroupfs"];
        let folders =
            ["--cni-path", crate::cri::PLUGINS, "--cni-netconfpath", &at("cni"), "--data-root", &at("nerdctl")];
        words.into_iter().chain(folders).map(str::to_owned).collect()
    }

    /// What it prints, which must succeed.
    pub fn say<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        Ok(self.run(args).output()?.ok()?.text())
    }

    /// `nerdctl run` of the test image with these options and words.
    pub fn container(&self, runtime: Runtime, options: &[&str], words: &[&str]) -> Result<String> {
        let run = ["run", "--pull", "never", "--runtime", runtime.name()];
        self.say([&run[..], options, &["kata-test"], words].concat())
    }

    /// What the host looks like, but for what containerd and nerdctl keep in the node's folder.
    pub fn host(&self) -> Result<Host> {
        Host::settled(&self.own())
    }

    /// Fails unless the host is as it was, but for what the client leaves with each runtime.
    pub fn expect_host(&self, before: &Host, litter: &BTreeSet<String>) -> Result<()> {
        Host::expect_as(before, &self.own(), litter)
    }

    fn own(&self) -> [&Path; 1] {
        [self.node.dir()]
    }
}
