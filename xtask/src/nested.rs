//! `make nested`: end-to-end tests on a host that this machine is not, because it is a virtual machine made for them.
//!
//! QEMU's translator emulates AMD's virtualisation, so Debian's kernel in it has a `/dev/kvm` that works, and
//! `/dev/vhost-vsock`. Its root is this machine's, read-only by 9p under a layer in memory: the same programs at the same
//! paths. Owns the machine; what runs in it are the scripts of tests/nested and the test programs of tests/e2e.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::compile::cargo;
use crate::initrd::{Cpio, DIRECTORY, FILE};
use crate::workspace::Workspace;
use crate::{cache, step};

/// Debian's name of its newest stable kernel; what it depends on is the kernel.
const KERNEL: &str = "linux-image-amd64";
/// Modules without which there is no root; the rest is loaded from it.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// Run when none is named.
const DEFAULT_TESTS: [&str; 1] = ["vsock"];
/// The machine's last words before it ends.
const VERDICT: &str = "nested: exit code ";
/// For all tests together, seconds.
const LIMIT: &str = "3600";

/// Runs these test programs of tests/e2e, ignored tests included.
pub(crate) fn run(workspace: &Workspace, tests: &[String]) -> Result<()> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "make nested is for x86-64: QEMU emulates AMD's virtualisation only there"
    );
    let tests: Vec<_> = match tests {
        [] => DEFAULT_TESTS.map(String::from).into(),
        named => named.to_vec(),
    };
    let debian = step::timed("providing Debian's kernel", debian_kernel)?;
    let programs = step::timed("compiling the tests", || test_programs(workspace, &tests))?;
    let initrd = workspace.nested_initrd();
    fs::write(&initrd, archive(workspace, &debian, &programs)?)
        .with_context(|| format!("{} cannot be written", initrd.display()))?;
    step::timed("end-to-end tests in a nested host", || boot(&debian, &initrd))
}

/// An unpacked kernel package.
struct Debian {
    root: PathBuf,
    release: String,
}

impl Debian {
    fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }
}

/// From the cache, or downloaded now: not installed, since this machine does not boot it.
fn debian_kernel() -> Result<Debian> {
    let cache = cache::folder("kata-nested")?;
    let _alone = cache::lock(&cache)?;
    let root = cache.join("debian");
    if !root.is_dir() {
        let draft = cache.join("debian.new");
        cache::remove(&draft)?;
        fs::create_dir_all(&draft).with_context(|| format!("{} cannot be made", draft.display()))?;
        let depends = step::output(step::command("apt-cache").args(["depends", KERNEL]))?;
        let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        let package = package.with_context(|| format!("{KERNEL} depends on nothing: run `apt-get update`"))?;
        step::run(step::command("apt-get").args(["-qq", "download", package]).current_dir(&draft))?;
        let archive = only_entry(&draft)?;
        step::run(step::command("dpkg-deb").arg("-x").arg(&archive).arg(&draft))?;
        fs::remove_file(&archive).with_context(|| format!("{} cannot be removed", archive.display()))?;
        let release = file_name(&only_entry(&draft.join("lib/modules"))?)?;
        step::run(step::command("/sbin/depmod").arg("-b").arg(&draft).arg(release))?;
        // complete or not there at all
        fs::rename(&draft, &root).with_context(|| format!("{} cannot be put in place", root.display()))?;
    }
    let release = file_name(&only_entry(&root.join("lib/modules"))?)?;
    println!("    {release} in {}", root.display());
    Ok(Debian { root, release })
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))?;
    let entry = entries.next().with_context(|| format!("{} is empty", folder.display()))??;
    ensure!(entries.next().is_none(), "{} holds more than one thing", folder.display());
    Ok(entry.path())
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}

/// Where cargo has put the programs of these tests.
fn test_programs(workspace: &Workspace, tests: &[String]) -> Result<Vec<PathBuf>> {
    let mut command = cargo(workspace);
    command.args(["test", "--package", "e2e", "--no-run", "--message-format=json-render-diagnostics"]);
    for test in tests {
        command.args(["--test", test]);
    }
    let messages = step::output(&mut command)?;
    let made: Vec<_> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            Some((message["target"]["name"].as_str()?.to_owned(), PathBuf::from(message["executable"].as_str()?)))
        })
        .collect();
    let program = |test: &String| {
        let found = made.iter().find(|(name, _)| name == test).map(|(_, program)| program.clone());
        found.with_context(|| format!("cargo says nothing of the program of the test {test}"))
    };
    tests.iter().map(program).collect()
}

