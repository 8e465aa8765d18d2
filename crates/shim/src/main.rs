//! `containerd-shim-kata-v2`: one process a pod, between containerd and the pod's VM.

mod args;
mod bootstrap;
mod capabilities;
mod convert;
mod events;
mod handshake;
mod info;
mod logger;
mod metrics;
mod server;
mod task;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use runtime::anchor::inside as anchor;

fn main() -> ExitCode {
    if anchor::is_wanted() {
        anchor::run();
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what is on standard error
            let _ = writeln!(std::io::stderr(), "containerd-shim-kata-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args = args::parse(std::env::args().skip(1))?;
    if args.version {
        let _ = writeln!(std::io::stdout(), "containerd-shim-kata-v2 {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if args.info {
        std::io::stdout().write_all(&info::answer()?)?;
        return Ok(());
    }
    match args.action.as_str() {
        "start" => bootstrap::start(&args),
        "delete" => bootstrap::delete(&args),
        "features" => {
            let _ = writeln!(std::io::stdout(), "{:#}", info::features());
            Ok(())
        }
        "" => server::run(&args),
        other => anyhow::bail!("unknown action {other:?}: start, delete, features, or nothing for the server"),
    }
}
