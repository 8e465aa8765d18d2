//! A VM of nothing but a kernel, busybox and a volume, set up by hand: with a virtiofsd, or with a disk.

use super::shell::{LOOP, Shell};
use crate::{
    by_hand::{self, Daemon},
    cgroup::Cgroup,
    initrd::Archive,
};
use anyhow::{Context as _, Result};
use e2e::{ctr::Invocation, install::Install};
use std::{
    fs,
    os::fd::RawFd,
    path::{Path, PathBuf},
    time::Duration,
};

/// As the configuration's default.
const QUEUE: u32 = 1024;

/// How long it may live.
const LIFE: Duration = Duration::from_secs(300);

/// Its process 1. The disk of programs is the first one. The work is in a cgroup with the controllers that a container's
/// has that is alone in its VM: the kernel counts each page and each block of one.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir /proc /sys /tools /data /ram /tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir /dev/shm
mount -t tmpfs shm /dev/shm
mount -t tmpfs ram /ram
mount -t cgroup2 cgroup /sys/fs/cgroup
echo '+memory +pids +io' > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/container
echo 1 > /sys/fs/cgroup/container/cgroup.procs
stty -echo -opost
mount -t ext4 -o ro /dev/vda /tools
";

/// What it has at /data.
pub(super) enum Volume<'a> {
    /// A folder, and the product's command line for the daemon.
    Folder(&'a Path, &'a str),
    /// An ext4 in a file.
    Disk(&'a Path),
}

/// The VM, the daemon that ends with it, and where they count on the host: in a cgroup, as a pod does, which costs a
/// process that shares the processors up to a fifth.
pub(super) struct Raw {
    pub(super) shell: Shell,
    daemon: Option<Daemon>,
    _cgroup: Cgroup,
}

impl Raw {
    /// Boots in `dir`, with the disk of programs.
    pub(super) fn start(install: &Install, dir: &Path, tools: &Path, volume: &Volume<'_>) -> Result<Self> {
        let mount = match volume {
            Volume::Folder(..) => "mount -t virtiofs share /data",
            Volume::Disk(_) => "mount -t ext4 /dev/vdb /data",
        };
        let initrd = initrd(dir, &format!("{INIT}{mount}\n{LOOP}\n"))?;
        let cgroup = Cgroup::create("raw")?;
        let mut args = by_hand::arguments(&by_hand::shared_memory());
        let kernel = install.kernel();
        let mut option = |name: &str, value: &str| args.extend([name, value].map(str::to_owned));
        option("-serial", "stdio");
        option("-kernel", &kernel.display().to_string());
        option("-initrd", &initrd.display().to_string());
        option("-append", &by_hand::parameters());
        option("-drive", &format!("file={},if=none,id=tools,format=raw,readonly=on", tools.display()));
        option("-device", "virtio-blk-pci,drive=tools");
        let mut daemon = None;
        match volume {
            Volume::Folder(folder, command) => {
                let socket = dir.join("virtiofsd.sock");
                let serving = serve(command, folder, &socket)?;
                // before it has a client it is one process
                cgroup.add(serving.id())?;
                daemon = Some(serving);
                option("-chardev", &format!("socket,id=share,path={}", socket.display()));
                option("-device", &format!("vhost-user-fs-pci,chardev=share,tag=share,queue-size={QUEUE}"));
            }
            Volume::Disk(file) => {
                let how = "if=none,id=data,format=raw,cache=writeback,aio=threads,discard=unmap";
                option("-drive", &format!("file={},{how}", file.display()));
                option("-device", "virtio-blk-pci,drive=data");
            }
        }
        let running = Invocation::new(by_hand::QEMU, args).limit(LIFE).spawn()?;
        cgroup.add(running.pid().as_raw().cast_unsigned())?;
        Ok(Self { shell: Shell::new(running)?, daemon, _cgroup: cgroup })
    }

    /// Its disk is whole afterwards.
    pub(super) fn end(self) -> Result<()> {
        self.shell.end("umount /data; reboot -f")?;
        self.daemon.map_or(Ok(()), Daemon::wait)
    }
}

/// As the product's daemon, but for the folder and the socket.
fn serve(command: &str, folder: &Path, socket: &Path) -> Result<Daemon> {
    let source = |part: &str| match part.strip_prefix("source=").or_else(|| part.strip_prefix("--shared-dir=")) {
        Some(theirs) => part.replace(theirs, &folder.display().to_string()),
        None => part.to_owned(),
    };
    let argument = |word: &str, fd: RawFd| match word.strip_prefix("--fd=") {
        Some(_) => format!("--fd={fd}"),
        None => word.split(',').map(source).collect::<Vec<_>>().join(","),
    };
    let mut words = command.split(' ');
    let program = words.next().context("an empty command line")?;
    Daemon::start(program, socket, |fd| words.map(|word| argument(word, fd)).collect())
}

fn initrd(dir: &Path, init: &str) -> Result<PathBuf> {
    let busybox = e2e::install::program_path("busybox").context("busybox: not in PATH")?;
    let mut archive = Archive::default();
    for folder in ["dev", "bin"] {
        archive.entry(folder, 0o40755, (0, 0), &[]);
    }
    archive.entry("dev/console", 0o20600, (5, 1), &[]);
    archive.entry("bin/busybox", 0o100_755, (0, 0), &fs::read(busybox)?);
    archive.entry("init", 0o100_755, (0, 0), init.as_bytes());
    let path = dir.join("initrd");
    fs::write(&path, archive.finish())?;
    Ok(path)
}
