//! `make conformance`: Kubernetes' own tests of a CRI server, critest, against runc and against the product with the same
//! containerd, and the difference. What runc passes here the product must pass too, but for what no virtual machine can:
//! that is listed, with reasons, in tests/conformance-exceptions.toml.

mod compare;
mod critest;
mod images;
mod registry;

use anyhow::{Context as _, Result};
use compare::Report;
use e2e::{
    BOTH, NodeSetup,
    cri::{Network, with_cri},
};
use std::{path::Path, process::ExitCode};

fn main() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.is_empty()).collect();
    let focus = (!words.is_empty()).then(|| words.join(" "));
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let exceptions = compare::exceptions(&here.join("../conformance-exceptions.toml"))?;
    let folder = here.join("../../target/conformance");
    std::fs::create_dir_all(&folder)?;
    let folder = folder.canonicalize()?;

    let work = tempfile::Builder::new().prefix("kata-conformance-").tempdir()?;
    let hosts = work.path().join("registries");
    registry::serve(images::make(work.path()).context("making the images")?, &hosts)?;
    let settings =
        format!("[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = {:?}\n", hosts.display().to_string());

    let (mut runs, mut trouble) = (Vec::new(), Vec::new());
    // a node for each: what one leaves behind is not the other's trouble
    for runtime in BOTH {
        let setup = NodeSetup { settings: settings.clone(), ..NodeSetup::default() };
        let done = with_cri(setup, Network::default(), |cri| {
            let run = critest::run(cri, runtime, focus.as_deref(), &folder);
            let log = folder.join(format!("{}-containerd.log", runtime.tag()));
            std::fs::write(log, cri.node.log.lines_from(0).join("\n"))?;
            runs.push(run?);
            Ok(())
        });
        // such as something left on the host: told after the comparison, which is there nevertheless
        trouble.extend(done.err().map(|error| error.context(format!("critest with {}", runtime.tag()))));
    }
    let good = match runs.as_slice() {
        [runc, kata] => {
            let report = Report::new(runc, kata, &exceptions, focus.is_none());
            print!("{report}");
            report.is_good()
        }
        _ => false,
    };
    println!("critest's own words: {}/*.log", folder.display());
    for error in &trouble {
        eprintln!("Error: {error:#}");
    }
    Ok(if good && trouble.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