/// The machine's first file system: what brings up the second one, and the list of what to run there.
fn archive(workspace: &Workspace, debian: &Debian, programs: &[PathBuf]) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("{} cannot be read", path.display()));
    let mut cpio = Cpio::default();
    for folder in ["bin", "dev", "lower", "proc", "root", "sys", "upper"] {
        cpio.add(folder, DIRECTORY | 0o755, (0, 0), &[])?;
    }
    cpio.add("bin/busybox", FILE | 0o755, (0, 0), &read(Path::new("/bin/busybox"))?)?;
    let mut order = String::new();
    for module in module_files(debian)? {
        let name = file_name(&module)?;
        if !order.contains(&format!("/{name}\n")) {
            writeln!(order, "/{name}")?;
            cpio.add(&name, FILE | 0o644, (0, 0), &read(&module)?)?;
        }
    }
    cpio.add("order", FILE | 0o644, (0, 0), order.as_bytes())?;
    let scripts = workspace.root().join("tests/nested");
    cpio.add("init", FILE | 0o755, (0, 0), &read(&scripts.join("init"))?)?;
    let mut work = String::from_utf8(read(&scripts.join("prologue"))?).context("tests/nested/prologue")?;
    let (folder, prefix) = (workspace.root().join("tests/e2e"), workspace.test_prefix());
    writeln!(work, "cd '{}'\nexport KATA_PREFIX='{}'", folder.display(), prefix.display())?;
    for program in programs {
        writeln!(work, "run '{}' --include-ignored --test-threads=1 --nocapture", program.display())?;
    }
    writeln!(work, "echo \"{VERDICT}$worst\"\necho b >/proc/sysrq-trigger")?;
    cpio.add("run-tests", FILE | 0o644, (0, 0), work.as_bytes())?;
    cpio.end()
}

/// Files of [`MODULES`] and of what they need, each after what it needs.
fn module_files(debian: &Debian) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for module in MODULES {
        let mut command = step::command("/sbin/modprobe");
        command.arg("-d").arg(&debian.root).args(["-S", &debian.release, "--show-depends", module]);
        let lines = step::output(&mut command)?;
        files.extend(lines.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|file| file.trim().into()));
    }
    Ok(files)
}

/// Boots, shows what is said, and takes the verdict.
fn boot(debian: &Debian, initrd: &Path) -> Result<()> {
    let share = |tag: &str, path: &Path| {
        let path = path.display();
        [
            "-fsdev".to_owned(),
            format!("local,id={tag},path={path},security_model=none,readonly=on,multidevs=remap"),
            "-device".to_owned(),
            format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]
    };
    // its end is ours: timeout ends it with us, and after the limit
    let mut command = step::command("timeout");
    command.args(["--foreground", "--kill-after=10", LIMIT, "qemu-system-x86_64"]);
    // one processor: with two, guests of guests stop under QEMU 7.2's translator
    command.args(["-machine", "q35", "-accel", "tcg,tb-size=256", "-cpu", "max", "-smp", "1", "-m", "3G"]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    command.args(["-device", "virtio-rng-pci"]);
    command.arg("-kernel").arg(debian.root.join("boot").join(format!("vmlinuz-{}", debian.release)));
    command.arg("-initrd").arg(initrd);
    command.args(["-append", "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check tsc=reliable"]);
    command.args(share("host", Path::new("/"))).args(share("modules", &debian.modules()));
    let verdict = follow(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    match verdict.as_deref() {
        Some("0") => Ok(()),
        Some(code) => bail!("a test program ended with code {code}"),
        None => bail!("the machine ended before the tests did"),
    }
}

/// Prints what it prints; returns what follows [`VERDICT`].
fn follow(command: &mut Command) -> Result<Option<String>> {
    let mut machine = command.spawn().context("QEMU cannot be started: run `make deps`")?;
    let console = machine.stdout.take().context("no console")?;
    let mut verdict = None;
    for line in BufReader::new(console).split(b'\n') {
        let line = line.context("the console cannot be read")?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        match line.strip_prefix(VERDICT) {
            Some(code) => verdict = Some(code.to_owned()),
            None => println!("    | {line}"),
        }
    }
    machine.wait().context("QEMU cannot be waited for")?;
    Ok(verdict)
}
