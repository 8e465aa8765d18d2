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
use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

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
        let template = ("factory", "enable_template", true.into());
        let configuration = |name, more| {
            let all = [Some(template.clone()), more].into_iter().flatten().collect::<Vec<_>>();
            configuration(install, templates.path(), node, name, &all)
        };
        let config = configuration("copied", None)?;
        let pooled = configuration("pool", Some(("factory", "vm_cache_number", 1.into())))?;
        let private = configuration("private", Some(("hypervisor.qemu", "shared_fs", "virtio-9p".into())))?;
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
                "warm.private",
                "ctr run --rm … true, kata, clone with private memory (9p)",
                Runtime::Kata.name(),
                &["--runtime-config-path", &private],
            ),
            way(
                POOL,
                "ctr run --rm … true, kata, from the pool",
                Runtime::Kata.name(),
                &["--runtime-config-path", &pooled],
            ),
        ];
        ways.extend(gvisor(node)?);
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
        let title = "PSS of all host processes of an idle clone, alone, with copied memory";
        report.add("pss.copied", title, memory(node, &config, rounds)?, "MiB");
        Ok(())
    })
}

fn way(key: &'static str, title: &'static str, runtime: &'static str, options: &[&str]) -> Way {
    let options = options.iter().map(ToString::to_string).collect();
    Way { key, title, runtime, options, sample: Sample::new() }
}

/// Debian's package has no shim of its own, but its program takes runc's place under runc's shim. Without a flag for it
/// it traces its processes (ptrace), which needs nothing of the machine. That of 2022 takes every network namespace of a
/// newer kernel for the host's and refuses it, so it goes without a network, as the others here.
fn gvisor(node: &Node) -> Result<Option<Way>> {
    let Some(program) = program_path("runsc") else {
        eprintln!("    gVisor is not measured: there is no runsc in PATH (apt-get install runsc)");
        return Ok(None);
    };
    let runsc = node.dir().join("runsc");
    std::fs::write(&runsc, format!("#!/bin/sh\nexec '{}' --network=none \"$@\"\n", program.display()))?;
    std::fs::set_permissions(&runsc, std::fs::Permissions::from_mode(0o755))?;
    let options = ["--runc-binary", &runsc.display().to_string()];
    Ok(Some(way("warm.runsc", "ctr run --rm … true, gVisor's runsc", Runtime::Runc.name(), &options)))
}

/// The installed configuration with these keys of these tables set, templates in a folder of the bench's.
pub(crate) fn configuration(
    install: &Install,
    templates: &Path,
    node: &Node,
    name: &str,
    more: &[(&str, &str, toml::Value)],
) -> Result<String> {
    let mut table = install.config_table()?;
    let places = [
        ("factory", "template_path", templates.display().to_string().into()),
        ("factory", "vm_cache_endpoint", templates.join("pool.sock").display().to_string().into()),
    ];
    for (place, key, value) in places.iter().chain(more) {
        let inner = place.split('.').try_fold(&mut table, |at, part| {
            at.entry(part).or_insert_with(|| toml::Table::new().into()).as_table_mut()
        });
        inner.context("the installed configuration")?.insert((*key).to_owned(), value.clone());
    }
    let path = node.dir().join(format!("{name}.toml"));
    std::fs::write(&path, table.to_string())?;
    path.to_str().map(str::to_owned).context("a path of the bench")
}

/// PSS of all processes of a clone that idles.
fn memory(node: &Node, config: &str, rounds: usize) -> Result<Sample> {
    let mut sums = Sample::new();
    for _ in 0..rounds {
        node.detached(Runtime::Kata, "idle", &["--runtime-config-path", config], &["sleep", "10000"])?;
        // it has nothing more to do by then
        node.exec("idle", "settle", &[], &["sleep", "1"]).output()?.ok()?;
        let kib: Vec<_> =
            processes::of_node(node.tag()).iter().map(processes::Process::pss_kib).collect::<Result<_>>()?;
        sums.add(kib.iter().sum::<u64>() as f64 / 1024.0);
        node.remove("idle")?;
    }
    Ok(sums)
}
