//! The floor of a clone: a guest of the product's size and devices, saved by hand and restored by hand in a bare QEMU,
//! until it goes on; and with a folder by virtio-fs, plugged then, until the guest has it mounted.

use crate::{
    by_hand::{self, Daemon},
    initrd::Archive,
    report::Report,
    sample::Sample,
};
use anyhow::{Context as _, Result, bail, ensure};
use e2e::{compile::compile, install::Install, journal::Journal};
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

/// How long a guest may take with anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// What it says, in this order.
const WORDS: [&str; 3] = ["floor-ready", "floor-goes-on", "floor-mounted"];

/// A guest that waits for a word, looks for new devices then, and mounts a folder.
const INIT: &str = r#"
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>
static int console;
static void say(const char *line) { if (write(console, line, strlen(line)) < 0) _exit(1); }
int main(void) {
    char word;
    console = open("/dev/console", O_RDWR);
    mkdir("/sys", 0700);
    mkdir("/mnt", 0700);
    mount("sysfs", "/sys", "sysfs", 0, "");
    say("floor-ready\n");
    if (read(console, &word, 1) < 1) return 1;
    say("floor-goes-on\n");
    int scan = open("/sys/bus/pci/rescan", O_WRONLY);
    if (write(scan, "1", 1) < 1 || mount("share", "/mnt", "virtiofs", 0, "")) return 1;
    say("floor-mounted\n");
    for (;;) pause();
}
"#;

/// Where QEMU's package and others put it.
const DAEMONS: [&str; 3] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"];

/// Measures both ways of memory; they take turns.
pub(crate) fn measure(install: &Install, rounds: usize, report: &mut Report) -> Result<()> {
    // in memory, as the product's templates
    let dir = tempfile::Builder::new().prefix("kefloor").tempdir_in("/dev/shm")?;
    let dir = dir.path();
    save(install, dir).context("saving a guest by hand")?;
    let daemon = DAEMONS.into_iter().map(Path::new).find(|path| path.is_file());
    let [mut private, mut copied, mut folder] = [const { Sample::new() }; 3];
    for round in 0..=rounds {
        let (lone, _) = restore(dir, None).context("restoring it with private memory")?;
        let whole =
            daemon.map(|daemon| restore(dir, Some(daemon)).context("restoring it with a folder")).transpose()?;
        if round > 0 {
            private.add_time(lone);
            if let Some((goes_on, mounted)) = whole {
                copied.add_time(goes_on);
                folder.add_time(mounted);
            }
        }
    }
    report.add("floor.restore.private", "raw QEMU restored, private memory, until it goes on", private, "ms");
    if daemon.is_none() {
        eprintln!("    no virtiofsd at {}: a restore with a folder is left out", DAEMONS.join(", "));
        return Ok(());
    }
    report.add("floor.restore.copied", "raw QEMU restored, copied memory, until it goes on", copied, "ms");
    report.add("floor.restore", "  until a folder plugged then is mounted", folder, "ms");
    Ok(())
}

/// Boots the guest with its memory in a file, stops it when it waits, and keeps its state.
fn save(install: &Install, dir: &Path) -> Result<()> {
    let mut archive = Archive::default();
    archive.entry("dev", 0o40755, (0, 0), &[]);
    archive.entry("dev/console", 0o20600, (5, 1), &[]);
    archive.entry("init", 0o100_755, (0, 0), &compile(dir, "init", INIT)?);
    let initrd = dir.join("initrd");
    fs::write(&initrd, archive.finish())?;
    let memory = memory(&dir.join("memory"), true);
    let mut vm = Vm::start(dir, &memory, |command| {
        command
            .args(["-append", &by_hand::parameters()])
            .arg("-kernel")
            .arg(install.kernel())
            .arg("-initrd")
            .arg(&initrd);
    })?;
    vm.hears(WORDS[0])?;
    vm.greet()?;
    vm.execute("stop", &json!({}))?;
    vm.execute("migrate", &json!({"uri": format!("exec:cat > {}", dir.join("state").display())}))?;
    vm.migrated()
}

/// One restore; with a folder where there is somebody to serve it, which takes memory that can be shared. How long until
/// the guest went on, and until it had the folder.
fn restore(dir: &Path, daemon: Option<&Path>) -> Result<(Duration, Duration)> {
    let began = Instant::now();
    let (saved, copy, socket) = (dir.join("memory"), dir.join("copy"), dir.join("fs.sock"));
    let mut serving = None;
    let mut copying = None;
    if let Some(daemon) = daemon {
        let (from, to) = (fs::File::open(&saved)?, fs::File::create(&copy)?);
        to.set_len(from.metadata()?.len())?;
        copying = Some(std::thread::spawn(move || copy_used(from, to)));
        serving = Some(serve(daemon, dir, &socket)?);
    }
    let memory = if daemon.is_some() { memory(&copy, true) } else { memory(&saved, false) };
    let mut vm = Vm::start(dir, &memory, |command| {
        command.args(["-incoming", "defer"]);
        if daemon.is_some() {
            command.arg("-chardev").arg(format!("socket,id=fs0,path={}", socket.display()));
        }
    })?;
    vm.greet()?;
    if let Some(copying) = copying {
        copying.join().unwrap_or_else(|_| bail!("copying panicked")).context("copying the memory")?;
    }
    vm.execute("migrate-incoming", &json!({"uri": format!("exec:cat {}", dir.join("state").display())}))?;
    vm.migrated()?;
    if daemon.is_some() {
        let device =
            json!({"driver": "vhost-user-fs-pci", "chardev": "fs0", "tag": "share", "bus": "plug", "addr": "1"});
        vm.execute("device_add", &device)?;
    }
    vm.execute("cont", &json!({}))?;
    vm.serial.write_all(b"\n")?;
    let goes_on = vm.hears(WORDS[1])? - began;
    let mounted = if daemon.is_some() { vm.hears(WORDS[2])? - began } else { goes_on };
    drop((vm, serving));
    let _ = fs::remove_file(copy);
    Ok((goes_on, mounted))
}

