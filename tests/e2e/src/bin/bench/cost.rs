//! What an idle container takes of memory, and the files of disk.

use crate::{initrd::Archive, report::Report, sample::Sample};
use anyhow::{Context as _, Result};
use e2e::{Node, NodeSetup, Runtime, compile::compile, install::Install, processes, with_node_setup};

const MIB: f64 = 1024.0 * 1024.0;

/// PSS of each process of an idle container; a fresh VM each round.
pub(crate) fn memory(node: &Node, rounds: usize, report: &mut Report) -> Result<()> {
    let kinds = ["shim", "qemu", "virtiofsd"];
    let mut samples = [const { Sample::new() }; 3];
    let mut sums = Sample::new();
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
    }
    for (kind, sample) in kinds.iter().zip(samples) {
        report.add(&format!("pss.{kind}"), &format!("PSS of {kind}"), sample, "MiB");
    }
    report.add("pss.sum", "PSS of all host processes of an idle container", sums, "MiB");
    Ok(())
}

/// A program that starts the agent in its own place, as process 1, and a child that tells the kernel's log its size.
const PROBE: &str = r#"
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
int main(void) {
    if (fork() == 0) {
        /* of its own, because the agent moves to another root */
        mkdir("/probe-proc", 0700);
        mount("proc", "/probe-proc", "proc", 0, "");
        mknod("/probe-log", S_IFCHR | 0600, makedev(1, 11));
        for (;;) {
            sleep(1);
            FILE *status = fopen("/probe-proc/1/status", "r"), *log = fopen("/probe-log", "w");
            char line[256];
            while (status && log && fgets(line, sizeof line, status))
                if (!strncmp(line, "VmRSS:", 6)) fprintf(log, "agent-%s", line);
            if (status) fclose(status);
            if (log) fclose(log);
        }
    }
    execl("/init", "/init", (char *)0);
    return 1;
}
"#;

/// The agent's RSS in the guest, while a container runs. No container sees the guest's process 1, and the agent has no
/// call for this; so the guest boots by a program of ours, put before the installed initrd, that looks from beside it.
pub(crate) fn agent(install: &Install, rounds: usize, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let mut archive = Archive::default();
    archive.entry("probe", 0o100_755, (0, 0), &compile(dir.path(), "probe", PROBE)?);
    let mut initrd = archive.finish();
    initrd.extend(std::fs::read(install.initrd())?);
    let path = dir.path().join("initrd");
    std::fs::write(&path, initrd)?;
    let changes = [("initrd", path.display().to_string().into()), ("kernel_params", "rdinit=/probe".to_owned().into())];
    let config = Some(install.config_with(&changes)?);
    with_node_setup(NodeSetup { config, ..NodeSetup::default() }, |node| {
        let mut sample = Sample::new();
        for round in 0..rounds {
            let script = "sleep 3; dmesg";
            let done = node.run(Runtime::Kata, &format!("a{round}"), &["--privileged"], &["sh", "-c", script]);
            let text = done.output()?.ok()?.text();
            let line = text.lines().rev().find_map(|l| l.split_once("agent-VmRSS:")).context("no size in the log")?;
            let kib: f64 = line.1.split_whitespace().next().context("no number")?.parse()?;
            sample.add(kib / 1024.0);
        }
        report.add("rss.agent", "RSS of the agent in the guest", sample, "MiB");
        Ok(())
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
