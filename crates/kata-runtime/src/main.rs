//! `kata-runtime`: what an administrator or a storage driver asks of the host's side, in Kata's words.
//!
//! Owns the command line; a file a subcommand. What they do is the `runtime` crate's.

mod direct_volume;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The host's side of Kata Containers.
#[derive(Debug, Parser)]
#[command(name = "kata-runtime", version, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Block devices of the host that pods mount as volumes, past the host's own file systems
    #[command(subcommand)]
    DirectVolume(direct_volume::Command),
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "kata-runtime: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::DirectVolume(command) => direct_volume::run(&command),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_whole() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
