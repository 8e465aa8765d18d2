//! Many containers at the same moment.

use anyhow::{Result, ensure};
use e2e::{Runtime, with_node};
use std::{sync::Barrier, time::Duration};

#[test]
fn ten_containers_at_the_same_moment() -> Result<()> {
    with_node(|node| {
        const COUNT: usize = 10;
        let together = Barrier::new(COUNT);
        let results: Vec<Result<()>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..COUNT)
                .map(|n| {
                    let together = &together;
                    scope.spawn(move || {
                        let id = format!("p{n}");
                        let script = format!("echo from-{n}; exit {n}");
                        let run = node.run(Runtime::Kata, &id, &[], &["sh", "-c", &script]);
                        together.wait();
                        let done = run.limit(Duration::from_secs(120)).output()?.expect_code(n as i32)?;
                        ensure!(done.text() == format!("from-{n}"), "{id}: {:?}", done.text());
                        Ok(())
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))).collect()
        });
        let failed: Vec<_> = results.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
        ensure!(failed.is_empty(), "{} of {COUNT} failed:\n{}", failed.len(), failed.join("\n"));
        Ok(())
    })
}

/// Ten that live side by side, and go together.
#[test]
fn ten_containers_side_by_side() -> Result<()> {
    with_node(|node| {
        let ids: Vec<_> = (0..10).map(|n| format!("s{n}")).collect();
        let all = |work: &(dyn Fn(&str) -> Result<()> + Sync)| -> Result<()> {
            std::thread::scope(|scope| {
                let threads: Vec<_> = ids.iter().map(|id| scope.spawn(move || work(id))).collect();
                threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked"))))
            })
        };
        all(&|id| {
            let args = ["run", "-d", "--runtime", Runtime::Kata.name(), e2e::image::NAME, id, "sleep", "1000"];
            node.ctr(args).limit(Duration::from_secs(120)).output()?.ok().map(drop)
        })?;
        all(&|id| {
            let said = node.exec(id, "x", &[], &["sh", "-c", "echo alive"]).output()?.ok()?.text();
            ensure!(said == "alive", "{id}: {said:?}");
            Ok(())
        })?;
        all(&|id| node.remove(id))
    })
}
