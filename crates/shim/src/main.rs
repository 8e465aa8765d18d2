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

const HELP: &str = "\
The containerd shim of Kata Containers, which runs the containers of a pod in a virtual machine. containerd starts it for
the runtime io.containerd.kata.v2; administrators use kata-runtime.

Usage: containerd-shim-kata-v2 [FLAGS] [ACTION]

Actions:
  start      Start the server of a sandbox, or find the one that runs, and print its address
  delete     Clean up a container whose server has exited
  features   Print the OCI features document
  (none)     Serve a sandbox, on a socket that `start` passes on

Flags, with one dash or two:
  -namespace NAME   containerd's namespace
  -id ID            The container
  -bundle PATH      The container's bundle, for `delete`
  -address PATH     containerd's socket
  -debug            Log debug messages
  -info             Print information on the runtime, in protobuf, as containerd 2 asks for it
  -v, -version      Print the version
  -h, -help         Print this help

Configuration: kata-configuration(5)
";

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
    if args.help {
        let _ = std::io::stdout().write_all(HELP.as_bytes());
        return Ok(());
    }
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
        other => anyhow::bail!("unknown action {other:?}: must be start, delete or features, see -help"),
    }
}
