//! Many pods: side by side, at the same moment, one after the other. How many a second beside runc's, and what each takes
//! of the host's memory. All but the first takes minutes, so only when asked for (`BENCH_ONLY=crowd`).

use crate::{report::Report, sample::Sample, warm};
use anyhow::{Result, ensure};
use e2e::{Node, Runtime, ctr::Invocation, image, install::Install, processes, with_node};
use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

/// Side by side.
const CROWD: usize = 50;
/// At the same moment.
const STORM: usize = 20;
/// One after the other.
const ROW: usize = 200;
/// Of a pod, MiB.
const MEMORY: i64 = 128;
/// For one of many, on a machine with two processors.
const PATIENCE: Duration = Duration::from_secs(300);

/// One of those that are compared.
struct Way {
    key: &'static str,
    title: &'static str,
    runtime: Runtime,
    config: Option<String>,
}

/// What each takes of the host's memory.
pub(crate) fn measure_memory(install: &Install, report: &mut Report) -> Result<()> {
    with_ways(install, |node, ways| ways.iter().try_for_each(|way| way.side_by_side(node, report)))
}

/// How many there are a second.
pub(crate) fn measure_rates(install: &Install, report: &mut Report) -> Result<()> {
    with_ways(install, |node, ways| {
        for way in ways {
            way.storm(node, report)?;
            // the two kinds of memory start alike
            if way.key != "private" {
                way.row(node, report)?;
            }
        }
        Ok(())
    })
}

fn with_ways(install: &Install, measure: impl FnOnce(&Node, &[Way]) -> Result<()>) -> Result<()> {
    let templates = tempfile::Builder::new().prefix("kebench").tempdir_in("/dev/shm")?;
    with_node(|node| {
        let config = |name: &str, template: bool, shared_fs: &str| {
            let more = [
                ("factory", "enable_template", template.into()),
                ("hypervisor.qemu", "shared_fs", shared_fs.into()),
                ("hypervisor.qemu", "default_memory", MEMORY.into()),
            ];
            warm::configuration(install, templates.path(), node, name, &more)
        };
        let copied = config("crowd-copied", true, "auto")?;
        let private = config("crowd-private", true, "virtio-9p")?;
        let program = install.kata_runtime().display().to_string();
        for clones in [&copied, &private] {
            Invocation::new(&program, ["--config", clones, "factory", "init"]).output()?.ok()?;
        }
        let kata = |key, title, config| Way { key, title, runtime: Runtime::Kata, config: Some(config) };
        let ways = [
            Way { key: "runc", title: "runc", runtime: Runtime::Runc, config: None },
            kata("cold", "kata, boots", config("crowd-cold", false, "auto")?),
            kata("copied", "kata, clones with copied memory", copied),
            kata("private", "kata, clones with private memory", private),
        ];
        measure(node, &ways)
    })
}

impl Way {
    /// `ctr run` with these flags.
    fn run(&self, node: &Node, flag: &str, id: &str, command: &[&str]) -> Invocation {
        let config = self.config.as_deref().map(|path| ["--runtime-config-path", path]);
        let words = ["run", flag, "--runtime", self.runtime.name()];
        let words =
            [&words[..], config.as_ref().map_or(&[][..], |words| &words[..]), &[image::NAME, id], command].concat();
        node.ctr(words).limit(PATIENCE)
    }

    fn told(&self, report: &mut Report, key: &str, kind: &str, count: usize, from: Instant) {
        let rate = count as f64 / from.elapsed().as_secs_f64();
        let title = format!("{count} {kind}, {}", self.title);
        let key = format!("crowd.{key}.{}", self.key);
        report.add(&key, &title, Sample::once(rate), "/s");
    }

    /// From their start to their end.
    fn storm(&self, node: &Node, report: &mut Report) -> Result<()> {
        let ids: Vec<_> = (0..STORM).map(|n| format!("storm{n}")).collect();
        let together = Barrier::new(STORM);
        let from = Instant::now();
        all(&ids, &|id| {
            let run = self.run(node, "--rm", id, &["echo", id]);
            together.wait();
            let said = run.output()?.ok()?.text();
            ensure!(said == id, "{id}: {said:?}");
            Ok(())
        })?;
        self.told(report, "storm", "at the same moment, to their end", STORM, from);
        Ok(())
    }

    /// Until all run; then each answers, and all go.
    fn side_by_side(&self, node: &Node, report: &mut Report) -> Result<()> {
        let ids: Vec<_> = (0..CROWD).map(|n| format!("side{n}")).collect();
        let from = Instant::now();
        all(&ids, &|id| self.run(node, "-d", id, &["sleep", "100000"]).output()?.ok().map(drop))?;
        self.told(report, "side", "side by side, until all run", CROWD, from);
        all(&ids, &|id| {
            let said = node.exec(id, "x", &[], &["echo", "alive"]).limit(PATIENCE).output()?.ok()?.text();
            ensure!(said == "alive", "{id}: {said:?}");
            Ok(())
        })?;
        if self.runtime == Runtime::Kata {
            let (mut whole, mut shims) = (0, 0);
            for process in processes::of_node(node.tag()) {
                let kib = process.pss_kib()?;
                whole += kib;
                shims += if process.name.starts_with("containerd-shim") { kib } else { 0 };
            }
            let each = |kib: u64| Sample::once(kib as f64 / 1024.0 / CROWD as f64);
            let title = format!("PSS a pod of {CROWD}, {}", self.title);
            report.add(&format!("crowd.pss.{}", self.key), &title, each(whole), "MiB");
            report.add(&format!("crowd.pss.shim.{}", self.key), "  of it the shim", each(shims), "MiB");
        }
        all(&ids, &|id| node.remove(id))
    }

    fn row(&self, node: &Node, report: &mut Report) -> Result<()> {
        let from = Instant::now();
        for n in 0..ROW {
            self.run(node, "--rm", &format!("row{n}"), &["true"]).output()?.ok()?;
        }
        self.told(report, "row", "one after the other", ROW, from);
        Ok(())
    }
}

/// Does it for each of `ids` at once; tells of all that failed.
fn all(ids: &[String], work: &(dyn Fn(&str) -> Result<()> + Sync)) -> Result<()> {
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ids.iter().map(|id| scope.spawn(move || work(id))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))).collect()
    });
    let failed: Vec<_> = results.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
    ensure!(failed.is_empty(), "{} of {} failed:\n{}", failed.len(), ids.len(), failed.join("\n"));
    Ok(())
}
