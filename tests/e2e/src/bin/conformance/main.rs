//! `make conformance`: Kubernetes' own tests of a CRI server, critest, against runc and against the product with the same
//! containerd, one of each generation, and the difference. What runc passes here the product must pass too, but for what no virtual machine can:
//! that is listed, with reasons, in tests/conformance-exceptions.toml.

mod compare;
mod critest;
mod images;
mod registry;

use anyhow::{Context as _, Result};
use compare::{Exceptions, Report};
use e2e::{
    BOTH, Containerd, NodeSetup,
    cri::{Network, with_cri},
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

fn main() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.is_empty()).collect();
    let focus = (!words.is_empty()).then(|| words.join(" "));
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let exceptions = compare::exceptions(&here.join("../conformance-exceptions.toml"))?;
    let work = tempfile::Builder::new().prefix("kata-conformance-").tempdir()?;
    let hosts = work.path().join("registries");
    registry::serve(images::make(work.path()).context("making the images")?, &hosts)?;

    let mut good = true;
    for containerd in Containerd::chosen()? {
        let folder = here.join("../../target/conformance").join(containerd.name());
        std::fs::create_dir_all(&folder)?;
        let comparison =
            Comparison { containerd, hosts: &hosts, focus: focus.as_deref(), folder: folder.canonicalize()? };
        good &= comparison.make(&exceptions);
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Both runtimes under one containerd.
struct Comparison<'a> {
    containerd: Containerd,
    /// Where the registries are.
    hosts: &'a Path,
    focus: Option<&'a str>,
    /// For what critest and containerd say.
    folder: PathBuf,
}

impl Comparison<'_> {
    /// Prints the difference; whether it is good enough.
    fn make(&self, exceptions: &Exceptions) -> bool {
        println!("\ncontainerd {}", self.containerd.name());
        let (mut runs, mut trouble) = (Vec::new(), Vec::new());
        // a node for each: what one leaves behind is not the other's trouble
        for runtime in BOTH {
            let setup = NodeSetup { containerd: self.containerd, settings: self.settings(), ..NodeSetup::default() };
            let done = with_cri(setup, Network::default(), |cri| {
                let run = critest::run(cri, runtime, self.focus, &self.folder);
                let log = self.folder.join(format!("{}-containerd.log", runtime.tag()));
                std::fs::write(log, cri.node.log.lines_from(0).join("\n"))?;
                runs.push(run?);
                Ok(())
            });
            // such as something left on the host: told after the comparison, which is there nevertheless
            trouble.extend(done.err().map(|error| error.context(format!("critest with {}", runtime.tag()))));
        }
        let good = match runs.as_slice() {
            [runc, kata] => {
                let report = Report::new(runc, kata, exceptions, self.focus.is_none());
                print!("{report}");
                report.is_good()
            }
            _ => false,
        };
        println!("critest's own words: {}/*.log", self.folder.display());
        for error in &trouble {
            eprintln!("Error: {error:#}");
        }
        good && trouble.is_empty()
    }

    /// Names the registries to containerd.
    fn settings(&self) -> String {
        let plugin = match self.containerd {
            Containerd::Debian | Containerd::V1_7 => "io.containerd.grpc.v1.cri",
            Containerd::V2 => "io.containerd.cri.v1.images",
        };
        format!("[plugins.{plugin:?}.registry]\nconfig_path = {:?}\n", self.hosts.display().to_string())
    }
}
