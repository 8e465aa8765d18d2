//! A guest that was taken over and turns folders into links while the host makes and removes containers with volumes
//! below them: nothing outside of what it was given is ever touched. And what it may use up of the host is bounded.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Node, NodeSetup, Runtime, compile::compile, ctr::Invocation, install::Install, mounts, with_node, with_node_setup,
};
use nix::mount::{MsFlags, mount};
use std::{
    ffi::OsStr,
    fs,
    os::fd::AsRawFd as _,
    os::unix::ffi::OsStrExt as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// For how long, in `make test`; `KATA_ATTACK_SECONDS` for more.
const SECONDS: u64 = 6;

/// Exchanges pairs of names for ever, and puts back what somebody takes away.
const SWAPPER: &str = r"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv) {
    if (chdir(argv[1])) return 1;
    for (;;)
        for (int pair = 2; pair + 1 < argc; pair += 2)
            renameat2(AT_FDCWD, argv[pair], AT_FDCWD, argv[pair + 1], RENAME_EXCHANGE);
}
";

/// Folders of the host's that go with the test, whatever is mounted in them.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        mounts::unmount_below(std::slice::from_ref(&self.0));
    }
}

fn tmpfs(at: &Path, options: &str) -> Result<()> {
    fs::create_dir_all(at)?;
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options)).with_context(|| at.display().to_string())
}

/// `ctr run` of a container that joins the pod `pod`.
fn member<'a>(pod: &'a str, mount: &'a str) -> Vec<String> {
    let annotations =
        ["io.kubernetes.cri.container-type=container".to_owned(), format!("io.kubernetes.cri.sandbox-id={pod}")];
    let mut options: Vec<String> = annotations.into_iter().flat_map(|one| ["--annotation".to_owned(), one]).collect();
    options.extend(["--mount".to_owned(), mount.to_owned()]);
    options
}

fn bind(source: &Path) -> String {
    format!("type=bind,src={},dst=/data,options=rbind:rw", source.display())
}

/// Names, modes, owners, contents and file systems of all that is below.
fn state(folder: &Path) -> Result<Vec<String>> {
    let mut all = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        let meta = path.symlink_metadata()?;
        let content = if meta.is_file() { fs::read_to_string(&path)? } else { String::new() };
        all.push(format!("{} {:o} {} {} {content}", path.display(), meta.mode(), meta.uid(), meta.dev()));
        if meta.is_dir() {
            left.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
        }
    }
    all.sort();
    Ok(all)
}

