//! What an idle container takes of memory, and the files of disk.

use crate::{report::Report, sample::Sample};
use anyhow::{Context as _, Result};
use e2e::{Node, Runtime, install::Install, processes};

const MIB: f64 = 1024.0 * 1024.0;

/// PSS of each process of an idle container, and the agent's RSS in the guest; a fresh VM each round.
pub(crate) fn memory(node: &Node, rounds: usize, report: &mut Report) -> Result<()> {
    let kinds = ["shim", "qemu", "virtiofsd"];
    let mut samples = [const { Sample::new() }; 3];
    let (mut sums, mut agents) = (Sample::new(), Sample::new());
    for round in 0..rounds {
        let id = format!("idle{round}");
        node.detached(Runtime::Kata, &id, &[], &["sleep", "10000"])?;
        // the boot's last work is over by the time that this returns
        node.exec(&id, "settle", &[], &["sleep", "1"]).output()?.ok()?;
        let mut totals = [0.0; 3];
        for process in processes::of_node(node.tag()) {
            let kind = kinds.iter().position(|k| process.name.contains(k)).context("a process of an unknown kind")?;
            totals[kind] += process.pss_kib()? as f64 / 1024.0;
        }
        for (sample, total) in samples.iter_mut().zip(totals) {
            sample.add(total);
        }
        sums.add(totals.iter().sum());
        node.remove(&id)?;
        if let Some(mib) = agent_rss(node)? {
            agents.add(mib);
        }
    }
    for (kind, sample) in kinds.iter().zip(samples) {
        report.add(&format!("pss.{kind}"), &format!("PSS of {kind}"), sample, "MiB");
    }
    report.add("pss.sum", "PSS of all host processes of an idle container", sums, "MiB");
    if agents.count() > 0 {
        report.add("rss.agent", "RSS of the agent in the guest", agents, "MiB");
    }
    Ok(())
}

/// The agent is process 1 of the guest, which no container sees; but the guest's kernel lists the memory of all processes
/// when its out-of-memory killer is called, which a privileged container may do. It takes the biggest, so there is one.
fn agent_rss(node: &Node) -> Result<Option<f64>> {
    let script = "head -c 64m /dev/zero | tail & sleep 2; echo f > /proc/sysrq-trigger; sleep 1; dmesg";
    let done = node.run(Runtime::Kata, "agent", &["--privileged"], &["sh", "-c", script]).output()?;
    Ok(rss_of_first(&done.text()).map(|pages| pages * 4096.0 / MIB))
}

/// The resident pages of process 1, from a kernel's list: `[ pid ] uid tgid total_vm rss …`, after the line's time.
fn rss_of_first(log: &str) -> Option<f64> {
    log.lines().find_map(|line| {
        let (_, rest) = line.split_once("] [")?;
        let (pid, columns) = rest.split_once(']')?;
        (pid.trim() == "1").then(|| columns.split_whitespace().nth(3)?.parse().ok())?
    })
}

/// Sizes of what is installed.
pub(crate) fn sizes(install: &Install, report: &mut Report) {
    let files = [
        ("shim", install.shim()),
        ("vmlinux", install.kernel()),
        ("bzimage", install.compressed_kernel()),
        ("initrd", install.initrd()),
    ];
    for (name, path) in files {
        let Ok(meta) = std::fs::metadata(&path) else { continue };
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let size = Sample::once(meta.len() as f64 / MIB);
        report.add(&format!("size.{name}"), &format!("size of {file}"), size, "MiB");
    }
}
