//! Compiles the product: shim and command line for the host, the agent as one static program for the guest.

use anyhow::Result;

use crate::step;
use crate::workspace::{Workspace, triple};

/// The host's programs and the agent.
pub(crate) fn all(workspace: &Workspace) -> Result<()> {
    host(workspace)?;
    agent(workspace)
}

/// The shim and kata-runtime.
pub(crate) fn host(workspace: &Workspace) -> Result<()> {
    step::timed("compiling the shim and kata-runtime", || {
        step::run(cargo(workspace).args(["build", "--release", "--package", "shim", "--package", "kata-runtime"]))
    })
}

/// The agent. glibc's static start-up code serves where Rust has no musl target; libseccomp comes from Debian.
pub(crate) fn agent(workspace: &Workspace) -> Result<()> {
    step::timed("compiling the static agent", || {
        step::run(
            cargo(workspace)
                .args(["build", "--release", "--package", "agent", "--target", &triple()])
                .env("RUSTFLAGS", "-C target-feature=+crt-static")
                .env("LIBSECCOMP_LINK_TYPE", "static")
                .env("LIBSECCOMP_LIB_PATH", format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH)),
        )
    })
}

/// The cargo that runs us, in the checkout.
pub(crate) fn cargo(workspace: &Workspace) -> std::process::Command {
    let program = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = step::command(&program);
    command.current_dir(workspace.root());
    command
}
