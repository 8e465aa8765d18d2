//! `make run`: one container in a VM through a containerd of our own, and what there is to say about it.

use std::env;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::containerd::{Containerd, tail};
use crate::signals::{Signals, Woken, pidfd, wait_readable};
use crate::workspace::{CONFIGURATION, SHIM, Workspace};
use crate::{image, step};

/// Set for the pass that sudo runs.
const SECOND_PASS: &str = "KATA_RUN_PREPARED";

/// Another runtime, to compare with.
const RUNTIME: &str = "KATA_RUN_RUNTIME";

/// What is run when nothing is asked for.
const SHOW_THE_KERNEL: [&str; 2] = ["uname", "-r"];

/// How long ctr may take to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether everything is built and installed already.
pub(crate) fn is_second_pass() -> bool {
    env::var_os(SECOND_PASS).is_some()
}

/// Runs `command`, or shows the kernel where there is none; everything is gone when it returns.
pub(crate) fn run(workspace: &Workspace, command: &[String]) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        return as_root(command);
    }
    let signals = Signals::hold()?;
    let prefix = workspace.run_prefix();
    let runtime = env::var(RUNTIME).unwrap_or_else(|_| "io.containerd.kata.v2".into());
    let shims = prefix.join(SHIM).parent().map(Path::to_owned).context("the shim has no folder")?;
    let containerd = step::timed("starting a private containerd", || {
        Containerd::start(&signals, &shims, &prefix.join(CONFIGURATION))
    })?;
    step::timed("building and importing the image", || {
        let archive = containerd.folder().join("image.tar");
        image::write(&archive)?;
        let mut import = containerd.ctr();
        import.args(["image", "import"]).arg(&archive).stdin(Stdio::null()).stdout(Stdio::null());
        let ended = wait(&signals, &mut signals.spawn(&mut import)?)?.context("interrupted")?;
        ensure!(ended.success(), "`ctr image import` ended with {ended}");
        Ok(())
    })?;

    let shown = command.is_empty();
    let command: Vec<&str> = if shown { SHOW_THE_KERNEL.into() } else { command.iter().map(String::as_str).collect() };
    // the host's first start has its probe in it, once for each boot of the host: the time that we show is a second one's
    let ids: &[&str] = if shown { &["first", "second"] } else { &["demo"] };
    let mut runs = Vec::new();
    for id in ids {
        let one = Run::of(&signals, &containerd, &runtime, id, &command, shown)?;
        let is_good = one.ended.is_some_and(|status| status.success());
        runs.push(one);
        if !is_good {
            break;
        }
    }
    let Some(last) = runs.last_mut() else { return Ok(ExitCode::FAILURE) };
    if last.ended.is_none() {
        println!("    interrupted: cleaning up");
    }
    // ends the container, so that a ctr which still waits for it can end too
    let log = containerd.stop()?;
    let Some(status) = last.ended else {
        give_up(&mut last.child)?;
        return Ok(ExitCode::from(130));
    };
    if shown && status.success() {
        print!("{}", report(&runs, &log)?);
    } else if shown {
        eprintln!("xtask: the container did not run; containerd's and the shim's last words:\n{}", tail(&log));
    } else {
        print!("{}", steps(&log));
    }
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

/// One `ctr run`.
struct Run {
    child: Child,
    /// Nothing when someone wanted us to end before.
    ended: Option<ExitStatus>,
    took: String,
    printed: String,
    /// How much log there was before.
    log_from: usize,
}

impl Run {
    /// Runs it to its end. What it prints is taken, or else it has our terminal.
    fn of(
        signals: &Signals,
        containerd: &Containerd,
        runtime: &str,
        id: &str,
        command: &[&str],
        is_taken: bool,
    ) -> Result<Self> {
        let output = containerd.folder().join(id);
        let terminal = !is_taken && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        let t = if terminal { "-t " } else { "" };
        println!("==> ctr run --rm {t}--runtime {runtime} {} {id} {}", image::NAME, command.join(" "));
        let mut ctr = containerd.ctr();
        ctr.args(["run", "--rm", "--runtime", runtime]);
        if terminal {
            ctr.arg("-t");
        }
        ctr.args([image::NAME, id]).args(command);
        if is_taken {
            ctr.stdin(Stdio::null()).stdout(File::create(&output)?);
        }
        let log_from = containerd.log().len();
        let from = Instant::now();
        let mut child = signals.spawn(&mut ctr)?;
        let ended = wait(signals, &mut child)?;
        let took = step::elapsed(from);
        let printed = fs::read_to_string(&output).unwrap_or_default();
        Ok(Self { child, ended, took, printed, log_from })
    }
}

