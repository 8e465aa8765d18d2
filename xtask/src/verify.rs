//! What `make check`, `make test`, `make clients`, `make bench`, `make conformance` and `make soak` run, and in which
//! order.

use anyhow::{Result, bail};

use crate::compile::cargo;
use crate::docs;
use crate::failures;
use crate::step;
use crate::tidy;
use crate::workspace::Workspace;

/// Formatting and generated documentation, then lints: the cheap answers first.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    step::timed("checking the formatting (make fmt repairs it)", || {
        step::run(cargo(workspace).args(["fmt", "--all", "--check"]))
    })?;
    step::timed("comparing docs/configuration.md with the table of keys", || docs::compare(workspace))?;
    step::timed("the shape of the source", || tidy::check(workspace))?;
    step::timed("clippy", || {
        let arguments = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        step::run(cargo(workspace).args(arguments))
    })
}

/// Every test that needs no VM.
pub(crate) fn unit_tests(workspace: &Workspace) -> Result<()> {
    step::timed("unit tests", || {
        let mut command = cargo(workspace);
        command.args(["test", "--workspace"]);
        if workspace.has_end_to_end_tests() {
            command.args(["--exclude", "e2e"]);
        }
        step::run(&mut command)
    })
}

/// The tests in VMs, one after the other: they look for what others leave behind.
pub(crate) fn end_to_end(workspace: &Workspace) -> Result<()> {
    if !workspace.has_end_to_end_tests() {
        println!("==> end-to-end tests: this checkout has no tests/e2e");
        return Ok(());
    }
    step::timed("end-to-end tests", || {
        let arguments = ["test", "--package", "e2e", "--no-fail-fast", "--", "--test-threads=1", "--nocapture"];
        let mut command = cargo(workspace);
        command.args(arguments).env("KATA_PREFIX", workspace.test_prefix());
        failures::run(command.env("KATA_CLIENTS", workspace.test_clients()))
    })
}

/// All that nerdctl, Docker and kubelet are tried with; `make test` has the shortest of it.
pub(crate) fn clients(workspace: &Workspace) -> Result<()> {
    if !workspace.has_end_to_end_tests() {
        bail!("make clients is part of tests/e2e, which this checkout does not have");
    }
    step::timed("nerdctl, Docker and kubelet", || {
        let mut command = cargo(workspace);
        command.args(["test", "--package", "e2e", "--no-fail-fast"]);
        for client in ["nerdctl", "docker", "kubelet"] {
            command.args(["--test", client]);
        }
        command.args(["--", "--include-ignored", "--test-threads=1", "--nocapture"]);
        command.env("KATA_PREFIX", workspace.test_prefix()).env("KATA_CLIENTS", workspace.test_clients());
        failures::run(&mut command)
    })
}

/// The figures, and how far they are from their bars.
pub(crate) fn bench(workspace: &Workspace) -> Result<()> {
    if !workspace.has_end_to_end_tests() {
        bail!("make bench is part of tests/e2e, which this checkout does not have");
    }
    step::timed("benchmark", || {
        let arguments = ["run", "--release", "--package", "e2e", "--bin", "bench"];
        let mut command = cargo(workspace);
        command.args(arguments).env("KATA_PREFIX", workspace.test_prefix());
        step::run(command.env("KATA_CLIENTS", workspace.test_clients()))
    })
}

/// Pods that come and go for so long, with each containerd, and what there is on the machine before and after.
pub(crate) fn soak(workspace: &Workspace, seconds: &str) -> Result<()> {
    if !workspace.has_end_to_end_tests() {
        bail!("make soak is part of tests/e2e, which this checkout does not have");
    }
    step::timed("pods come and go", || {
        let mut command = cargo(workspace);
        command.args(["test", "--package", "e2e", "--test", "pods", "pods_come_and_go", "--", "--nocapture"]);
        command.env("KATA_PREFIX", workspace.test_prefix()).env("KATA_CLIENTS", workspace.test_clients());
        step::run(command.env("KATA_POD_SECONDS", seconds))
    })
}

/// critest against both runtimes; `focus` is a regular expression of the tests' names, all without one.
pub(crate) fn conformance(workspace: &Workspace, focus: &[String]) -> Result<()> {
    if !workspace.has_end_to_end_tests() {
        bail!("make conformance is part of tests/e2e, which this checkout does not have");
    }
    step::timed("conformance", || {
        let mut command = cargo(workspace);
        command.args(["run", "--package", "e2e", "--bin", "conformance", "--"]).args(focus);
        command.env("KATA_PREFIX", workspace.test_prefix()).env("KATA_CLIENTS", workspace.test_clients());
        step::run(&mut command)
    })
}
