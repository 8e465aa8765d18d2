//! A VM of nothing but a kernel, busybox and a volume, set up by hand: with a virtiofsd, or with a disk.

use super::shell::{LOOP, Shell};
use crate::{floor, initrd::Archive};
use anyhow::{Context as _, Result};
use e2e::{ctr::Invocation, install::Install};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::{
    fs,
    os::{fd::AsRawFd as _, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// As the product's size and kind of memory, which virtio-fs needs.
const MEMORY: &str = "memory-backend-memfd,id=mem,size=512M,share=on";

/// As the configuration's default.
const QUEUE: u32 = 1024;

/// How long it may live.
const LIFE: Duration = Duration::from_secs(300);

/// Its process 1. The disk of programs is the first one. The work is in a cgroup, as a container's is, since the kernel
/// counts each page of one.
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
cd /sys/fs/cgroup
for i in pod container; do
echo '+cpu +cpuset +io +memory +pids' > cgroup.subtree_control
mkdir $i
cd $i
done
echo 1 > cgroup.procs
cd /
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

/// The VM, and the daemon that ends with it.
pub(super) struct Raw {
    pub(super) shell: Shell,
    daemon: Option<Daemon>,
}

impl Raw {
    /// Boots in `dir`, with the disk of programs.
    pub(super) fn start(install: &Install, dir: &Path, tools: &Path, volume: &Volume<'_>) -> Result<Self> {
        let mount = match volume {
            Volume::Folder(..) => "mount -t virtiofs share /data",
            Volume::Disk(_) => "mount -t ext4 /dev/vdb /data",
        };
        let initrd = initrd(dir, &format!("{INIT}{mount}\n{LOOP}\n"))?;
        let machine = format!("{},memory-backend=mem", floor::MACHINE);
        let mut args: Vec<String> = [
            ["-machine", &machine],
            ["-accel", floor::accelerator()],
            ["-cpu", floor::PROCESSOR],
            ["-smp", "1"],
            ["-m", "512M"],
            ["-object", MEMORY],
            ["-display", "none"],
            ["-serial", "stdio"],
            ["-kernel", &install.kernel().display().to_string()],
            ["-initrd", &initrd.display().to_string()],
            ["-append", &format!("{}{}", floor::PARAMETERS, counter())],
            ["-drive", &format!("file={},if=none,id=tools,format=raw,readonly=on", tools.display())],
            ["-device", "virtio-blk-pci,drive=tools"],
        ]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect();
        args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        let mut daemon = None;
        let (host, device) = match volume {
            Volume::Folder(folder, command) => {
                let socket = dir.join("virtiofsd.sock");
                daemon = Some(Daemon::start(command, folder, &socket)?);
                let host = ["-chardev".to_owned(), format!("socket,id=share,path={}", socket.display())];
                (host, format!("vhost-user-fs-pci,chardev=share,tag=share,queue-size={QUEUE}"))
            }
            Volume::Disk(file) => {
                let drive = format!(
                    "file={},if=none,id=data,format=raw,cache=writeback,aio=threads,discard=unmap",
                    file.display()
                );
                (["-drive".to_owned(), drive], "virtio-blk-pci,drive=data".to_owned())
            }
        };
        args.extend(host);
        args.extend(["-device".to_owned(), device]);
        let running = Invocation::new("qemu-system-x86_64", args).limit(LIFE).spawn()?;
        Ok(Self { shell: Shell::new(running)?, daemon })
    }

    /// Its disk is whole afterwards.
    pub(super) fn end(self) -> Result<()> {
        self.shell.end("umount /data; reboot -f")?;
        drop(self.daemon);
        Ok(())
    }
}

/// The rate of the time stamp counter, which a guest under TCG would measure wrongly, as the product knows it.
fn counter() -> String {
    let known = fs::read_to_string("/run/kata-containers/tsc-khz");
    known.map(|rate| format!(" tsc_early_khz={}", rate.trim())).unwrap_or_default()
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

/// A virtiofsd, which ends with its only client.
struct Daemon(Child);

impl Daemon {
    /// As the product's, but for the folder and the socket.
    fn start(command: &str, folder: &Path, socket: &Path) -> Result<Self> {
        let _ = fs::remove_file(socket);
        // listens before the daemon is there, so that nobody waits for it
        let listener = UnixListener::bind(socket)?;
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let source = |part: &str| match part.strip_prefix("source=").or_else(|| part.strip_prefix("--shared-dir=")) {
            Some(theirs) => part.replace(theirs, &folder.display().to_string()),
            None => part.to_owned(),
        };
        let argument = |word: &str| match word.strip_prefix("--fd=") {
            Some(_) => format!("--fd={}", listener.as_raw_fd()),
            None => word.split(',').map(source).collect::<Vec<_>>().join(","),
        };
        let mut words = command.split(' ');
        let program = words.next().context("an empty command line")?;
        let mut daemon = Command::new(program);
        daemon.args(words.map(argument)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(daemon.spawn().with_context(|| program.to_owned())?))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
