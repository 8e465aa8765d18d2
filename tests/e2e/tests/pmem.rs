//! Disks that are persistent memory of the guest (`block_device_driver = "virtio-pmem"`): the host's file is mapped, so what
//! virtio-blk gets from QEMU's block layer (locks, read-only, flushes) is ours to show.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Containerd, Node, NodeSetup, Outcome, Runtime,
    cri::{Network, with_cri},
    ctr::Invocation,
    events::Events,
    install::Install,
    journal::Journal,
    processes,
    snapshotter::{self, file_system},
    with_node_setup,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

fn config() -> Result<String> {
    Install::locate()?.config_with(&[("block_device_driver", "virtio-pmem".into())])
}

fn with_pmem(test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    with_node_setup(NodeSetup { config: Some(config()?), ..NodeSetup::default() }, test)
}

fn run(program: &str, args: &[&str]) -> Result<String> {
    Ok(Invocation::new(program, args).output()?.ok()?.text())
}

fn shell(node: &Node, id: &str, options: &[&str], script: &str) -> Result<Outcome> {
    node.run(Runtime::Kata, id, options, &["sh", "-c", script]).output()
}

/// A direct volume of `mib` MiB with ext4: its file, and the option of `ctr run` for it.
fn volume(node: &Node, name: &str, mib: u64, options: &[&str]) -> Result<(PathBuf, String)> {
    let (disk, folder) = (node.dir().join(format!("{name}.img")), node.dir().join(name));
    file_system(&disk, mib)?;
    fs::create_dir(&folder)?;
    let info = serde_json::json!({"volume-type": "block", "device": disk, "fstype": "ext4", "options": options});
    let path = folder.display().to_string();
    kata_runtime(node, &["add", "--volume-path", &path, "--mount-info", &info.to_string()])?;
    Ok((disk, format!("type=bind,src={path},dst=/data,options=rbind:rw")))
}

fn kata_runtime(node: &Node, args: &[&str]) -> Result<String> {
    let program = node.install().kata_runtime().display().to_string();
    run(&program, &[&["direct-volume"], args].concat())
}

/// Volumes are the machine's: what a test added it takes back.
fn forget(node: &Node, names: &[&str]) -> Result<()> {
    for name in names {
        kata_runtime(node, &["remove", "--volume-path", &node.dir().join(name).display().to_string()])?;
    }
    Ok(())
}

fn qemu(node: &Node) -> Result<processes::Process> {
    processes::wait_for(node.tag(), "qemu-system", Duration::from_secs(5))
}

/// How many files with `part` in their names a node's QEMU has open.
fn open_files(node: &Node, part: &str) -> Result<usize> {
    let all = fs::read_dir(format!("/proc/{}/fd", qemu(node)?.pid))?.flatten();
    Ok(all.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.display().to_string().contains(part))).count())
}