/// What is not a hole; the rest of a new file is one.
fn copy_used(mut from: fs::File, mut to: fs::File) -> Result<()> {
    let length = i64::try_from(from.metadata()?.len())?;
    let mut at = 0;
    while at < length {
        let begin = match lseek(&from, at, Whence::SeekData) {
            Ok(begin) => begin,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        at = lseek(&from, begin, Whence::SeekHole)?;
        from.seek(SeekFrom::Start(begin as u64))?;
        to.seek(SeekFrom::Start(begin as u64))?;
        std::io::copy(&mut (&mut from).take((at - begin) as u64), &mut to)?;
    }
    Ok(())
}

/// virtiofsd as the product has it.
fn serve(daemon: &Path, dir: &Path, socket: &Path) -> Result<Daemon> {
    Daemon::start(daemon, socket, |fd| {
        let source = format!("source={}", dir.display());
        [&format!("--fd={fd}"), "--thread-pool-size=1", "-o", "cache=auto", "-o", &source].map(str::to_owned).into()
    })
}

fn memory(path: &Path, is_shared: bool) -> String {
    let share = if is_shared { "on" } else { "off" };
    format!("memory-backend-file,id=mem,size={},mem-path={},share={share}", by_hand::SIZE, path.display())
}

/// A process that goes when dropped.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A bare QEMU with its monitor on its standard input and output, and the guest's serial port on a socket.
struct Vm {
    _process: Helper,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    serial: UnixStream,
    said: Journal,
}

impl Vm {
    fn start(dir: &Path, memory: &str, more: impl FnOnce(&mut Command)) -> Result<Self> {
        let path: PathBuf = dir.join("serial.sock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).context("the serial port")?;
        let mut command = Command::new(by_hand::QEMU);
        command.args(by_hand::arguments(memory)).args(["-qmp", "stdio"]);
        command
            .arg("-chardev")
            .arg(format!("socket,id=serial,path={}", path.display()))
            .args(["-serial", "chardev:serial"]);
        // the product's
        command.args(["-device", "pci-bridge,id=plug,bus=pcie.0,addr=0x1e,chassis_nr=1,shpc=off"]);
        command.args(["-object", "rng-random,id=entropy,filename=/dev/urandom"]);
        command.args(["-device", "virtio-rng-pci,rng=entropy,bus=plug,addr=0x1f", "-device", "virtio-serial-pci"]);
        let firmware = Path::new("/usr/share/qemu/qboot.rom");
        if firmware.is_file() {
            command.arg("-bios").arg(firmware);
        }
        more(&mut command);
        let process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context(by_hand::QEMU)?;
        let mut process = Helper(process);
        let (to, from) = process.0.stdin.take().zip(process.0.stdout.take()).context("QEMU's monitor")?;
        let (serial, _) = listener.accept()?;
        let said = Journal::default();
        said.follow(serial.try_clone()?);
        Ok(Self { _process: process, to, from: BufReader::new(from), serial, said })
    }

    /// When the guest said it.
    fn hears(&self, word: &str) -> Result<Instant> {
        let heard = self.said.wait_from(0, PATIENCE, |line| line.contains(word));
        heard.map(|(at, _)| at).with_context(|| format!("no {word} in {:?}", self.said.lines_from(0)))
    }

    /// Takes the monitor's greeting and makes it ready for a migration that leaves the memory alone.
    fn greet(&mut self) -> Result<()> {
        self.execute("qmp_capabilities", &json!({}))?;
        let on = ["x-ignore-shared", "events"].map(|name| json!({"capability": name, "state": true}));
        self.execute("migrate-set-capabilities", &json!({"capabilities": on}))
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(self.to, "{line}").with_context(|| command.to_owned())?;
        let answer = self.next(|message| message.get("return").is_some() || message.get("error").is_some())?;
        match answer.get("error") {
            Some(error) => bail!("{command}: {error}"),
            None => Ok(()),
        }
    }

    /// The end of a migration, either way.
    fn migrated(&mut self) -> Result<()> {
        let status = |message: &Value| {
            (message["event"] == "MIGRATION").then(|| message["data"]["status"].as_str().unwrap_or_default().to_owned())
        };
        let ended = |message: &Value| status(message).is_some_and(|status| ["completed", "failed"].contains(&&*status));
        let message = self.next(ended)?;
        ensure!(message["data"]["status"] == "completed", "{message}");
        Ok(())
    }

    fn next(&mut self, is_wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut line = String::new();
        while self.from.read_line(&mut line)? > 0 {
            let message: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
            if is_wanted(&message) {
                return Ok(message);
            }
            line.clear();
        }
        bail!("QEMU ended; its guest said {:?}", self.said.lines_from(0))
    }
}