#[test]
fn links_of_a_guest_lead_the_host_nowhere() -> Result<()> {
    let seconds = std::env::var("KATA_ATTACK_SECONDS").ok().map_or(Ok(SECONDS), |text| text.parse())?;
    with_node(|node| {
        let root = node.dir().join("attack");
        let (volume, marked) = (root.join("volume"), root.join("marked"));
        let _mounted = Mounted(root.clone());
        fs::create_dir_all(volume.join("part"))?;
        fs::create_dir_all(volume.join("above/later"))?;
        tmpfs(&volume.join("above/mounted"), "")?;
        tmpfs(&volume.join("odd/mounted"), "")?;
        // the host's own way to it, whatever becomes of its name
        let above = fs::File::open(volume.join("above"))?;
        let later = PathBuf::from(format!("/proc/self/fd/{}/later", above.as_raw_fd()));
        fs::write(volume.join("file"), "mine")?;
        fs::create_dir_all(marked.join("deep"))?;
        fs::write(marked.join("secret"), "marked")?;
        fs::set_permissions(marked.join("secret"), fs::Permissions::from_mode(0o600))?;
        tmpfs(&marked.join("mounted"), "")?;
        fs::write(marked.join("mounted/secret"), "marked")?;
        symlink(&marked, volume.join("part-link"))?;
        symlink(&marked, volume.join("above-link"))?;
        symlink(marked.join("secret"), volume.join("file-link"))?;
        let before = state(&marked)?;

        let options = ["--annotation", "io.kubernetes.cri.container-type=sandbox"];
        node.detached(Runtime::Kata, "pod", &options, &["sh"])?;
        fs::write(volume.join("swapper"), compile(node.dir(), "swapper", SWAPPER)?)?;
        let whole = bind(&volume);
        let options = member("pod", &whole);
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        // a mount's path on the host that is no text is nobody's trouble
        let script = "mv /data/odd \"/data/o$(printf '\\377')d\"; cp /data/swapper /bin/s; chmod 755 /bin/s; \
                      exec s /data part part-link above above-link file file-link";
        node.detached(Runtime::Kata, "attacker", &options, &["sh", "-c", script])?;

        let odd = volume.join(OsStr::from_bytes(b"o\xffd/mounted"));
        let began = Instant::now();
        while !odd.exists() {
            ensure!(began.elapsed() < Duration::from_secs(20), "the attacker did not begin within 20 s");
        }
        let (mut inside, mut refused) = (0, 0);
        let end = Instant::now() + Duration::from_secs(seconds);
        for round in 0.. {
            if Instant::now() > end {
                break;
            }
            let source = volume.join(["part", "file", "above", ""][round % 4]);
            mount(Some("tmpfs"), &later, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
            let write = "if test -d /data; then echo owned > /data/secret; chmod 777 /data /data/secret; \
                         rm -rf /data/deep /data/mounted/secret; touch /data/new; else echo owned > /data; fi";
            let id = format!("victim{round}");
            let given = bind(&source);
            // every fourth has a virtual machine of its own
            let joins = member("pod", &given);
            let joins: Vec<_> = joins.iter().map(String::as_str).collect();
            let options = if round % 16 == 15 { &joins[4..] } else { &joins[..] };
            let out = if round % 4 == 3 {
                // all of it, with what is mounted below a folder that is turned into a link when that is taken off
                node.run(Runtime::Kata, &id, options, &["true"]).output()?
            } else {
                node.run(Runtime::Kata, &id, options, &["sh", "-c", write]).output()?
            };
            nix::mount::umount2(&later, nix::mount::MntFlags::MNT_DETACH)?;
            if out.code == 0 {
                inside += 1;
            } else {
                refused += 1;
                let words = &out.stderr;
                let known =
                    ["no such file", "not a directory", "too many levels", "temporarily unavailable", "try again"];
                let told = words.to_lowercase();
                ensure!(known.iter().any(|one| told.contains(one)), "{words}");
            }
            let now = state(&marked)?;
            ensure!(now == before, "round {round} ({}): {now:#?}", source.display());
        }
        println!("{inside} containers inside, {refused} refused");
        ensure!(inside > 1, "no container was made: {inside}, {refused} refused");
        node.remove("attacker")?;
        node.remove("pod")?;
        ensure!(state(&marked)? == before, "the pod's end");
        Ok(())
    })
}

#[test]
fn a_full_disk_reaches_the_guest() -> Result<()> {
    with_node(|node| {
        let root = node.dir().join("full");
        let _mounted = Mounted(root.clone());
        let (small, few) = (root.join("small"), root.join("few"));
        tmpfs(&small, "size=1m")?;
        tmpfs(&few, "nr_inodes=20")?;
        for (name, source) in [("small", &small), ("few", &few)] {
            let script = "cd /data; dd if=/dev/zero of=big bs=64k count=64 2>&1 | grep -o 'No space.*'; ls -s big; rm big; \
                          for i in $(seq 30); do touch f$i 2>&1; done | grep -o 'No space.*' | sort | uniq; rm f*; ls; \
                          df -k . | awk 'NR==2 {print $2, $4}'; echo again > word; cat word; rm word";
            let mut seen = Vec::new();
            for runtime in e2e::BOTH {
                let id = format!("{name}-{}", runtime.tag());
                let out = node.run(runtime, &id, &["--mount", &bind(source)], &["sh", "-c", script]).output()?.ok()?;
                seen.push(out.text());
            }
            ensure!(seen[0] == seen[1] && seen[0].contains("No space left"), "{name}: {seen:#?}");
        }
        Ok(())
    })
}

/// A folder that may have 4 MiB, of btrfs: of the file systems with quotas that is the one whose kernel option every
/// distribution takes with it, and ours has no other (ext4 without `QFMT_V2`, xfs without `XFS_QUOTA`).
fn with_quota(root: &Path) -> Result<PathBuf> {
    let (disk, point) = (root.join("disk"), root.join("mounted"));
    fs::create_dir_all(&point)?;
    fs::File::create(&disk)?.set_len(128 << 20)?;
    let folder = point.join("limited");
    let (disk, point, limited) =
        (disk.display().to_string(), point.display().to_string(), folder.display().to_string());
    for command in [
        vec!["mkfs.btrfs", "-q", &disk],
        vec!["mount", "-o", "loop", &disk, &point],
        vec!["btrfs", "-q", "quota", "enable", &point],
        vec!["btrfs", "-q", "subvolume", "create", &limited],
        vec!["btrfs", "-q", "qgroup", "limit", "4M", &limited],
    ] {
        Invocation::new(command[0], &command[1..]).output()?.ok()?;
    }
    Ok(folder)
}

#[test]
fn a_quota_reaches_the_guest() -> Result<()> {
    // mount(2) says ENODEV of a file system that the kernel neither has nor can load
    let known = mount(Some("none"), "/", Some("btrfs"), MsFlags::empty(), None::<&str>);
    if known == Err(nix::errno::Errno::ENODEV) {
        eprintln!("skipped: the kernel of this host has no btrfs, and so no quota that a test can set");
        return Ok(());
    }
    with_node(|node| {
        let root = node.dir().join("quota");
        let _mounted = Mounted(root.clone());
        let limited = with_quota(&root)?;
        let script = "cd /data; dd if=/dev/zero of=big bs=64k count=100 2>&1 | grep -o '[A-Z].* exceeded'; \
                      [ $(stat -c %s big) -gt 3000000 ] && [ $(stat -c %s big) -lt 4194304 ] && echo so much; \
                      echo more >> big || echo not more; rm big; sync; ls; echo again > word; cat word; rm word; sync";
        let mut seen = Vec::new();
        for runtime in e2e::BOTH {
            let id = format!("quota-{}", runtime.tag());
            let out = node.run(runtime, &id, &["--mount", &bind(&limited)], &["sh", "-c", script]).output()?.ok()?;
            seen.push(out.text());
        }
        ensure!(seen[0] == seen[1] && seen[0].contains("uota exceeded\nso much"), "{seen:#?}");
        Ok(())
    })
}

/// The daemon's arguments in the configuration, with one more.
fn with_argument(argument: &str) -> Result<NodeSetup> {
    let config = fs::read_to_string(Install::locate()?.config())?;
    let key = "#virtio_fs_extra_args = [\"--thread-pool-size=1\"]";
    ensure!(config.contains(key), "no {key} in the configuration");
    let config = config.replace(key, &format!("virtio_fs_extra_args = [\"--thread-pool-size=1\", {argument:?}]"));
    Ok(NodeSetup { config: Some(config), ..NodeSetup::default() })
}

fn daemon_limit(node: &Node) -> Result<u64> {
    let daemon = e2e::processes::of_node(node.tag()).into_iter().find(|one| one.name.contains("virtiofsd"));
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.context("virtiofsd")?.pid))?;
    let line = limits.lines().find(|line| line.starts_with("Max open files")).context("a limit")?;
    line.split_whitespace().nth(3).and_then(|number| number.parse().ok()).with_context(|| line.to_owned())
}

