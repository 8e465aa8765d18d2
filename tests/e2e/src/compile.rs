//! Small programs that busybox does not have: static, so that any root file system will do.

use anyhow::{Context as _, Result, ensure};
use std::{fs, path::Path, process::Command};

/// Compiles a C program that needs nothing else to run, and returns it.
pub fn compile(dir: &Path, name: &str, text: &str) -> Result<Vec<u8>> {
    let (source, program) = (dir.join(format!("{name}.c")), dir.join(name));
    fs::write(&source, text)?;
    let compiled = Command::new("gcc").args(["-O2", "-static", "-o"]).arg(&program).arg(&source).output();
    let compiled = compiled.context("gcc: not found: run `apt-get install gcc libc6-dev`")?;
    ensure!(compiled.status.success(), "gcc: {}", String::from_utf8_lossy(&compiled.stderr));
    Ok(fs::read(&program)?)
}
