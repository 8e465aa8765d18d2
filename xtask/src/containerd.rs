//! A containerd of our own: root, state and socket in fresh folders, so that one which runs already is neither used nor
//! disturbed. Owns its start, its end, and that nothing of it is left whatever happened in between.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, mkdtemp};

use crate::signals::{Signals, Woken, pidfd, wait_readable};
use crate::step;

/// Not `default`: our runtime keeps its folders by namespace and id, and another containerd may have the same id there.
const NAMESPACE: &str = "kata-run";

/// For containerd to come up, and for it to go.
const PATIENCE: Duration = Duration::from_secs(60);

/// For one clean-up command.
const CLEAN_UP: Duration = Duration::from_secs(20);

/// Running until dropped.
pub(crate) struct Containerd {
    state: PathBuf,
    root: PathBuf,
    process: Option<Child>,
    /// Where it tells its state; kept, because it also tells when it stops.
    told: Option<UnixDatagram>,
}

impl Containerd {
    /// Starts one that finds the shim and configuration of `prefix`; returns when it serves.
    pub(crate) fn start(signals: &Signals, shims: &Path, configuration: &Path) -> Result<Self> {
        let state = mkdtemp("/run/kata-run-XXXXXX").context("no folder can be made in /run")?;
        // from here on dropping it cleans up
        let mut this = Self { state, root: PathBuf::new(), process: None, told: None };
        this.root = mkdtemp("/var/tmp/kata-run-XXXXXX").context("no folder can be made in /var/tmp")?;
        let file = this.state.join("containerd.toml");
        fs::write(&file, this.settings()).with_context(|| format!("{} cannot be written", file.display()))?;

        // systemd's protocol tells when it is ready: nothing to poll
        let notify = this.state.join("notify");
        let ready = UnixDatagram::bind(&notify).context("the socket for containerd's readiness cannot be made")?;
        ready.set_nonblocking(true)?;
        let log = File::create(this.log_path()).context("containerd's log cannot be made")?;
        let mut command = Command::new("containerd");
        command.arg("--config").arg(&file).env("PATH", path_with(shims)).env("KATA_CONF_FILE", configuration);
        command.env("NOTIFY_SOCKET", &notify).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // its own group: a Ctrl-C at the terminal is ours to handle, it must live until the containers are gone
        command.process_group(0);
        let process = signals.spawn(&mut command)?;
        let ended = pidfd(&process);
        this.process = Some(process);
        let ended = ended?;
        loop {
            match signals.wait(&[ready.as_fd(), ended.as_fd()], Some(PATIENCE))? {
                Woken::Ready(0) => {
                    let mut message = [0; 256];
                    let length = ready.recv(&mut message).context("containerd's readiness cannot be read")?;
                    if message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                        this.told = Some(ready);
                        return Ok(this);
                    }
                }
                Woken::Ready(_) => bail!("containerd ended while starting; its last words:\n{}", tail(&this.log())),
                Woken::Asked => bail!("interrupted"),
                Woken::TimedOut => bail!("containerd did not start in {PATIENCE:?}:\n{}", tail(&this.log())),
            }
        }
    }

    fn settings(&self) -> String {
        let (state, root) = (self.state.display(), self.root.display());
        format!(
            "version = 2\nroot = \"{root}/root\"\nstate = \"{state}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{}\"\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{root}/opt\"\n",
            self.address().display()
        )
    }

    fn address(&self) -> PathBuf {
        self.state.join("containerd.sock")
    }

    fn log_path(&self) -> PathBuf {
        self.state.join("containerd.log")
    }

    /// A folder for the caller's own files, gone with the rest.
    pub(crate) fn folder(&self) -> &Path {
        &self.root
    }

    /// ctr, talking to this one.
    pub(crate) fn ctr(&self) -> Command {
        let mut command = step::command("ctr");
        command.arg("--address").arg(self.address()).args(["--namespace", NAMESPACE]);
        command
    }

    /// Ends containers and containerd, removes everything; returns the whole log. A Ctrl-C does not cut it short.
    pub(crate) fn stop(mut self) -> Result<String> {
        let result = self.end();
        let log = self.log();
        self.remove();
        result.map(|()| log)
    }

    /// What it and the shims have said so far.
    pub(crate) fn log(&self) -> String {
        fs::read(self.log_path()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    fn end(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let ended = pidfd(&process)?;
        if process.try_wait()?.is_none() {
            self.end_containers();
            kill(pid(&process)?, Signal::SIGTERM).context("containerd cannot be stopped")?;
            if !wait_readable(ended.as_fd(), CLEAN_UP)? {
                eprintln!("xtask: containerd did not end in {CLEAN_UP:?}: killing it");
                process.kill().context("containerd cannot be killed")?;
            }
        }
        process.wait().context("containerd cannot be waited for")?;
        self.told = None;
        Ok(())
    }

    /// As far as it goes: what stays is found by [`Self::remove`].
    fn end_containers(&self) {
        let tasks = self.clean_up(&["task", "ls", "-q"]);
        for id in tasks.lines() {
            self.clean_up(&["task", "kill", "--all", "--signal", "KILL", id]);
            self.clean_up(&["task", "delete", "--force", id]);
        }
        for id in self.clean_up(&["container", "ls", "-q"]).lines() {
            self.clean_up(&["container", "delete", id]);
        }
    }

    /// One ctr call; returns what it printed.
    fn clean_up(&self, arguments: &[&str]) -> String {
        let mut command = self.ctr();
        command.args(arguments);
        in_time(command)
    }

    /// Processes, mounts and folders; tells what should not have been there.
    fn remove(&mut self) {
        let address = self.address();
        for (id, arguments) in processes_naming(&address) {
            eprintln!("xtask: {} (process {id}) was left behind: killing it", arguments[0].display());
            let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
            self.delete_for(&arguments);
        }
        for folder in [&self.state, &self.root].into_iter().filter(|folder| !folder.as_os_str().is_empty()) {
            for mount in mounts_below(folder) {
                if let Err(error) = umount2(&mount, MntFlags::MNT_DETACH) {
                    eprintln!("xtask: {} cannot be unmounted: {error}", mount.display());
                }
            }
            match fs::remove_dir_all(folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    eprintln!("xtask: {} cannot be removed: {error}", folder.display());
                }
                _ => {}
            }
        }
    }
}