#[test]
fn open_files_of_the_host_are_bounded() -> Result<()> {
    with_node(|node| {
        node.detached(Runtime::Kata, "one", &[], &["sleep", "1000"])?;
        let limit = daemon_limit(node)?;
        ensure!(limit <= 1_000_000, "a guest may have {limit} files of the host open");
        node.remove("one")
    })?;
    with_node_setup(with_argument("--rlimit-nofile=400")?, |node| {
        let volume = node.dir().join("many");
        fs::create_dir(&volume)?;
        for number in 0..1000 {
            fs::write(volume.join(format!("f{number}")), "")?;
        }
        node.detached(Runtime::Kata, "one", &["--mount", &bind(&volume)], &["sleep", "1000"])?;
        ensure!(daemon_limit(node)? == 400, "{}", daemon_limit(node)?);
        // one after the other the guest may have all of them
        node.exec("one", "each", &[], &["sh", "-c", "cat /data/f* > /dev/null"]).output()?.ok()?;
        let out = node.exec("one", "all", &[], &["sh", "-c", "paste /data/f* > /dev/null"]).output()?;
        ensure!(out.code != 0 && out.stderr.contains("Too many open files"), "{}: {}", out.code, out.stderr);
        // it has its own files used up and nobody else's
        ensure!(node.run(Runtime::Kata, "two", &[], &["echo", "alive"]).output()?.ok()?.text() == "alive", "another");
        node.remove("one")
    })
}