/// The same once more through sudo: containerd and virtual machines need root, compiling does not.
fn as_root(command: &[String]) -> Result<ExitCode> {
    println!("==> containerd needs root: asking sudo");
    let mut sudo = Command::new("sudo");
    sudo.arg("env").arg(format!("{SECOND_PASS}=1"));
    for name in ["PATH", "CARGO_TARGET_DIR", "TERM", RUNTIME] {
        if let Ok(value) = env::var(name) {
            sudo.arg(format!("{name}={value}"));
        }
    }
    let failed = sudo.arg(env::current_exe()?).args(["run", "--"]).args(command).exec();
    Err(failed).context("sudo cannot be started: run `make run` as root")
}

/// Until it has ended; nothing when someone wants us to end.
fn wait(signals: &Signals, child: &mut Child) -> Result<Option<ExitStatus>> {
    let ended = pidfd(child)?;
    match signals.wait(&[ended.as_fd()], None)? {
        Woken::Ready(_) => child.wait().map(Some).context("ctr cannot be waited for"),
        Woken::Asked | Woken::TimedOut => Ok(None),
    }
}

/// Its containerd is gone, so it ends by itself, or has no reason to live.
fn give_up(child: &mut Child) -> Result<()> {
    if child.try_wait()?.is_none() && !wait_readable(pidfd(child)?.as_fd(), PATIENCE)? {
        child.kill().context("ctr cannot be killed")?;
    }
    child.wait().context("ctr cannot be waited for")?;
    Ok(())
}

fn report(runs: &[Run], log: &str) -> Result<String> {
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").context("the host's kernel cannot be read")?;
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(String::new()) };
    let mut text = format!(
        "\nthe host's kernel       {}\nthe container's kernel  {}\nctr run took            {} (the first one {}: it looks \
         what the host can do, where nothing has since its boot)\n",
        host.trim(),
        last.printed.trim(),
        last.took,
        first.took
    );
    text += &steps(log.get(last.log_from..).unwrap_or_default());
    text += "\nnext:\n  \
             make run ARGS=\"sh\"                    a shell in a VM\n  \
             make run ARGS=\"cat /proc/cmdline\"     any command of busybox\n  \
             make install                          for a containerd of yours; then:\n  \
             ctr run --rm -t --runtime io.containerd.kata.v2 IMAGE NAME sh\n  \
             make test                             everything that is claimed, tried in VMs\n  \
             make bench                            the figures, beside runc's\n";
    Ok(text)
}

/// Where the time of the start went, from the shim's own trace in containerd's log.
fn steps(log: &str) -> String {
    let mut text = String::new();
    let mut before = 0.0;
    for (name, at) in log.lines().filter_map(traced) {
        if text.is_empty() {
            text += "\nthe shim's steps, ms since containerd's create call (and since the step before):\n";
        }
        // writing to a String does not fail
        let _ = writeln!(text, "  {name:<24} {at:>8.1}  (+{:.1})", at - before);
        before = at;
    }
    text
}

/// The name and moment in `… start-trace step=NAME ms=NUMBER …`.
fn traced(line: &str) -> Option<(&str, f64)> {
    let (_, rest) = line.split_once("start-trace step=")?;
    let (name, rest) = rest.split_once(" ms=")?;
    let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    Some((name, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_lines_are_found_in_a_log() {
        let log =
            "time=\"x\" level=info msg=\"start-trace step=vm ms=12.5\" id=a\nother\n… start-trace step=agent ms=20.0\n";
        assert_eq!(log.lines().filter_map(traced).collect::<Vec<_>>(), [("vm", 12.5), ("agent", 20.0)]);
        assert!(steps(log).contains("(+7.5)"));
        assert_eq!(steps("nothing"), "");
    }
}
