//! `kata-runtime`: what an administrator or a storage driver asks of the host's side, in Kata's words.
//!
//! Owns the command line; a file a subcommand. What they do is the `runtime` crate's.

mod direct_volume;
mod factory;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Administer Kata Containers on this host: VM templates, the pool of VMs, and direct volumes.
#[derive(Debug, Parser)]
#[command(name = "kata-runtime", version, arg_required_else_help = true)]
struct Args {
    /// Configuration file to use instead of the first one found, see kata-configuration(5)
    #[arg(long, visible_alias = "kata-config", global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Manage direct volumes: block devices of the host that the VM mounts itself
    #[command(subcommand)]
    DirectVolume(direct_volume::Command),
    /// Manage VM templates, from which the VMs of pods are cloned, and the pool of VMs that are kept ready
    #[command(subcommand)]
    Factory(factory::Command),
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "kata-runtime: {}", words(&error));
            ExitCode::FAILURE
        }
    }
}

/// Each cause once, since the libraries' errors say theirs themselves; and what to do where we may not.
fn words(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    let mut systems = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    if systems.any(|cause| cause.kind() == ErrorKind::PermissionDenied) {
        text += ": run it as root";
    }
    text
}

fn run(args: Args) -> Result<()> {
    match args.command {
        Command::DirectVolume(command) => direct_volume::run(&command),
        Command::Factory(command) => factory::run(&command, args.config.as_deref()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_its_cause_once() {
        let denied = || std::io::Error::from(ErrorKind::PermissionDenied);
        let library = runtime::Error::Host { what: "/run/x".into(), source: denied() };
        assert_eq!(words(&library.into()), "/run/x: permission denied: run it as root");
        assert_eq!(words(&anyhow::Error::new(denied()).context("/run/x")), "/run/x: permission denied: run it as root");
        assert_eq!(words(&anyhow::anyhow!("b").context("a")), "a: b");
    }

    #[test]
    fn the_command_line_is_whole() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