fn gone(node: &Node) -> Result<()> {
    let begin = Instant::now();
    while processes::of_node(node.tag()).iter().any(|one| one.name.starts_with("qemu")) {
        ensure!(begin.elapsed() < Duration::from_secs(5), "QEMU is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// What the guest reads is what the host has, and containers of a pod that runs bring theirs with them.
#[test]
fn root_file_systems_are_memory() -> Result<()> {
    if !Containerd::chosen()?.contains(&Containerd::V2) {
        return Ok(());
    }
    snapshotter::with_snapshotter("blockfile", 24, Some(config()?), |node| {
        let block = ["--snapshotter", "blockfile"];
        let sums = "find / -xdev -type f ! -path '/etc/*' | sort | xargs md5sum";
        let [ours, runcs] = [Runtime::Kata, Runtime::Runc].map(|runtime| -> Result<String> {
            Ok(node.run(runtime, runtime.tag(), &block, &["sh", "-c", sums]).output()?.ok()?.text())
        });
        let (ours, runcs) = (ours?, runcs?);
        ensure!(ours == runcs && ours.lines().count() > 0, "kata:\n{ours}\nrunc:\n{runcs}");

        let of = ["--annotation", "io.kubernetes.cri.sandbox-id=pod"];
        let pod = [&["--annotation", "io.kubernetes.cri.container-type=sandbox"], &of[..]].concat();
        let member = [&["--annotation", "io.kubernetes.cri.container-type=container"], &of[..], &block[..]].concat();
        let sleep = ["sleep", "1000"];
        node.detached(Runtime::Kata, "pod", &pod, &sleep)?;
        // a VM has room for four of them, and gives none back: the others are disks, which come and go
        for (number, disk) in ["pmem0", "pmem1", "pmem2", "pmem3", "vda", "vda"].into_iter().enumerate() {
            let id = format!("m{number}");
            node.detached(Runtime::Kata, &id, &member, &sleep)?;
            let script = format!("grep ' / ' /proc/mounts; echo {id} > /x; sync; cat /x");
            let seen = node.exec(&id, "x", &[], &["sh", "-c", &script]).output()?.ok()?.text();
            ensure!(seen.starts_with(&format!("/dev/{disk} / ext4 rw")) && seen.ends_with(&id), "{id}: {seen}");
            node.ctr(["task", "kill", "-s", "KILL", &id]).output()?.ok()?;
            node.remove(&id)?;
        }
        let told = |line: &str| line.contains("cannot be persistent memory") && line.contains("of at most 4");
        node.log.wait_from(0, Duration::from_secs(5), told).context("nothing of the fifth in the log")?;
        ensure!(open_files(node, "blockfile")? > 0, "memory of the guest is closed while it has it");
        node.ctr(["task", "kill", "-s", "KILL", "pod"]).output()?.ok()?;
        node.remove("pod")?;
        gone(node)
    })
}

/// KiB of a file that a node's QEMU has mapped and that are not written to the host's disk yet.
fn unwritten(node: &Node, file: &Path) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", qemu(node)?.pid))?;
    let shown = file.display().to_string();
    let after = maps.split_once(&shown).with_context(|| format!("{shown} is not mapped"))?.1;
    let dirty = after.lines().take(24).filter(|line| line.contains("_Dirty:"));
    Ok(dirty.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum())
}

/// A flush of the guest's is one of the host's, and what was synced is there when the VM is killed.
#[test]
fn what_was_synced_is_on_the_host() -> Result<()> {
    with_pmem(|node| {
        let (disk, mount) = volume(node, "kept", 16, &[])?;
        node.detached(Runtime::Kata, "c1", &["--mount", &mount], &["sleep", "1000"])?;
        let write = "grep ' /data ' /proc/mounts; seq 100000 | dd of=/data/file conv=fsync 2> /dev/null; echo synced";
        let said = node.exec("c1", "x", &[], &["sh", "-c", write]).output()?.ok()?.text();
        ensure!(said.starts_with("/dev/pmem0 /data ext4 rw") && said.ends_with("synced"), "{said}");
        // what is in memory is never on a disk
        if run("stat", &["-f", "-c", "%T", &disk.display().to_string()])? != "tmpfs" {
            let left = unwritten(node, &disk)?;
            ensure!(left == 0, "{left} KiB are not on the host's disk after a sync");
        }
        let events = Events::watch(node)?;
        qemu(node)?.kill()?;
        events.wait("/tasks/exit", "c1", Duration::from_secs(10))?;
        node.remove("c1")?;
        // whoever dies, the file is free afterwards
        node.detached(Runtime::Kata, "c2", &["--mount", &mount], &["sleep", "1000"])?;
        processes::wait_for(node.tag(), "containerd-shim-kata", Duration::from_secs(5))?.kill()?;
        events.wait("/tasks/delete", "c2", Duration::from_secs(10))?;
        node.ctr(["container", "rm", "c2"]).output()?.ok()?;
        let seen = shell(node, "c3", &["--mount", &mount], "tail -n 1 /data/file")?.ok()?.text();
        ensure!(seen == "100000", "{seen}");
        let copy = node.dir().join("copy").display().to_string();
        fs::copy(&disk, &copy)?;
        // the journal is played first, as a mount would
        let checked = Invocation::new("e2fsck", ["-fp", &copy]).output()?;
        ensure!(checked.code < 4, "{checked:?}");
        let on_host = run("debugfs", &["-R", "cat /file", &copy])?;
        ensure!(on_host.starts_with("1\n2\n") && on_host.ends_with("\n100000"), "not all is on the host");
        forget(node, &["kept"])
    })
}

/// What is only read cannot be written by whoever is root in the guest, and says so to everybody else.
#[test]
fn what_is_read_only_stays_as_it_is() -> Result<()> {
    with_pmem(|node| {
        let (disk, mount) = volume(node, "fixed", 16, &["ro"])?;
        let before = fs::read(&disk)?;
        let script = r"
            grep ' /data ' /proc/mounts; cat /sys/block/pmem0/ro
            mknod /tmp/p b $(tr : ' ' < /sys/block/pmem0/dev)
            dd if=/dev/zero of=/tmp/p bs=4096 count=256 conv=fsync 2> /dev/null && echo written || echo refused";
        node.detached(Runtime::Kata, "c1", &["--mount", &mount], &["sleep", "1000"])?;
        // the mark is the guest's, the map is not
        let maps = fs::read_to_string(format!("/proc/{}/maps", qemu(node)?.pid))?;
        let map = maps.lines().find(|line| line.ends_with("fixed.img")).context("it is not mapped")?;
        ensure!(map.contains(" r--s "), "{map}");
        node.remove("c1")?;
        let said = shell(node, "c2", &["--privileged", "--mount", &mount], script)?.ok()?.text();
        ensure!(said.starts_with("/dev/pmem0 /data ext4 ro") && said.ends_with("\n1\nrefused"), "{said}");
        ensure!(fs::read(&disk)? == before, "the guest wrote what it may only read");
        forget(node, &["fixed"])
    })
}

/// QEMU locks no memory, so the shim does, as QEMU locks disks.
#[test]
fn two_pods_do_not_share_a_file_system() -> Result<()> {
    with_pmem(|node| {
        let (disk, mount) = volume(node, "one", 16, &[])?;
        let blk = Install::locate()?.config_with(&[])?;
        let other = node.dir().join("blk.toml");
        fs::write(&other, blk)?;
        let other = other.display().to_string();
        let by_blk = ["--runtime-config-path", other.as_str(), "--mount", &mount];
        for (first, second) in [(&["--mount", &mount][..], &by_blk[..]), (&by_blk, &["--mount", &mount])] {
            node.detached(Runtime::Kata, "first", first, &["sleep", "1000"])?;
            let refused = node.run(Runtime::Kata, "second", second, &["true"]).output()?;
            let shown = disk.display().to_string();
            ensure!(refused.code != 0, "both have it: {refused:?}");
            ensure!(refused.stderr.contains("lock") && refused.stderr.contains(&shown), "{}", refused.stderr);
            node.remove("first")?;
        }
        forget(node, &["one"])
    })
}

/// A raw device, exact to its last byte, is memory if it can be, and a disk of its size if not.
#[test]
fn raw_devices_have_their_size() -> Result<()> {
    with_pmem(|node| {
        for (name, bytes, disk) in [("even", 4 << 20, "pmem0"), ("odd", (4 << 20) + 512, "vda")] {
            let file = node.dir().join(name);
            fs::File::create(&file)?.set_len(bytes)?;
            let device = run("losetup", &["--find", "--show", &file.display().to_string()])?;
            let script = format!(
                "blockdev --getsize64 {device}; ls /sys/class/block | grep -e pmem -e vd; \
                 echo {name} | dd of={device} bs=512 conv=sync,fsync seek={} 2> /dev/null && echo written",
                bytes / 512 - 1
            );
            let said = shell(node, name, &["--device", &device], &script)?.text();
            // whatever is said next, the device is free
            run("losetup", &["--detach", &device])?;
            ensure!(said == format!("{bytes}\n{disk}\nwritten"), "{said}");
            let on_host = fs::read(&file)?;
            ensure!(on_host[usize::try_from(bytes)? - 512..].starts_with(name.as_bytes()), "{name} is not on the host");
        }
        let told = |line: &str| line.contains("its size, 4194816 bytes, is not a multiple of 2 MiB");
        node.log.wait_from(0, Duration::from_secs(5), told).context("nothing of the odd one in the log")?;
        Ok(())
    })
}

/// A volume that a pod may only read is marked for its kernel, too.
#[test]
fn a_raw_device_to_read_is_marked() -> Result<()> {
    let setup = NodeSetup { config: Some(config()?), ..NodeSetup::default() };
    with_cri(setup, Network::default(), |cri| {
        let file = tempfile::NamedTempFile::new_in("/var/tmp")?;
        fs::write(file.path(), [b"bytes".as_slice(), &vec![0; (2 << 20) - 5]].concat())?;
        let device = run("losetup", &["--find", "--show", &file.path().display().to_string()])?;
        let read = || -> Result<String> {
            let pod = cri.run_pod(Runtime::Kata, "raw", &serde_json::json!({}))?;
            let devices = serde_json::json!({"devices": [
                {"container_path": "/dev/disk", "host_path": device, "permissions": "r"}]});
            let one = cri.run(&pod, "one", &["sleep", "100000"], &devices)?;
            let said = cri.sh(
                &one,
                "head -c 5 /dev/disk; cat /sys/block/pmem0/ro; (echo x > /dev/disk) 2> /dev/null || echo refused",
            )?;
            cri.remove(&pod)?;
            Ok(said)
        };
        let said = read();
        run("losetup", &["--detach", &device])?;
        let said = said?;
        ensure!(said == "bytes1\nrefused", "{said}");
        Ok(())
    })
}

/// Who makes the file shorter takes memory away from the guest: its pod ends, with the reason, and no other.
#[test]
fn a_file_that_becomes_shorter_ends_its_pod_only() -> Result<()> {
    with_pmem(|node| {
        let (disk, mount) = volume(node, "short", 16, &[])?;
        node.detached(Runtime::Kata, "other", &[], &["sleep", "1000"])?;
        let read = "cat /dev/zero > /data/file & while sleep 0.05; do sync; done";
        let run = node.run(Runtime::Kata, "c1", &["--mount", &mount], &["sh", "-c", read]).spawn()?;
        let end = Instant::now() + Duration::from_secs(20);
        while fs::read_to_string(format!("/proc/{}/maps", qemu_of(node, "c1").map_or(0, |one| one.pid)))
            .map_or(true, |maps| !maps.contains("short.img"))
        {
            ensure!(Instant::now() < end, "the volume is not mapped");
            std::thread::sleep(Duration::from_millis(50));
        }
        fs::File::options().write(true).open(&disk)?.set_len(1 << 20)?;
        let ended = run.finish()?;
        ensure!(ended.code == 255, "{ended:?}");
        // under KVM nothing ends yet (docs/design/010-disks.md)
        let told = |line: &str| line.contains("a file that is memory of the virtual machine");
        node.log.wait_from(0, Duration::from_secs(5), told).context("no reason in the log")?;
        let alive = node.exec("other", "x", &[], &["echo", "alive"]).output()?.ok()?.text();
        ensure!(alive == "alive", "{alive}");
        node.remove("other")?;
        forget(node, &["short"])
    })
}

/// A VM that was saved, or waits in a pool, has addresses set aside as one that boots.
#[test]
fn clones_and_machines_of_a_pool_have_room() -> Result<()> {
    let own = tempfile::Builder::new().prefix("kepmem").tempdir_in("/dev/shm")?;
    let at = |name: &str| toml::Value::from(own.path().join(name).display().to_string());
    let config = Install::locate()?.config_table_with(
        "factory",
        &[
            ("enable_template", true.into()),
            ("template_path", at("templates")),
            ("vm_cache_number", 1.into()),
            ("vm_cache_endpoint", at("pool.sock")),
        ],
    )?;
    let mut config: toml::Table = config.parse()?;
    let hypervisor = config["hypervisor"]["qemu"].as_table_mut().context("no [hypervisor.qemu]")?;
    hypervisor.insert("block_device_driver".into(), "virtio-pmem".into());
    with_node_setup(NodeSetup { config: Some(config.to_string()), ..NodeSetup::default() }, |node| {
        let factory = |word: &str| {
            let (program, config) = (node.install().kata_runtime(), node.config().display().to_string());
            let words = ["--config", &config, "factory", word];
            Invocation::new(&program.display().to_string(), words).env(processes::MARK, node.tag())
        };
        let mut server = factory("init").limit(Duration::from_secs(120)).spawn()?;
        let said = Journal::default();
        said.follow(server.stdout.take().context("no output")?);
        let tested = said
            .wait_from(0, Duration::from_secs(30), |line| line.starts_with("ready: "))
            .context("no machine is ready")
            .and_then(|_| in_saved_machines(node));
        factory("destroy").output()?.ok()?;
        server.finish()?.ok()?;
        tested
    })
}

fn in_saved_machines(node: &Node) -> Result<()> {
    let (_, mount) = volume(node, "saved", 16, &[])?;
    let told = |words: &'static str, id: &'static str| {
        let both = move |line: &str| line.contains(words) && line.contains(&format!("sandbox={id}"));
        node.log.wait_from(0, Duration::from_secs(5), both).with_context(|| format!("{id} is none"))
    };
    let script = "grep ' /data ' /proc/mounts; echo here > /data/x; sync; cat /data/x";
    let right = |said: &str| said.starts_with("/dev/pmem0 /data ext4 rw") && said.ends_with("here");
    let said = shell(node, "c1", &["--mount", &mount], script)?.ok()?.text();
    ensure!(right(&said), "{said}");
    told("a clone of a template", "c1")?;

    let kind = |kind: &'static str| ["--annotation", kind, "--annotation", "io.kubernetes.cri.sandbox-id=pod"];
    let member = kind("io.kubernetes.cri.container-type=container");
    let sleep = ["sleep", "1000"];
    node.detached(Runtime::Kata, "pod", &kind("io.kubernetes.cri.container-type=sandbox"), &sleep)?;
    told("a machine of the pool", "pod")?;
    // the second finds what the first has left
    for id in ["m1", "m2"] {
        node.detached(Runtime::Kata, id, &[&member[..], &["--mount", &mount]].concat(), &sleep)?;
        let said = node.exec(id, "x", &[], &["sh", "-c", script]).output()?.ok()?.text();
        ensure!(right(&said), "{id}: {said}");
        node.remove(id)?;
    }
    node.remove("pod")?;
    forget(node, &["saved"])
}

fn qemu_of(node: &Node, id: &str) -> Option<processes::Process> {
    let name = format!("kata-{id},");
    processes::of_node(node.tag()).into_iter().find(|one| one.name.starts_with("qemu") && one.command.contains(&name))
}
