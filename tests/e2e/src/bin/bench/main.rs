//! `make bench`: what a container in a VM costs here, beside runc and beside the bare boot of the same kernel, all
//! measured in one run on one machine. Prints a table, writes target/bench.json, and says of each bar whether it holds.

mod by_hand;
mod cgroup;
mod cost;
mod crowd;
mod floor;
mod initrd;
mod network;
mod pod;
mod pool;
mod report;
mod restore;
mod sample;
mod storage;
mod timeline;
mod warm;

use anyhow::{Context as _, Result, bail};
use e2e::{Node, Runtime, install::Install, with_node};
use report::Report;
use sample::Sample;
use std::path::Path;

fn main() -> Result<()> {
    let rounds = match std::env::var("BENCH_ROUNDS") {
        Ok(text) => text.parse().with_context(|| format!("BENCH_ROUNDS={text}: not a number: give 9 or more"))?,
        Err(_) => 9,
    };
    let install = Install::locate()?;
    let parts = Parts::from_environment()?;
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    std::fs::create_dir_all(&target).context("target")?;
    let mut report = Report::default();
    if parts.include("floor") {
        floor::measure(&install, rounds, &mut report)?;
        restore::measure(&install, rounds, &mut report)?;
    }
    with_node(|node| {
        if parts.include("start") {
            starts(node, rounds, &mut report)?;
        }
        if parts.include("image") {
            image(node, rounds, &mut report)?;
        }
        if parts.include("exec") {
            execs(node, rounds, &mut report)?;
        }
        if parts.include("memory") {
            cost::memory(node, rounds, &mut report)?;
        }
        Ok(())
    })?;
    if parts.include("agent") {
        cost::agent(&install, rounds, &mut report)?;
    }
    if parts.include("warm") {
        warm::measure(&install, rounds, &mut report)?;
    }
    if parts.include("timeline") {
        timeline::measure(&install, &target.join("timeline.svg"))?;
    }
    if parts.include("side") {
        crowd::measure_memory(&install, &mut report)?;
    }
    if parts.include("crowd") {
        crowd::measure_rates(&install, &mut report)?;
    }
    if parts.include("pod") {
        pod::measure(rounds, &mut report)?;
    }
    if parts.include("network") {
        network::measure(&install, rounds, &mut report)?;
    }
    if parts.include("storage") {
        storage::measure(&install, rounds, &mut report)?;
    }
    cost::sizes(&install, &mut report);
    report.judge();
    print!("{report}");
    let out = target.join("bench.json");
    std::fs::write(&out, format!("{:#}\n", report.json())).with_context(|| out.display().to_string())?;
    println!("\nwritten to {}", out.canonicalize()?.display());
    Ok(())
}

/// What to measure, by `BENCH_ONLY`, a list of names with commas between them; without it all but the longest.
struct Parts(Option<Vec<String>>);

impl Parts {
    const ALL: [&str; 13] = [
        "floor", "start", "image", "exec", "memory", "agent", "warm", "timeline", "side", "pod", "network", "storage",
        "crowd",
    ];
    /// Those that take longer than all others together.
    const ONLY_IF_NAMED: [&str; 1] = ["crowd"];

    fn from_environment() -> Result<Self> {
        let Ok(text) = std::env::var("BENCH_ONLY") else { return Ok(Self(None)) };
        let wanted: Vec<_> = text.split(',').map(str::to_owned).collect();
        match wanted.iter().find(|part| !Self::ALL.contains(&part.as_str())) {
            Some(part) => bail!("BENCH_ONLY: {part:?} is not one of {}", Self::ALL.join(", ")),
            None => Ok(Self(Some(wanted))),
        }
    }

    /// Whether this one is to be measured; says so.
    fn include(&self, part: &str) -> bool {
        let included = match &self.0 {
            Some(wanted) => wanted.iter().any(|one| one == part),
            None => !Self::ONLY_IF_NAMED.contains(&part),
        };
        if included {
            eprintln!("{part}");
        }
        included
    }
}

/// `ctr run --rm … true`; the runtimes take turns, so that both meet the same noise of the machine.
fn starts(node: &Node, rounds: usize, report: &mut Report) -> Result<()> {
    let (mut runc, mut kata) = (Sample::new(), Sample::new());
    let mut first_line = 0;
    for round in 0..=rounds {
        if round == 1 {
            first_line = node.log.len();
        }
        for (runtime, sample) in [(Runtime::Runc, &mut runc), (Runtime::Kata, &mut kata)] {
            let done = node.run(runtime, &format!("start{round}"), &[], &["true"]).output()?.ok()?;
            if round > 0 {
                sample.add_time(done.took);
            }
        }
    }
    report.add("run.runc", "ctr run --rm … true, runc", runc, "ms");
    report.add("run.kata", "ctr run --rm … true, kata", kata, "ms");
    steps(&node.log.lines_from(first_line), report);
    Ok(())
}

/// The same start with the guest's image instead of its initrd; they take turns.
fn image(node: &Node, rounds: usize, report: &mut Report) -> Result<()> {
    let configs = [node.install().config(), node.install().image_config()].map(|path| path.display().to_string());
    let mut samples = [Sample::new(), Sample::new()];
    for round in 0..=rounds {
        for (config, sample) in configs.iter().zip(&mut samples) {
            let options = ["--runtime-config-path", config];
            let done = node.run(Runtime::Kata, &format!("image{round}"), &options, &["true"]).output()?.ok()?;
            if round > 0 {
                sample.add_time(done.took);
            }
        }
    }
    let [initrd, image] = samples;
    report.add("image.initrd", "ctr run --rm … true, from the initrd", initrd, "ms");
    report.add("image.image", "ctr run --rm … true, from the image with dm-verity", image, "ms");
    Ok(())
}

/// The shim's own trace of the starts: the time from its begin to each step's end.
fn steps(log: &[String], report: &mut Report) {
    let mut steps: Vec<(String, Sample)> = Vec::new();
    for line in log {
        let Some((_, rest)) = line.split_once("start-trace step=") else { continue };
        let mut words = rest.split([' ', '"']);
        let (Some(name), Some(ms)) = (words.next(), words.next().and_then(|w| w.strip_prefix("ms="))) else { continue };
        let Ok(ms) = ms.parse() else { continue };
        if let Some((_, sample)) = steps.iter_mut().find(|(known, _)| known == name) {
            sample.add(ms);
        } else {
            let mut sample = Sample::new();
            sample.add(ms);
            steps.push((name.to_owned(), sample));
        }
    }
    for (name, sample) in steps {
        report.add(&format!("step.{name}"), &format!("  until {name}"), sample, "ms");
    }
}

/// `ctr task exec … true` in a container that runs.
fn execs(node: &Node, rounds: usize, report: &mut Report) -> Result<()> {
    let (mut runc, mut kata) = (Sample::new(), Sample::new());
    for runtime in e2e::BOTH {
        node.detached(runtime, runtime.tag(), &[], &["sleep", "10000"])?;
    }
    for round in 0..=rounds {
        for (runtime, sample) in [(Runtime::Runc, &mut runc), (Runtime::Kata, &mut kata)] {
            let done = node.exec(runtime.tag(), &format!("x{round}"), &[], &["true"]).output()?.ok()?;
            if round > 0 {
                sample.add_time(done.took);
            }
        }
    }
    for runtime in e2e::BOTH {
        node.remove(runtime.tag())?;
    }
    report.add("exec.runc", "ctr task exec … true, runc", runc, "ms");
    report.add("exec.kata", "ctr task exec … true, kata", kata, "ms");
    Ok(())
}