impl Containerd {
    /// What containerd does for a shim that died, and no longer can: a killed start leaves a VM's mounts and folders,
    /// and only the shim's program knows them.
    fn delete_for(&self, shim: &[OsString]) {
        let after = |flag: &str| shim.iter().skip_while(|argument| *argument != flag).nth(1);
        let (Some(program), Some(namespace), Some(id)) = (shim.first(), after("-namespace"), after("-id")) else {
            return;
        };
        let bundle = self.state.join("state/io.containerd.runtime.v2.task").join(namespace).join(id);
        let mut delete = step::command(&program.to_string_lossy());
        delete.arg("-namespace").arg(namespace).arg("-id").arg(id).arg("-address").arg(self.address());
        delete.arg("-bundle").arg(&bundle).arg("delete");
        // a bundle that is gone must not keep it from cleaning up
        delete.current_dir(if bundle.is_dir() { &bundle } else { &self.state });
        in_time(delete);
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("xtask: {error:#}");
        }
        self.remove();
    }
}

/// A clean-up command: it may fail (what it wants gone may have gone) but not hang.
fn in_time(mut command: Command) -> String {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let Ok(mut child) = command.spawn() else { return String::new() };
    let in_time = pidfd(&child).and_then(|ended| wait_readable(ended.as_fd(), CLEAN_UP));
    if !matches!(in_time, Ok(true)) {
        eprintln!("xtask: a clean-up command did not end in {CLEAN_UP:?}: {command:?}");
        // it may have ended at this very moment
        let _ = child.kill();
    }
    let output = child.wait_with_output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).into_owned()
}

fn pid(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}

/// The end of a log, for an error.
pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

fn path_with(first: &Path) -> OsString {
    let mut path = first.as_os_str().to_owned();
    path.push(":");
    // containerd needs the system's tools also when the caller's PATH is odd
    path.push(std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    path
}

/// Processes with `path` as an argument: each shim gets its containerd's address.
fn processes_naming(path: &Path) -> Vec<(i32, Vec<OsString>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let arguments: Vec<_> = line.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
        if arguments.iter().any(|argument| argument == path.as_os_str()) {
            found.push((id, arguments));
        }
    }
    found
}

/// Mount points below a folder, the last mounted first. Our folders have no characters that the kernel escapes.
fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut mounts: Vec<_> = points.filter(|point| point.starts_with(folder)).collect();
    mounts.reverse();
    mounts
}
