//! How long a pod of Kubernetes takes: `crictl runp`, `create` and `start`, as kubelet calls them one after the other.

use crate::{report::Report, sample::Sample};
use anyhow::Result;
use e2e::{
    BOTH, NodeSetup, Runtime,
    cri::{Cri, Network, with_cri},
};
use serde_json::json;
use std::time::Instant;

/// The three calls of a start, as the table shows them.
const STEPS: [(&str, &str); 3] = [("runp", "  of it runp"), ("create", "  of it create"), ("start", "  of it start")];

/// One runtime's samples: the whole, then each step.
struct Pod {
    whole: Sample,
    steps: [Sample; 3],
}

/// Starts pods with one container; the runtimes take turns.
pub(crate) fn measure(rounds: usize, report: &mut Report) -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let mut pods = BOTH.map(|runtime| (runtime, Pod { whole: Sample::new(), steps: [const { Sample::new() }; 3] }));
        for round in 0..=rounds {
            for (runtime, pod) in &mut pods {
                let times = once(cri, *runtime, &format!("{}-{round}", runtime.tag()))?;
                if round > 0 {
                    pod.whole.add(times.iter().sum());
                    pod.steps.iter_mut().zip(times).for_each(|(sample, time)| sample.add(time));
                }
            }
        }
        for (runtime, pod) in pods {
            let tag = runtime.tag();
            report.add(&format!("pod.{tag}"), &format!("crictl: a pod with one container, {tag}"), pod.whole, "ms");
            for ((key, title), sample) in STEPS.into_iter().zip(pod.steps) {
                report.add(&format!("pod.{tag}.{key}"), title, sample, "ms");
            }
        }
        Ok(())
    })
}

/// The milliseconds of the three calls.
fn once(cri: &Cri<'_>, runtime: Runtime, name: &str) -> Result<[f64; 3]> {
    let mut last = Instant::now();
    let mut lap = || {
        let took = last.elapsed().as_secs_f64() * 1000.0;
        last = Instant::now();
        took
    };
    let pod = cri.run_pod(runtime, name, &json!({}))?;
    let sandbox = lap();
    let container = cri.create(&pod, "main", &["sleep", "10000"], &json!({}))?;
    let created = lap();
    cri.say(["start", &container])?;
    let started = lap();
    cri.remove(&pod)?;
    Ok([sandbox, created, started])
}
