//! Builds the kernel: unpack, patch, configure, compile, strip. Fixes what would make two builds differ (time, user, host,
//! count), so that the same inputs give the same bytes, and shows how far it is.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::fragments;
use crate::step;
use crate::workspace::{VMLINUX, VMLINUZ};

/// How many C files this configuration compiles, about: only the progress depends on it.
const C_FILES: usize = 2_000;

/// A line of progress at least this often.
const PATIENCE: Duration = Duration::from_secs(30);

/// Leaves the two forms of the kernel in `work`/result.
pub(super) fn kernel(tarball: &Path, work: &Path, log: &Path, fragments: &str, patches: &str) -> Result<()> {
    let [source, out, result] = ["source", "out", "result"].map(|name| work.join(name));
    for directory in [&source, &out, &result] {
        fs::create_dir_all(directory).with_context(|| format!("{} cannot be made", directory.display()))?;
    }
    step::timed("unpacking the kernel's source", || {
        let mut tar = step::command("tar");
        step::run(tar.arg("-xJf").arg(tarball).arg("--strip-components=1").arg("-C").arg(&source))?;
        let all = work.join("all.patch");
        fs::write(&all, patches)?;
        // no guess where a line might belong: another source wants another patch
        step::run(step::command("patch").args(["-p1", "--fuzz=0", "--quiet", "-d"]).arg(&source).arg("-i").arg(&all))
    })?;
    let mut log = File::create(log).with_context(|| format!("{} cannot be written", log.display()))?;
    let wanted = work.join("fragments.config");
    fs::write(&wanted, fragments)?;
    step::timed("configuring the kernel", || {
        follow(make(&source, &out).arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wanted), &mut log, |_| ())?;
        fragments::verify(fragments, &fs::read_to_string(out.join(".config"))?)
    })?;
    step::timed("compiling the kernel", || {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let mut progress = Progress::default();
        let mut compile = make(&source, &out);
        compile.arg(format!("-j{jobs}")).args(["bzImage", "vmlinux"]);
        follow(&mut compile, &mut log, |line| progress.line(line))
    })?;
    fs::copy(out.join("arch/x86/boot/bzImage"), result.join(VMLINUZ)).context("bzImage cannot be copied")?;
    let vmlinux = result.join(VMLINUX);
    step::run(step::command("strip").arg("-o").arg(&vmlinux).arg(out.join("vmlinux")))?;
    // without the note QEMU cannot enter the uncompressed kernel
    let notes = step::output(step::command("readelf").arg("-n").arg(&vmlinux))?;
    ensure!(notes.contains("Xen"), "{VMLINUX} has no PVH note: CONFIG_PVH is needed in guest/kernel/platform-*.conf");
    Ok(())
}

fn make(source: &Path, out: &Path) -> Command {
    let mut command = step::command("make");
    for variable in
        ["ARCH", "CROSS_COMPILE", "KCFLAGS", "KAFLAGS", "KCONFIG_CONFIG", "LOCALVERSION", "KBUILD_OUTPUT", "V"]
    {
        command.env_remove(variable);
    }
    command.arg("-C").arg(source).arg(format!("O={}", out.display()));
    command
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01 00:00:00 UTC")
        .env("KBUILD_BUILD_USER", "kata")
        .env("KBUILD_BUILD_HOST", "kata")
        .env("KBUILD_BUILD_VERSION", "1")
        .env("LC_ALL", "C")
        .env("TZ", "UTC");
    command
}

/// Runs it with both outputs in the log, each line also to `seen`.
fn follow(command: &mut Command, log: &mut File, mut seen: impl FnMut(&str)) -> Result<()> {
    let (reader, writer) = std::io::pipe().context("no pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("`make` cannot be started: run `make deps`")?;
    // our copies of the writing end, or the reader would never see the end
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut last = String::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(log, "{line}")?;
        seen(&line);
        if line.contains("rror") {
            last = line;
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("make ended with {status}; last error: {last}");
    }
    Ok(())
}

/// How far the compiler is, told every tenth and every half minute.
struct Progress {
    from: Instant,
    told: Instant,
    tenths: usize,
    files: usize,
}

impl Default for Progress {
    fn default() -> Self {
        let now = Instant::now();
        Self { from: now, told: now, tenths: 0, files: 0 }
    }
}

impl Progress {
    fn line(&mut self, line: &str) {
        if !line.starts_with("  CC ") {
            return;
        }
        self.files += 1;
        let tenths = (self.files * 10 / C_FILES).min(9);
        if tenths > self.tenths || self.told.elapsed() >= PATIENCE {
            self.tenths = tenths;
            self.told = Instant::now();
            let percent = (self.files * 100 / C_FILES).min(99);
            println!("    kernel: about {percent} % ({} files, {})", self.files, step::elapsed(self.from));
        }
    }
}
