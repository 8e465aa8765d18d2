//! Many containers: at the same moment, side by side, one after the other. `KATA_CROWD=50` and `KATA_ROW=200` make more of
//! them than `make test` does, and `KATA_E2E_TEMPLATE=1` makes them clones.

use anyhow::{Context as _, Result, ensure};
use e2e::{Node, Runtime, processes, with_node};
use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

/// For one of many, on a machine with two processors.
const PATIENCE: Duration = Duration::from_secs(300);

fn count(variable: &str, usual: usize) -> Result<usize> {
    std::env::var(variable).map_or(Ok(usual), |text| text.parse().with_context(|| format!("{variable}={text}")))
}

/// Does it for each of `ids` at once; tells of all that failed.
fn all(ids: &[String], work: &(dyn Fn(usize, &str) -> Result<()> + Sync)) -> Result<()> {
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ids.iter().enumerate().map(|(n, id)| scope.spawn(move || work(n, id))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))).collect()
    });
    let failed: Vec<_> = results.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
    ensure!(failed.is_empty(), "{} of {} failed:\n{}", failed.len(), ids.len(), failed.join("\n"));
    Ok(())
}

/// The time that it took for so many.
fn told(what: &str, count: usize, from: Instant) {
    let seconds = from.elapsed().as_secs_f64();
    eprintln!("{count} {what}: {seconds:.1} s, {:.2} a second", count as f64 / seconds);
}

#[test]
fn many_at_the_same_moment() -> Result<()> {
    with_node(|node| {
        let ids: Vec<_> = (0..count("KATA_CROWD", 10)?).map(|n| format!("p{n}")).collect();
        let together = Barrier::new(ids.len());
        let from = Instant::now();
        all(&ids, &|n, id| {
            let code = n as i32 % 100;
            let script = format!("echo from-{n}; exit {code}");
            let run = node.run(Runtime::Kata, id, &[], &["sh", "-c", &script]);
            together.wait();
            let done = run.limit(PATIENCE).output()?.expect_code(code)?;
            ensure!(done.text() == format!("from-{n}"), "{id}: {:?}", done.text());
            Ok(())
        })?;
        told("at the same moment, from their start to their end", ids.len(), from);
        Ok(())
    })
}

/// Those that live side by side, and go together.
#[test]
fn many_side_by_side() -> Result<()> {
    with_node(|node| {
        let ids: Vec<_> = (0..count("KATA_CROWD", 10)?).map(|n| format!("s{n}")).collect();
        let from = Instant::now();
        all(&ids, &|_, id| {
            let args = ["run", "-d", "--runtime", Runtime::Kata.name(), e2e::image::NAME, id, "sleep", "1000"];
            node.ctr(args).limit(PATIENCE).output()?.ok().map(drop)
        })?;
        told("side by side", ids.len(), from);
        all(&ids, &|_, id| {
            let said = node.exec(id, "x", &[], &["sh", "-c", "echo alive"]).limit(PATIENCE).output()?.ok()?.text();
            ensure!(said == "alive", "{id}: {said:?}");
            Ok(())
        })?;
        eprintln!("PSS of all host processes of each: {:.1} MiB", held(node)? / ids.len() as f64);
        all(&ids, &|_, id| node.remove(id))
    })
}

/// MiB of all processes of the node's pods.
fn held(node: &Node) -> Result<f64> {
    let mut sum = 0;
    for process in processes::of_node(node.tag()) {
        sum += process.pss_kib()?;
    }
    Ok(sum as f64 / 1024.0)
}

#[test]
fn many_one_after_the_other() -> Result<()> {
    with_node(|node| {
        let count = count("KATA_ROW", 5)?;
        for (runtime, name) in
            [(Runtime::Runc, "of runc's one after the other"), (Runtime::Kata, "one after the other")]
        {
            let from = Instant::now();
            for n in 0..count {
                node.run(runtime, &format!("r{n}"), &[], &["true"])
                    .output()?
                    .ok()
                    .with_context(|| format!("number {n}"))?;
            }
            told(name, count, from);
        }
        Ok(())
    })
}
