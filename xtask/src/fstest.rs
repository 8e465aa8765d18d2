//! `make fstest`: builds pjdfstest, a file system test suite, once from crates.io and outside the checkout, and lets
//! tests/e2e run it in containers.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};

use crate::compile::cargo;
use crate::workspace::{Workspace, triple};
use crate::{cache, step};

/// The suite's version.
const VERSION: &str = "0.2.2";

/// Runs the suite with runc and with the product, and tells the difference.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    if !workspace.has_end_to_end_tests() {
        bail!("make fstest is part of tests/e2e, which this checkout does not have");
    }
    let suite = step::timed("providing pjdfstest", || provide(workspace))?;
    step::timed("file system tests", || {
        let mut command = cargo(workspace);
        command.args(["run", "--package", "e2e", "--bin", "fstest"]).env("FSTEST_PROGRAM", suite);
        step::run(command.env("KATA_PREFIX", workspace.test_prefix()).env("KATA_CLIENTS", workspace.test_clients()))
    })
}

/// One static program, since containers bring their own libraries or none.
fn provide(workspace: &Workspace) -> Result<PathBuf> {
    let cache = cache::folder("kata-clients")?;
    let _alone = cache::lock(&cache)?;
    let kept = cache.join(format!("pjdfstest-{VERSION}"));
    let program = kept.join("bin/pjdfstest");
    if !program.is_file() {
        let mut command = cargo(workspace);
        command.args(["install", "pjdfstest", "--locked", "--version", VERSION, "--target", &triple(), "--root"]);
        step::run(command.arg(&kept).env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
        ensure!(program.is_file(), "cargo install pjdfstest made no {}", program.display());
    }
    Ok(program)
}
