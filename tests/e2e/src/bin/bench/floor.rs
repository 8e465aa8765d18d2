//! The floor: the same kernel with an initrd of the same size, booted by bare QEMU to the first line of user space.

use crate::{initrd::Archive, report::Report, sample::Sample};
use anyhow::{Context as _, Result, bail};
use e2e::{compile::compile, install::Install, journal::Journal};
use std::{
    fs,
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The first line of user space.
const LINE: &str = "floor-user-space-up";

/// The leanest q35, so that the floor is a floor.
pub(crate) const MACHINE: &str = "q35,hpet=off,sata=off,smbus=off,usb=off,vmport=off,graphics=off,i8042=off";

/// What makes this kernel boot fastest; and, as the product has it, what QEMU 7.2 gets wrong so that a guest may die of it.
pub(crate) const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable rcupdate.rcu_expedited=1 \
    cryptomgr.notests noreplace-smp mitigations=off pci=lastbus=0 random.trust_cpu=on nr_cpus=1 clearcpuid=cx16";

/// A program that says so, and waits to be killed with its VM.
const INIT: &str = r#"
#include <fcntl.h>
#include <unistd.h>
int main(void) {
    int console = open("/dev/console", O_WRONLY);
    static const char line[] = "floor-user-space-up\n";
    if (console < 0 || write(console, line, sizeof line - 1) < 0) return 1;
    for (;;) pause();
}
"#;

/// Measures the ways of booting that this machine has.
pub(crate) fn measure(install: &Install, rounds: usize, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let initrd = dir.path().join("initrd");
    build_initrd(dir.path(), &initrd, fs::metadata(install.initrd())?.len())?;
    let (pvh, compressed) = (install.kernel(), install.compressed_kernel());
    let qboot = Path::new("/usr/share/qemu/qboot.rom");
    let ways = [
        ("pvh-qboot", "raw QEMU, vmlinux by PVH, qboot", &pvh, Some(qboot)),
        ("pvh", "raw QEMU, vmlinux by PVH, SeaBIOS", &pvh, None),
        ("bzimage-qboot", "raw QEMU, bzImage, qboot", &compressed, Some(qboot)),
        ("bzimage", "raw QEMU, bzImage, SeaBIOS", &compressed, None),
    ];
    for (key, title, kernel, firmware) in ways {
        if !kernel.is_file() || firmware.is_some_and(|f| !f.is_file()) {
            eprintln!("  {title}: left out, {} or its firmware is missing", kernel.display());
            continue;
        }
        let mut sample = Sample::new();
        for round in 0..=rounds {
            let took = boot(kernel, &initrd, firmware).with_context(|| title.to_owned())?;
            if round > 0 {
                sample.add_time(took);
            }
        }
        report.add(&format!("floor.{key}"), title, sample, "ms");
    }
    Ok(())
}

/// The processor as the product's: without what is slow under TCG.
pub(crate) const PROCESSOR: &str = "max,erms=off,fsrm=off";

/// The accelerator that the product found to work, so that both are measured with the same.
pub(crate) fn accelerator() -> &'static str {
    let answers = fs::read_dir("/run/kata-containers/kvm-probe").into_iter().flatten().flatten();
    // the answer and why, a file for each guest that was tried
    let is_kvm = |answer: fs::DirEntry| fs::read_to_string(answer.path()).is_ok_and(|text| text.starts_with("kvm "));
    if answers.into_iter().any(is_kvm) { "kvm" } else { "tcg" }
}

fn boot(kernel: &Path, initrd: &Path, firmware: Option<&Path>) -> Result<Duration> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-machine", MACHINE, "-accel", accelerator(), "-cpu", PROCESSOR, "-smp", "1", "-m", "2048"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-append", PARAMETERS]).arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    if let Some(firmware) = firmware {
        command.arg("-bios").arg(firmware);
    }
    let started = Instant::now();
    let mut vm = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let console = Journal::default();
    console.follow(vm.stdout.take().context("stdout")?);
    let up = console.wait_from(0, Duration::from_secs(60), |line| line.contains(LINE));
    let _ = vm.kill();
    let mut errors = String::new();
    let _ = vm.stderr.take().context("stderr")?.read_to_string(&mut errors);
    vm.wait()?;
    match up {
        Some((at, _)) => Ok(at - started),
        None => bail!("no user space within 60 s: {errors}\n{}", console.lines_from(0).join("\n")),
    }
}

/// Makes an initrd of `size` bytes with the program as /init; what is missing is filled with what does not compress.
fn build_initrd(dir: &Path, to: &Path, size: u64) -> Result<()> {
    let mut archive = Archive::default();
    archive.entry("dev", 0o40755, (0, 0), &[]);
    archive.entry("dev/console", 0o20600, (5, 1), &[]);
    archive.entry("init", 0o100_755, (0, 0), &compile(dir, "init", INIT)?);
    let mut filler = Vec::new();
    let missing = size.saturating_sub(archive.len() as u64 + 512);
    fs::File::open("/dev/urandom")?.take(missing).read_to_end(&mut filler)?;
    archive.entry("filler", 0o100_644, (0, 0), &filler);
    Ok(fs::write(to, archive.finish())?)
}