#[test]
fn what_was_synced_outlives_the_machine() -> Result<()> {
    with_node(|node| {
        let volume = node.dir().join("synced");
        fs::create_dir(&volume)?;
        let script = "dd if=/dev/urandom of=/data/file bs=1M count=8 conv=fsync 2> /dev/null; sha256sum < /data/file > \
                      /data/sum; sync /data/sum /data; echo synced; sleep 1000";
        node.detached(Runtime::Kata, "one", &["--mount", &bind(&volume)], &["sh", "-c", script])?;
        let end = Instant::now() + Duration::from_secs(30);
        let done = |node: &Node| node.exec("one", "ask", &[], &["sh", "-c", "ps -o args | grep -c '[s]leep'"]).output();
        while done(node)?.text() != "1" {
            ensure!(Instant::now() < end, "the container did not write within 30 s");
        }
        let machine = e2e::processes::of_node(node.tag()).into_iter().find(|one| one.name.starts_with("qemu"));
        machine.context("a virtual machine")?.kill()?;
        let sum = std::process::Command::new("sh")
            .args(["-c", "sha256sum < file | cmp - sum && stat -c %s file"])
            .current_dir(&volume)
            .output()?;
        ensure!(sum.stdout == b"8388608\n", "{sum:?}");
        node.remove("one")
    })
}

#[test]
fn set_user_bits_and_devices_of_a_guest() -> Result<()> {
    with_node(|node| {
        let volume = node.dir().join("bits");
        fs::create_dir(&volume)?;
        let script = "cp /bin/busybox /data/b && chmod 4755 /data/b && mknod -m 666 /data/null c 1 3 && ls -l /data | \
                      cut -c 1-10; /data/b id -u; echo x > /data/null; sleep 1000";
        node.detached(Runtime::Kata, "one", &["--mount", &bind(&volume)], &["sh", "-c", script])?;
        let end = Instant::now() + Duration::from_secs(20);
        while !volume.join("null").exists() {
            ensure!(Instant::now() < end, "the container made nothing within 20 s");
            std::thread::sleep(Duration::from_millis(50));
        }
        // through the share they are nothing: neither a program of root's nor a device
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let shared = format!("{} ", volume.display());
        let copies: Vec<_> = table
            .lines()
            .filter(|line| line.contains("/run/kata-containers/sandboxes/") && line.contains(shared.trim_end()))
            .collect();
        ensure!(copies.len() >= 2, "{table}");
        for line in &copies {
            ensure!(line.contains("nosuid") && line.contains("nodev"), "{line}");
        }
        let point = copies[0].split(' ').nth(4).context("a mount point")?;
        let opened = fs::File::options().write(true).open(Path::new(point).join("null"));
        ensure!(opened.is_err_and(|error| error.raw_os_error() == Some(nix::libc::EACCES)), "a device was opened");
        node.remove("one")
    })
}
