//! A pool's server beside a node, whose machine is waited for before and after each turn.

use anyhow::{Context as _, Result};
use e2e::{
    Node,
    ctr::{Invocation, Running},
    journal::Journal,
    processes::MARK,
};
use nix::sys::signal::{Signal, kill};
use std::time::Duration;

/// Of one machine.
pub(crate) struct Pool {
    server: Running,
    said: Journal,
    ready: usize,
}

impl Pool {
    /// Starts it and waits for its machine.
    pub(crate) fn start(node: &Node, config: &str) -> Result<Self> {
        let program = node.install().kata_runtime().display().to_string();
        let server = Invocation::new(&program, ["--config", config, "factory", "init"]);
        let mut server = server.env(MARK, node.tag()).limit(Duration::from_secs(3600)).spawn()?;
        let said = Journal::default();
        said.follow(server.stdout.take().context("no output")?);
        let mut pool = Self { server, said, ready: 0 };
        pool.wait()?;
        Ok(pool)
    }

    /// Waits for the next machine.
    pub(crate) fn wait(&mut self) -> Result<()> {
        let is_ready = |line: &str| line.starts_with("ready: ");
        self.said.wait_from(self.ready, Duration::from_secs(60), is_ready).context("no machine is made")?;
        self.ready = self.said.len();
        Ok(())
    }

    /// Ends it.
    pub(crate) fn end(self) -> Result<()> {
        // not by `factory destroy`, which takes templates away too
        kill(self.server.pid(), Signal::SIGTERM)?;
        self.server.finish()?.ok().map(drop)
    }
}
