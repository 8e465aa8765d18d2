//! Steps as the user sees them: what is done, how long it took, and commands whose failure says what failed.

use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Says what is done, does it, says how long it took.
pub(crate) fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("==> {what}");
    let from = Instant::now();
    let result = work().with_context(|| format!("{what} failed after {}", elapsed(from)))?;
    println!("    {what}: {}", elapsed(from));
    Ok(result)
}

/// A duration as a person reads it.
pub(crate) fn elapsed(from: Instant) -> String {
    let seconds = from.elapsed().as_secs_f64();
    if seconds < 100.0 { format!("{seconds:.1} s") } else { format!("{:.1} min", seconds / 60.0) }
}

/// A program that inherits nothing of the make above it: its job server and variables would change other makes.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    for variable in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "GNUMAKEFLAGS", "DESTDIR", "PREFIX"] {
        command.env_remove(variable);
    }
    command
}

/// Runs it on our terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("`{}` ended with {status}", line(command));
    }
    Ok(())
}

/// Runs it and returns what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("`{}` ended with {status}: {}", line(command), String::from_utf8_lossy(&stderr).trim());
    }
    String::from_utf8(stdout).with_context(|| format!("`{}` printed bytes that are not UTF-8", line(command)))
}

fn cannot_start(command: &Command) -> String {
    format!("`{}` cannot be started: run `make deps`, which installs what is needed", line(command))
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
