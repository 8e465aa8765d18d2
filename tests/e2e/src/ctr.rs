//! `ctr` as a user runs it, with a time limit, its output and how long it took.

use anyhow::{Context as _, Result, bail, ensure};
use std::{
    ffi::{OsStr, OsString},
    io::{Read, Write as _},
    os::unix::process::ExitStatusExt as _,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was run, for messages.
    pub command: String,
    /// Exit code; a signal counts as 128 + its number.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Outcome {
    /// Standard output as text without the final newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Fails unless the command ended with code 0.
    pub fn ok(self) -> Result<Self> {
        self.expect_code(0)
    }

    /// Fails unless the command ended with this code.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(
            self.code == code,
            "{}: exit code {} instead of {code}\nstdout: {}\nstderr: {}",
            self.command,
            self.code,
            self.text(),
            self.stderr
        );
        Ok(self)
    }
}

/// A command to be run.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    shown: String,
    limit: Duration,
}

impl Invocation {
    /// A program with arguments.
    pub fn new<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Self {
        let args: Vec<OsString> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        let mut shown = program.to_owned();
        for arg in &args {
            shown.push(' ');
            shown.push_str(&arg.to_string_lossy().chars().take(120).collect::<String>());
        }
        let mut command = Command::new(program);
        command.args(args);
        Self { command, shown, limit: Duration::from_secs(60) }
    }

    /// Another time limit than a minute.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn current_dir(mut self, dir: &std::path::Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Runs it to its end with nothing on stdin.
    pub fn output(self) -> Result<Outcome> {
        self.with_stdin(Stdio::null())?.finish()
    }

    /// Runs it to its end with `input` on stdin.
    pub fn output_with(self, input: &[u8]) -> Result<Outcome> {
        let mut running = self.spawn()?;
        let mut stdin = running.stdin.take().context("no stdin")?;
        let input = input.to_vec();
        std::thread::spawn(move || stdin.write_all(&input));
        running.finish()
    }

    /// Starts it with pipes for stdin, stdout and stderr.
    pub fn spawn(self) -> Result<Running> {
        self.with_stdin(Stdio::piped())
    }

    fn with_stdin(mut self, stdin: Stdio) -> Result<Running> {
        let started = Instant::now();
        let mut child = self
            .command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.shown))?;
        let stderr = child.stderr.take().map(collect);
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Ok(Running { shown: self.shown, limit: self.limit, started, child, stdin, stdout, stderr })
    }
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    shown: String,
    limit: Duration,
    started: Instant,
    child: Child,
    /// Its standard input, until taken or dropped.
    pub stdin: Option<ChildStdin>,
    /// Its standard output, until taken; what is left is collected by `finish`.
    pub stdout: Option<ChildStdout>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl Running {
    /// The process' id.
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id() as i32)
    }

    /// Waits for its end, within the limit counted from the start.
    pub fn finish(mut self) -> Result<Outcome> {
        drop(self.stdin.take());
        let stdout = self.stdout.take().map(collect);
        let stderr = self.stderr.take();
        let pid = self.pid();
        let (tell, told) = mpsc::channel();
        let mut child = self.child;
        std::thread::spawn(move || tell.send(child.wait()));
        let left = (self.started + self.limit).saturating_duration_since(Instant::now());
        let ended = told.recv_timeout(left);
        let took = self.started.elapsed();
        if ended.is_err() {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let join = |t: Option<JoinHandle<Vec<u8>>>| t.and_then(|t| t.join().ok()).unwrap_or_default();
        let (stdout, stderr) = (join(stdout), String::from_utf8_lossy(&join(stderr)).into_owned());
        let Ok(status) = ended else {
            bail!(
                "{}: not ended after {:.1} s\nstdout: {}\nstderr: {stderr}",
                self.shown,
                took.as_secs_f64(),
                String::from_utf8_lossy(&stdout)
            );
        };
        let status = status?;
        let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(-1);
        Ok(Outcome { command: self.shown, code, stdout, stderr, took })
    }
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        // what was read before an error is still worth showing
        let _ = from.read_to_end(&mut all);
        all
    })
}
