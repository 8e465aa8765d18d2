//! A start without a boot: pods that are clones of a template, in turns with those that boot, with runc and with gVisor.

use crate::{pool::Pool, report::Report, sample::Sample};
use anyhow::{Context as _, Result};
use e2e::{
    Node, Runtime,
    ctr::Invocation,
    image,
    install::{Install, program_path},
    processes, with_node,
};
use std::{path::Path, time::Duration};

const POOL: &str = "warm.pool";

/// One of those that take turns.
struct Way {
    key: &'static str,
    title: &'static str,
    runtime: &'static str,
    options: Vec<String>,
    sample: Sample,
}

/// Starts of all kinds, and what a clone takes of memory.
pub(crate) fn measure(install: &Install, rounds: usize, report: &mut Report) -> Result<()> {
    let templates = tempfile::Builder::new().prefix("kebench").tempdir_in("/dev/shm")?;
    with_node(|node| {
        let config = configuration(install, templates.path(), node, 0)?;
        let pooled = configuration(install, templates.path(), node, 1)?;
        let program = install.kata_runtime().display().to_string();
        Invocation::new(&program, ["--config", &config, "factory", "init"]).output()?.ok()?;
        let mut ways = vec![
            way("warm.runc", "ctr run --rm … true, runc, in turns with clones", Runtime::Runc.name(), &[]),
            way("warm.cold", "ctr run --rm … true, kata, in turns with clones", Runtime::Kata.name(), &[]),
            way(
                "warm.copied",
                "ctr run --rm … true, kata, clone with copied memory",
                Runtime::Kata.name(),
                &["--runtime-config-path", &config],
            ),
            way(
                POOL,
                "ctr run --rm … true, kata, from the pool",
                Runtime::Kata.name(),
                &["--runtime-config-path", &pooled],
            ),
        ];
        if program_path("containerd-shim-runsc-v1").is_some() {
            ways.push(way("warm.runsc", "ctr run --rm … true, gVisor", "io.containerd.runsc.v1", &[]));
        } else {
            eprintln!("    gVisor is not measured: it is not installed (apt-get install runsc)");
        }
        let mut pool = Pool::start(node, &pooled)?;
        for round in 0..=rounds {
            for Way { key, runtime, options, sample, .. } in &mut ways {
                let id = format!("{}{round}", key.replace('.', "-"));
                let options: Vec<_> = options.iter().map(String::as_str).collect();
                let words =
                    [&["run", "--rm", "--runtime", runtime], &options[..], &[image::NAME, &id, "true"]].concat();
                let done = node.ctr(words).limit(Duration::from_secs(60)).output()?.ok()?;
                if round > 0 {
                    sample.add_time(done.took);
                }
                if *key == POOL {
                    // the next one's making is no part of anybody's start
                    pool.wait()?;
                }
            }
        }
        pool.end()?;
        for Way { key, title, sample, .. } in ways {
            report.add(key, title, sample, "ms");
        }
        memory(node, &config, rounds, report)
    })
}

fn way(key: &'static str, title: &'static str, runtime: &'static str, options: &[&str]) -> Way {
    let options = options.iter().map(ToString::to_string).collect();
    Way { key, title, runtime, options, sample: Sample::new() }
}

/// The installed configuration with templates in a folder of the bench's, and a pool of so many.
fn configuration(install: &Install, templates: &Path, node: &Node, ready: u32) -> Result<String> {
    let changes = [
        ("enable_template", true.into()),
        ("template_path", templates.display().to_string().into()),
        ("vm_cache_number", i64::from(ready).into()),
        ("vm_cache_endpoint", templates.join("pool.sock").display().to_string().into()),
    ];
    let path = node.dir().join(format!("templates{ready}.toml"));
    std::fs::write(&path, install.config_table_with("factory", &changes)?)?;
    path.to_str().map(str::to_owned).context("a path of the bench")
}

/// PSS of all processes of one clone that idles.
fn memory(node: &Node, config: &str, rounds: usize, report: &mut Report) -> Result<()> {
    let mut sums = Sample::new();
    for round in 0..rounds {
        let id = format!("clone{round}");
        node.detached(Runtime::Kata, &id, &["--runtime-config-path", config], &["sleep", "10000"])?;
        node.exec(&id, "settle", &[], &["sleep", "1"]).output()?.ok()?;
        let mut sum = 0;
        for process in processes::of_node(node.tag()) {
            sum += process.pss_kib()?;
        }
        sums.add(sum as f64 / 1024.0);
        node.remove(&id)?;
    }
    report.add("pss.copied", "PSS of all host processes of an idle clone with copied memory", sums, "MiB");
    Ok(())
}
