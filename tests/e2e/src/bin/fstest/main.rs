//! `make fstest`: pjdfstest, a POSIX file system test suite that others wrote, in a container on a volume: with runc on
//! the host's own file system, with the product by each way of sharing files, then in a root file system on a disk of the
//! VM, and the differences. What runc passes the
//! product must pass too, but for what is listed with reasons in tests/fstest-exceptions.toml.

mod suite;

use anyhow::{Context as _, Result, bail};
use e2e::{NodeSetup, Runtime, install::Install, snapshotter::with_snapshotter, with_node_setup};
use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};
use suite::{Outcome, Place, Results, Suite};

/// Names of tests, or what several begin with, or after a `*` what they end with, and why the product fails them; by the
/// way of sharing files.
type Exceptions = BTreeMap<String, BTreeMap<String, String>>;

/// What is compared: two ways of sharing files, and a root file system on a disk.
const WAYS: [&str; 3] = ["virtio-fs", "virtio-9p", BLOCK];
const BLOCK: &str = "block";

/// MiB of that disk.
const DISK: u64 = 256;

fn main() -> Result<ExitCode> {
    let suite = Suite::from_environment()?;
    let ways = match std::env::var("FSTEST_ONLY") {
        Ok(text) => match WAYS.into_iter().find(|way| *way == text) {
            Some(way) => vec![way],
            None => bail!("FSTEST_ONLY={text}: not one of {}", WAYS.join(", ")),
        },
        Err(_) => WAYS.to_vec(),
    };
    let exceptions = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fstest-exceptions.toml");
    let text = fs::read_to_string(&exceptions).with_context(|| exceptions.display().to_string())?;
    let exceptions: Exceptions = toml::from_str(&text).with_context(|| exceptions.display().to_string())?;

    let host = run(&suite, Runtime::Runc, None)?;
    println!("runc, on the host's file system: {}", host.summary());
    let mut good = true;
    for way in ways {
        let guest = if way == BLOCK { on_disk(&suite)? } else { run(&suite, Runtime::Kata, Some(way))? };
        println!("\nkata, by {way}: {}", guest.summary());
        good &= compare(&host, &guest, exceptions.get(way).unwrap_or(&BTreeMap::new()));
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn on_disk(suite: &Suite) -> Result<Results> {
    let mut results = None;
    with_snapshotter("blockfile", DISK, None, |node| {
        results = Some(suite.run(node, Runtime::Kata, Place::RootFs(&["--snapshotter", "blockfile"]))?);
        Ok(())
    })?;
    results.context("nothing was run")
}

fn run(suite: &Suite, runtime: Runtime, way: Option<&str>) -> Result<Results> {
    let config = way.map(|way| Install::locate()?.config_with(&[("shared_fs", way.into())])).transpose()?;
    let mut results = None;
    with_node_setup(NodeSetup { config, ..NodeSetup::default() }, |node| {
        results = Some(suite.run(node, runtime, Place::Volume)?);
        Ok(())
    })?;
    results.context("nothing was run")
}

/// Tells of every test that does not come out as with runc; whether all of that is known.
fn compare(host: &Results, guest: &Results, exceptions: &BTreeMap<String, String>) -> bool {
    let is = |name: &str, known: &str| match known.strip_prefix('*') {
        Some(end) => name.ends_with(end),
        None => name.starts_with(known),
    };
    let reason = |name: &str| exceptions.iter().find(|(known, _)| is(name, known));
    let mut used = Vec::new();
    let mut good = true;
    for (name, outcome) in &host.0 {
        let other = guest.0.get(name);
        if *outcome != Outcome::Passed || matches!(other, Some(Outcome::Passed)) {
            continue;
        }
        let shown = match other {
            Some(Outcome::Failed(why)) => why.as_str(),
            Some(Outcome::Skipped) => "skipped",
            Some(Outcome::Passed) | None => "not run",
        };
        if let Some((known, why)) = reason(name) {
            used.push(known);
            println!("  known    {name}: {why}");
        } else {
            println!("  NEW      {name}: {shown}");
            good = false;
        }
    }
    for known in exceptions.keys().filter(|known| !used.contains(known)) {
        println!("  STALE    {known}: nothing of it differs");
        good = false;
    }
    for (name, outcome) in &guest.0 {
        if *outcome == Outcome::Passed && host.0.get(name) != Some(outcome) {
            println!("  better   {name}: passes here, not with runc");
        }
    }
    good
}
