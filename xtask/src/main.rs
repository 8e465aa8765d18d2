//! What the Makefile calls. Owns the order of the steps and what the user sees of them; what each step does lives in
//! its own module. Debian's packages are not its business: scripts/deps.sh has run before.

mod cache;
mod clients;
mod compile;
mod containerd;
mod demo;
mod docs;
mod failures;
mod fstest;
mod guest_image;
mod image;
mod initrd;
mod install;
mod kernel;
mod nested;
mod signals;
mod step;
mod tar;
mod tidy;
mod verify;
mod workspace;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::workspace::Workspace;

const USAGE: &str = "usage: cargo run -p xtask -- TASK

Tasks, most of them those of `make help`:
  build                  compile the shim, kata-runtime and the agent
  guest                  build the guest's kernel, initrd and image into dist/
  install                install into DESTDIR and PREFIX, which are environment variables
  run [COMMAND…]         run a container in a VM with a containerd of its own
  check                  check formatting, docs/configuration.md, the shape of the source, and lints
  test                   check, unit tests, end-to-end tests
  clients                build the test clients that Debian does not have
  client-tests           run all tests with nerdctl, Docker and kubelet
  nested [TEST…]         run end-to-end tests in a VM that has KVM and vhost-vsock
  bench                  measure
  fstest                 run the file system test suite
  conformance [FOCUS]    run critest; FOCUS is a regular expression of test names
  soak [SECONDS]         create and delete pods and report what is left behind
  docs                   write docs/configuration.md from the table of keys
  tidy                   check the shape of the source
  image FILE             write a small container image";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<ExitCode> {
    let workspace = Workspace::locate()?;
    let Some((task, rest)) = arguments.split_first() else { bail!("{USAGE}") };
    match (task.as_str(), rest) {
        ("help" | "-h" | "--help", _) => println!("{USAGE}"),
        ("build", []) => compile::all(&workspace)?,
        ("guest", []) => guest(&workspace)?,
        ("install", []) => return install::from_environment(&workspace),
        ("run", rest) => {
            let command = rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest);
            // the second pass, as root: everything is built and installed already
            if !demo::is_second_pass() {
                prepare(&workspace, &workspace.run_prefix())?;
            }
            return demo::run(&workspace, command);
        }
        ("test", []) => {
            prepare(&workspace, &workspace.test_prefix())?;
            verify::check(&workspace)?;
            verify::unit_tests(&workspace)?;
            clients::provide(&workspace)?;
            verify::end_to_end(&workspace)?;
        }
        ("clients", []) => clients::provide(&workspace)?,
        ("client-tests", []) => {
            prepare(&workspace, &workspace.test_prefix())?;
            clients::provide(&workspace)?;
            verify::clients(&workspace)?;
        }
        ("nested", tests) => {
            prepare(&workspace, &workspace.test_prefix())?;
            let tests = tests.strip_prefix(&["--".to_owned()]).unwrap_or(tests);
            // the tests that it runs by itself need none of them
            if !tests.is_empty() {
                clients::provide(&workspace)?;
            }
            nested::run(&workspace, tests)?;
        }
        ("bench", []) => {
            prepare(&workspace, &workspace.test_prefix())?;
            clients::provide(&workspace)?;
            verify::bench(&workspace)?;
        }
        ("fstest", []) => {
            prepare(&workspace, &workspace.test_prefix())?;
            clients::provide(&workspace)?;
            fstest::run(&workspace)?;
        }
        ("conformance", focus) => {
            prepare(&workspace, &workspace.test_prefix())?;
            clients::provide(&workspace)?;
            verify::conformance(&workspace, focus.strip_prefix(&["--".to_owned()]).unwrap_or(focus))?;
        }
        ("soak", [] | [_]) => {
            prepare(&workspace, &workspace.test_prefix())?;
            clients::provide(&workspace)?;
            verify::soak(&workspace, rest.first().map_or("300", String::as_str))?;
        }
        ("docs", []) => docs::write(&workspace)?,
        ("check", []) => verify::check(&workspace)?,
        ("tidy", []) => tidy::check(&workspace)?,
        ("image", [file]) => step::timed("building the busybox image", || image::write(Path::new(file)))?,
        ("image", _) => bail!("image needs the name of the file to write: cargo run -p xtask image busybox.tar"),
        _ => bail!("unknown task {:?}\n{USAGE}", arguments.join(" ")),
    }
    Ok(ExitCode::SUCCESS)
}

/// Kernel, initrd and image into dist/.
fn guest(workspace: &Workspace) -> Result<()> {
    kernel::provide(workspace)?;
    compile::agent(workspace)?;
    initrd::provide(workspace)?;
    guest_image::provide(workspace)
}

/// Everything, installed below `prefix`.
fn prepare(workspace: &Workspace, prefix: &Path) -> Result<()> {
    compile::host(workspace)?;
    guest(workspace)?;
    install::below(workspace, Path::new(""), prefix)
}
