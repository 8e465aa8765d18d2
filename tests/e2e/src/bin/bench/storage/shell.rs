//! A shell that does one line at a time: in a container by `ctr run`, in a bare guest by its serial port.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{ctr::Running, journal::Journal};
use nix::sys::signal::{Signal, kill};
use std::{io::Write as _, process::ChildStdin, time::Duration};

/// What the shell runs: says that it is there, then what became of each line. It and the small programs run from
/// memory: a root file system is not what is measured, and a shell on virtio-fs reads itself anew after each program that
/// somebody starts from its file.
pub(super) const LOOP: &str = "cd /ram && for i in sh tar find mkdir rm; do cp /bin/busybox $i; done; exec ./sh -c '\
    echo; echo up; while read -r line; do eval \"$line\"; echo; echo \"said $?\"; done'";

/// How long a line, or a start, may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One that waits for its next line. Its process ends with it.
#[derive(Debug)]
pub(super) struct Shell {
    running: Option<Running>,
    stdin: ChildStdin,
    said: Journal,
}

impl Shell {
    /// When it is up.
    pub(super) fn new(mut running: Running) -> Result<Self> {
        let (stdin, stdout) = (running.stdin.take().context("stdin")?, running.stdout.take().context("stdout")?);
        let said = Journal::default();
        said.follow(stdout);
        let mut shell = Self { running: Some(running), stdin, said };
        if shell.said.wait_from(0, PATIENCE, |line| line == "up").is_none() {
            let said = shell.said.lines_from(0);
            shell.kill();
            let why = shell.running.take().map(Running::finish);
            bail!("not up within {PATIENCE:?}: {said:#?}, {why:?}");
        }
        Ok(shell)
    }

    /// Does a line, which must end well, and returns what it prints.
    pub(super) fn ask(&mut self, line: &str) -> Result<Vec<String>> {
        let from = self.said.len();
        writeln!(self.stdin, "{line}").with_context(|| line.to_owned())?;
        let end = self.said.wait_from(from, PATIENCE, |line| line.starts_with("said "));
        let said = self.said.lines_from(from);
        let status = end.with_context(|| format!("{line}: not done within {PATIENCE:?}: {said:#?}"))?.1;
        ensure!(status == "said 0", "{line}: {said:#?}");
        Ok(said)
    }

    /// Does a last line, with which its process ends by itself.
    pub(super) fn end(mut self, last: &str) -> Result<()> {
        writeln!(self.stdin, "{last}").with_context(|| last.to_owned())?;
        let running = self.running.take().context("it has ended")?;
        running.finish()?.ok()?;
        Ok(())
    }

    fn kill(&self) {
        if let Some(running) = &self.running {
            let _ = kill(running.pid(), Signal::SIGKILL);
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.kill();
        if let Some(running) = self.running.take() {
            let _ = running.finish();
        }
    }
}
