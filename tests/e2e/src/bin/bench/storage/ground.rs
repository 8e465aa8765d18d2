//! The programs, the folders and the images that the measured have, and how each is started with them.

use super::{
    Values, Way,
    raw::{Raw, Volume},
    shell::{LOOP, Shell},
    work,
};
use anyhow::{Context as _, Result, ensure};
use e2e::{Node, Runtime, compile::compile, ctr::Invocation, install::Install, processes};
use serde_json::json;
use std::{
    cell::OnceCell,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

/// Bytes of an image for data, and of one for programs.
const IMAGE: u64 = 256 << 20;

/// How long one of them may live.
const LIFE: Duration = Duration::from_secs(300);

/// Memory of the container's own, from which programs can be run.
const RAM: &str = "type=tmpfs,src=tmpfs,dst=/ram,options=rw";

/// What was laid out in a node's folder.
pub(super) struct Ground<'a> {
    install: &'a Install,
    node: &'a Node,
    /// A folder for whom each folder is.
    dir: PathBuf,
    nine_p: PathBuf,
    /// virtiofsd's command line, once it was seen.
    daemon: OnceCell<String>,
    _direct: DirectVolume,
}

impl<'a> Ground<'a> {
    /// Lays all of it out.
    pub(super) fn lay(install: &'a Install, node: &'a Node) -> Result<Self> {
        let dir = node.dir().join("storage");
        let tools = dir.join("tools");
        fs::create_dir_all(&tools)?;
        programs(node.dir(), &tools)?;
        image(&dir.join("tools.img"), &tools)?;
        for name in ["runc", "fs", "fs.raw", "9p", "disk", "disk.raw"] {
            tree(&dir.join(name))?;
        }
        for name in ["disk", "disk.raw"] {
            image(&dir.join(format!("{name}.img")), &dir.join(name))?;
        }
        let nine_p = dir.join("9p.toml");
        fs::write(&nine_p, install.config_with(&[("shared_fs", "virtio-9p".into())])?)?;
        let direct = DirectVolume::add(install, &dir.join("disk"), &dir.join("disk.img"))?;
        Ok(Self { install, node, dir, nine_p, daemon: OnceCell::new(), _direct: direct })
    }

    /// Starts one, does the work in it, and ends it.
    pub(super) fn measure(&self, way: Way, title: &str) -> Result<Values> {
        let raw = |volume: &Volume<'_>| -> Result<Values> {
            let mut raw = Raw::start(self.install, &self.dir, &self.dir.join("tools.img"), volume)?;
            let values = work::measure(&mut raw.shell)?;
            raw.end()?;
            Ok(values)
        };
        match way {
            Way::Runc => self.container(Runtime::Runc, "runc", &[]),
            Way::Fs | Way::Disk => self.container(Runtime::Kata, if way == Way::Fs { "fs" } else { "disk" }, &[]),
            Way::NineP => {
                self.container(Runtime::Kata, "9p", &["--runtime-config-path", &self.nine_p.display().to_string()])
            }
            Way::RawFs => {
                let daemon = self.daemon.get().with_context(|| format!("{title}: before the product's"))?;
                raw(&Volume::Folder(&self.dir.join("fs.raw"), daemon))
            }
            Way::RawDisk => raw(&Volume::Disk(&self.dir.join("disk.raw.img"))),
        }
    }

    fn container(&self, runtime: Runtime, name: &str, options: &[&str]) -> Result<Values> {
        let mount = |from: &str, to: &str, how: &str| {
            format!("type=bind,src={},dst={to},options=rbind:{how}", self.dir.join(from).display())
        };
        let (tools, data) = (mount("tools", "/tools", "ro"), mount(name, "/data", "rw"));
        let options = [options, &["--mount", &tools, "--mount", &data, "--mount", RAM]].concat();
        let id = format!("store-{name}");
        let running = self.node.run(runtime, &id, &options, &["sh", "-c", LOOP]).limit(LIFE).spawn()?;
        let mut shell = Shell::new(running)?;
        if name == "fs" && self.daemon.get().is_none() {
            let daemon = processes::wait_for(self.node.tag(), "virtiofsd", Duration::from_secs(1))?;
            let _ = self.daemon.set(daemon.command);
        }
        let values = work::measure(&mut shell)?;
        shell.end("exit 0")?;
        Ok(values)
    }
}

/// fio with the libraries that it needs, its jobs, and a clock.
fn programs(work: &Path, to: &Path) -> Result<()> {
    let fio = e2e::install::program_path("fio").context("fio: not found in PATH: run `apt-get install fio`")?;
    let needed = Invocation::new("ldd", [&fio]).output()?.ok()?.text();
    let libraries = needed.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new);
    for file in libraries.chain([fio.as_path()]) {
        let name = file.file_name().with_context(|| file.display().to_string())?;
        fs::copy(file, to.join(name)).with_context(|| file.display().to_string())?;
        if name.to_string_lossy().starts_with("ld-linux") {
            symlink(name, to.join("ld.so"))?;
        }
    }
    fs::write(to.join("jobs"), work::jobs())?;
    compile(work, "clock", work::CLOCK_PROGRAM)?;
    fs::copy(work.join("clock"), to.join("clock"))?;
    Ok(())
}

/// A folder with the archive of small files in it.
fn tree(to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    let from = to.join("tree");
    let (folders, files) = work::TREE;
    for folder in 0..folders {
        let folder = from.join(format!("folder-{folder}"));
        fs::create_dir_all(&folder)?;
        for file in 0..files {
            fs::write(folder.join(format!("file-{file}")), vec![b'x'; 512 + 256 * file])?;
        }
    }
    let archive = to.join("tree.tar");
    // without names, which the measured would look up in files of their root file system
    let words = ["--numeric-owner", "-C"].map(Path::new);
    Invocation::new(
        "tar",
        words.into_iter().chain([from.as_path(), Path::new("-cf"), archive.as_path(), Path::new(".")]),
    )
    .output()?
    .ok()?;
    Ok(fs::remove_dir_all(from)?)
}

/// An ext4 with what is in a folder, nothing of which is left to be done at its first mount.
fn image(to: &Path, from: &Path) -> Result<()> {
    fs::File::create(to)?.set_len(IMAGE)?;
    let words = ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"].map(Path::new);
    Invocation::new("mkfs.ext4", words.into_iter().chain([from, to])).output()?.ok()?;
    Ok(())
}

/// A disk as a volume; nobody knows of it any more when it is dropped.
struct DirectVolume {
    program: String,
    path: String,
}

impl DirectVolume {
    fn add(install: &Install, path: &Path, disk: &Path) -> Result<Self> {
        let this = Self { program: install.kata_runtime().display().to_string(), path: path.display().to_string() };
        let info = json!({"volume-type": "block", "device": disk, "fstype": "ext4"}).to_string();
        let args = ["direct-volume", "add", "--volume-path", &this.path, "--mount-info", &info];
        let added = Invocation::new(&this.program, args).output()?;
        ensure!(added.code == 0, "{added:?}");
        Ok(this)
    }
}

impl Drop for DirectVolume {
    fn drop(&mut self) {
        let _ = Invocation::new(&self.program, ["direct-volume", "remove", "--volume-path", &self.path]).output();
    }
}
