//! What containers have on disks of their VM: root file systems of containerd's snapshotters blockfile and erofs, raw
//! devices, direct volumes. The host mounts none of it.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::Mount;
use e2e::{
    Containerd, Node, NodeSetup, Outcome, Runtime,
    cri::{Network, with_cri},
    events::Events,
    image,
    install::Install,
    processes,
    snapshotter::{self, file_system},
    task_api::{Bundle, Shim},
    with_node, with_node_setup,
};
use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// containerd 2.x with both snapshotters, the image unpacked in one of them.
fn with_snapshotter(name: &str, config: Option<String>, test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    if !Containerd::chosen()?.contains(&Containerd::V2) {
        return Ok(());
    }
    snapshotter::with_snapshotter(name, 24, config, test)
}

fn configured(changes: &[(&str, toml::Value)]) -> Result<String> {
    Install::locate()?.config_with(changes)
}

fn run(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program).args(args).output().with_context(|| format!("starting {program}"))?;
    ensure!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8(out.stdout)?.trim_end().to_owned())
}

fn shell(node: &Node, id: &str, options: &[&str], script: &str) -> Result<Outcome> {
    node.run(Runtime::Kata, id, options, &["sh", "-c", script]).output()
}

/// A loop device, as the host's block devices go.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &Path) -> Result<Self> {
        run("losetup", &["--find", "--show", &file.display().to_string()]).map(Self)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach", &self.0]);
    }
}

/// The root file system's line of the container's mounts.
const ROOT: &str = "grep ' / ' /proc/mounts";

#[test]
fn an_image_file_is_a_disk_of_the_vm() -> Result<()> {
    with_snapshotter("blockfile", None, |node| {
        let options = ["--snapshotter", "blockfile"];
        let script = format!("{ROOT}; cat /kept 2> /dev/null; echo written >> /kept");
        let create = [
            "run",
            "--snapshotter",
            "blockfile",
            "--runtime",
            Runtime::Kata.name(),
            image::NAME,
            "c1",
            "sh",
            "-c",
            &script,
        ];
        let first = node.ctr(create).output()?.ok()?.text();
        ensure!(first.starts_with("/dev/vda / ext4 rw"), "{first:?}");
        // what was written is on the host when the container has ended
        node.ctr(["task", "delete", "c1"]).output()?;
        let second = node.ctr(["task", "start", "c1"]).output()?.ok()?.text();
        ensure!(second.ends_with("written"), "{second:?}");
        node.ctr(["container", "rm", "c1"]).output()?.ok()?;

        // neither the host nor the share has it mounted
        node.detached(Runtime::Kata, "c2", &options, &["sleep", "1000"])?;
        let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo")?).into_owned();
        let of_blockfile: Vec<_> =
            mounts.lines().filter(|line| line.contains("/c2/rootfs") || line.contains("loop")).collect();
        ensure!(of_blockfile.is_empty(), "{of_blockfile:#?}");
        let events = Events::watch(node)?;
        processes::wait_for(node.tag(), "containerd-shim-kata", Duration::from_secs(5))?.kill()?;
        events.wait("/tasks/delete", "c2", Duration::from_secs(10))?;
        node.ctr(["container", "rm", "c2"]).output()?.ok()?;
        Ok(())
    })
}

#[test]
fn layers_of_erofs_are_put_together_in_the_guest() -> Result<()> {
    with_snapshotter("erofs", None, |node| {
        let options = ["--snapshotter", "erofs"];
        let script =
            format!("{ROOT}; echo new > /etc/new; cat /etc/new; stat -c %a / /tmp; cat /proc/partitions | grep -c vd");
        let told = shell(node, "c1", &options, &script)?.ok()?.text();
        let lines: Vec<_> = told.lines().collect();
        ensure!(lines[0].starts_with("overlay / overlay rw"), "{told}");
        ensure!(lines[1..] == ["new", "755", "1777", "2"], "{told}");
        Ok(())
    })
}

/// A container of a pod that runs already brings a disk with it, and takes it away.
#[test]
fn disks_come_and_go_with_containers() -> Result<()> {
    let truth = toml::Value::from(true);
    let blk = [("block_device_driver", "virtio-blk".into()), ("block_device_aio", "io_uring".into())];
    let scsi = [
        ("block_device_driver", "virtio-scsi".into()),
        ("block_device_aio", "native".into()),
        ("block_device_cache_set", truth.clone()),
        ("block_device_cache_direct", truth),
        ("block_device_logical_sector_size", 4096.into()),
        ("block_device_physical_sector_size", 4096.into()),
    ];
    for (driver, settings) in [("virtio-blk", blk.as_slice()), ("virtio-scsi", &scsi)] {
        with_snapshotter("blockfile", Some(configured(settings)?), |node| {
            let kind = |kind: &str| format!("io.kubernetes.cri.container-type={kind}");
            let (pod, member) = (kind("sandbox"), kind("container"));
            let of = "io.kubernetes.cri.sandbox-id=pod";
            let with = |kind: &'static str| ["--snapshotter", "blockfile", "--annotation", kind, "--annotation", of];
            let (pod, member): (&'static str, &'static str) = (pod.leak(), member.leak());
            node.detached(Runtime::Kata, "pod", &with(pod), &["sleep", "1000"])?;
            // each has its own, and the name of the one before is free again
            for id in ["m1", "m2", "m3"] {
                node.detached(Runtime::Kata, id, &with(member), &["sleep", "1000"])?;
                let seen =
                    node.exec(id, "x", &[], &["sh", "-c", &format!("{ROOT}; echo {id} > /x; cat /x")]).output()?;
                let seen = seen.ok()?.text();
                let disk = if driver == "virtio-blk" { "/dev/vd" } else { "/dev/sd" };
                ensure!(seen.starts_with(disk) && seen.contains(" / ext4 ") && seen.ends_with(id), "{driver}: {seen}");
                if id != "m3" {
                    node.ctr(["task", "kill", "-s", "KILL", id]).output()?.ok()?;
                    node.remove(id)?;
                    let left = qemu_files(node, "blockfile")?;
                    ensure!(left == 0, "{driver}: QEMU still has {left} image files open");
                }
            }
            for id in ["m3", "pod"] {
                node.ctr(["task", "kill", "-s", "KILL", id]).output()?.ok()?;
                node.remove(id)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Whoever is root in a VM can take away the bridge that its disks are behind, and then nothing of the guest's ever answers
/// when one of them is to go.
#[test]
fn a_disk_that_the_guest_keeps_holds_nobody_up() -> Result<()> {
    // a clone has its folder behind the same bridge
    let boots = Install::locate()?.config_table_with("factory", &[("enable_template", false.into())])?;
    with_snapshotter("blockfile", Some(boots), |node| {
        let kind = |kind: &'static str| ["--annotation", kind, "--annotation", "io.kubernetes.cri.sandbox-id=pod"];
        let member = kind("io.kubernetes.cri.container-type=container");
        let sleep = ["sleep", "1000"];
        node.detached(Runtime::Kata, "pod", &kind("io.kubernetes.cri.container-type=sandbox"), &sleep)?;
        node.detached(Runtime::Kata, "root", &[&member[..], &["--privileged"]].concat(), &sleep)?;
        node.detached(Runtime::Kata, "m1", &[&member[..], &["--snapshotter", "blockfile"]].concat(), &sleep)?;
        let remove = "echo 1 > /sys/bus/pci/devices/0000:00:1e.0/remove; ls /sys/bus/pci/devices; cat /proc/partitions";
        let left = node.exec("root", "x", &[], &["sh", "-c", remove]).output()?.ok()?.text();
        ensure!(!left.contains("0000:01:") && !left.contains("vda"), "the disk is still there: {left}");

        node.ctr(["task", "kill", "-s", "KILL", "m1"]).output()?.ok()?;
        let begin = Instant::now();
        node.remove("m1")?;
        ensure!(begin.elapsed() < Duration::from_secs(20), "the container's end took {:?}", begin.elapsed());
        let said = |line: &str| line.contains("the guest keeps a disk") && line.contains("blockfile");
        node.log.wait_from(0, Duration::from_secs(5), said).context("nothing in the log")?;
        ensure!(qemu_files(node, "blockfile")? > 0, "its file is closed while the guest has it");
        // the pod goes on, and with its end the file is nobody's
        ensure!(node.exec("root", "y", &[], &["echo", "alive"]).output()?.ok()?.text() == "alive", "the pod");
        for id in ["root", "pod"] {
            node.ctr(["task", "kill", "-s", "KILL", id]).output()?.ok()?;
            node.remove(id)?;
        }
        let begin = Instant::now();
        while processes::of_node(node.tag()).iter().any(|one| one.name.starts_with("qemu")) {
            ensure!(begin.elapsed() < Duration::from_secs(5), "QEMU is still there");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })
}

/// How many files with `part` in their names QEMU has open.
fn qemu_files(node: &Node, part: &str) -> Result<usize> {
    let qemu = processes::wait_for(node.tag(), "qemu-system", Duration::from_secs(5))?;
    let all = fs::read_dir(format!("/proc/{}/fd", qemu.pid))?.flatten();
    Ok(all.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.display().to_string().contains(part))).count())
}

/// With `disable_block_device_use` the host does the mounting, and takes it back.
#[test]
fn without_disks_the_host_mounts_images() -> Result<()> {
    for (snapshotter, kind) in [("blockfile", "virtiofs"), ("erofs", "virtiofs")] {
        let config = configured(&[("disable_block_device_use", true.into())])?;
        with_snapshotter(snapshotter, Some(config), |node| {
            let options = ["--snapshotter", snapshotter];
            let told = shell(node, "c1", &options, &format!("{ROOT}; echo new > /etc/new; cat /etc/new"))?.ok()?.text();
            ensure!(told.contains(&format!(" / {kind} ")) && told.ends_with("new"), "{snapshotter}: {told}");
            node.detached(Runtime::Kata, "c2", &options, &["sleep", "1000"])?;
            let events = Events::watch(node)?;
            processes::wait_for(node.tag(), "containerd-shim-kata", Duration::from_secs(5))?.kill()?;
            events.wait("/tasks/delete", "c2", Duration::from_secs(10))?;
            node.ctr(["container", "rm", "c2"]).output()?.ok()?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_device_of_the_host_is_the_containers() -> Result<()> {
    with_node(|node| {
        let file = node.dir().join("raw");
        fs::File::create(&file)?.set_len(4 << 20)?;
        let device = LoopDevice::new(&file)?;
        let path = device.0.as_str();
        let mut told = Vec::new();
        for runtime in [Runtime::Runc, Runtime::Kata] {
            let script = format!(
                "test -b {path} && blockdev --getsize64 {path}; printf s-{} | dd of={path} bs=512 conv=sync 2> /dev/null; \
                 dd if={path} bs=512 count=1 2> /dev/null | tr -d '\\0'",
                runtime.tag()
            );
            let out = node.run(runtime, "c1", &["--device", path], &["sh", "-c", &script]).output()?.ok()?.text();
            let on_host = fs::read(&file)?;
            let word = format!("s-{}", runtime.tag());
            ensure!(on_host.starts_with(word.as_bytes()), "{}: not on the host: {out}", runtime.tag());
            told.push(out.replace(runtime.tag(), "RUNTIME"));
        }
        ensure!(told[0] == told[1], "runc {:?}, kata {:?}", told[0], told[1]);
        // what nobody is let to write is not written, by whomever
        let guarded =
            node.run(Runtime::Kata, "c2", &["--privileged"], &["sh", "-c", "grep -c 'vd[a-z]' /proc/partitions"]);
        let seen = guarded.output()?;
        ensure!(seen.text() == "0", "a privileged container has disks that it did not ask for: {seen:?}");
        drop(device);
        let gone = node.run(Runtime::Kata, "c3", &["--device", "/dev/loop-control"], &["true"]).output()?;
        ensure!(gone.code == 0, "a device that is no disk: {gone:?}");
        Ok(())
    })
}

/// `kata-runtime direct-volume` of the installation.
fn direct_volume(node: &Node, args: &[&str]) -> Result<String> {
    let program = node.install().bin().join("kata-runtime").display().to_string();
    run(&program, &[&["direct-volume"], args].concat())
}

#[test]
fn a_direct_volume_is_mounted_by_the_guest() -> Result<()> {
    with_node(|node| {
        let disk = node.dir().join("volume.img");
        file_system(&disk, 16)?;
        let volume = node.dir().join("volume");
        fs::create_dir(&volume)?;
        let path = volume.display().to_string();
        let info = serde_json::json!({"volume-type": "block", "device": disk, "fstype": "ext4",
            "metadata": {"fsGroup": "2000"}, "options": ["noatime"]});
        direct_volume(node, &["add", "--volume-path", &path, "--mount-info", &info.to_string()])?;
        let mount = format!("type=bind,src={path},dst=/data,options=rbind:rw");
        let script =
            "grep ' /data ' /proc/mounts; stat -c '%g %a' /data; cat /data/kept 2> /dev/null; echo kept > /data/kept";
        let first = shell(node, "c1", &["--mount", &mount], script)?.ok()?.text();
        ensure!(first.starts_with("/dev/vda /data ext4 rw,noatime"), "{first}");
        ensure!(first.contains("\n2000 277"), "the group: {first}");
        let second = shell(node, "c2", &["--mount", &mount], script)?.ok()?.text();
        ensure!(second.ends_with("kept"), "{second}");
        // asked and enlarged while a pod has it
        node.detached(Runtime::Kata, "c4", &["--mount", &mount], &["sleep", "1000"])?;
        let bytes = || -> Result<u64> {
            let stats: serde_json::Value =
                serde_json::from_str(&direct_volume(node, &["stats", "--volume-path", &path])?)?;
            ensure!(stats["usage"][1]["used"].as_u64().is_some_and(|inodes| inodes > 10), "{stats}");
            stats["usage"][0]["total"].as_u64().with_context(|| stats.to_string())
        };
        let before = bytes()?;
        direct_volume(node, &["resize", "--volume-path", &path, "--size", &(48u64 << 20).to_string()])?;
        let after = bytes()?;
        ensure!(before < 16 << 20 && after > 40 << 20, "{before} bytes, then {after}");
        let kept = node.exec("c4", "x", &[], &["cat", "/data/kept"]).output()?.ok()?.text();
        ensure!(kept == "kept", "{kept}");
        let events = Events::watch(node)?;
        processes::wait_for(node.tag(), "containerd-shim-kata", Duration::from_secs(5))?.kill()?;
        events.wait("/tasks/delete", "c4", Duration::from_secs(10))?;
        node.ctr(["container", "rm", "c4"]).output()?.ok()?;
        let asked = direct_volume(node, &["stats", "--volume-path", &path]);
        ensure!(
            asked.is_err_and(|error| format!("{error:#}").contains("no running pod has mounted")),
            "a pod that has gone answers"
        );
        // as after a power failure: what was not written back is not missed
        let checked = Command::new("e2fsck").arg("-fp").arg(&disk).output()?;
        ensure!(checked.status.code().is_some_and(|code| code < 4), "{checked:?}");
        ensure!(fs::read_dir(&volume)?.next().is_none(), "the host has the volume mounted");
        direct_volume(node, &["remove", "--volume-path", &path])?;
        let third = shell(node, "c3", &["--mount", &mount], "grep ' /data ' /proc/mounts")?.ok()?.text();
        ensure!(third.contains(" virtiofs "), "{third}");
        Ok(())
    })
}

/// A mount that goes with its user.
struct Small<'a>(&'a Path);

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = run("umount", &[&self.0.display().to_string()]);
    }
}

#[test]
fn a_full_disk_of_the_host_is_an_error_in_the_guest() -> Result<()> {
    for driver in ["virtio-blk", "virtio-scsi"] {
        let config = Some(configured(&[("block_device_driver", driver.into())])?);
        with_node_setup(NodeSetup { config, ..NodeSetup::default() }, |node| {
            let (small, volume) = (node.dir().join("small"), node.dir().join("volume"));
            fs::create_dir(&small)?;
            fs::create_dir(&volume)?;
            run("mount", &["-t", "tmpfs", "-o", "size=9M", "small", &small.display().to_string()])?;
            let _mounted = Small(&small);
            let disk = small.join("volume.img");
            file_system(&disk, 16)?;
            let path = volume.display().to_string();
            let info = serde_json::json!({"volume-type": "block", "device": disk, "fstype": "ext4"}).to_string();
            direct_volume(node, &["add", "--volume-path", &path, "--mount-info", &info])?;
            let mount = format!("type=bind,src={path},dst=/data,options=rbind:rw");
            let script = "dd if=/dev/zero of=/data/f bs=1M count=12 conv=fsync 2> /dev/null || echo full";
            let said = shell(node, "c1", &["--mount", &mount], script)?.text();
            direct_volume(node, &["remove", "--volume-path", &path])?;
            ensure!(said == "full", "{driver}: {said:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_is_wrong_with_a_disk_is_said() -> Result<()> {
    with_node(|node| {
        let disk = node.dir().join("volume.img");
        let volume = node.dir().join("volume");
        fs::create_dir(&volume)?;
        let path = volume.display().to_string();
        let info = serde_json::json!({"volume-type": "block", "device": disk, "fstype": "ext4"}).to_string();
        direct_volume(node, &["add", "--volume-path", &path, "--mount-info", &info])?;
        let mount = format!("type=bind,src={path},dst=/data,options=rbind:rw");
        let expect = |name: &str, words: &[&str]| -> Result<()> {
            let refused = node.run(Runtime::Kata, name, &["--mount", &mount], &["true"]).output()?;
            let shown = disk.display().to_string();
            let missing = words.iter().copied().chain([shown.as_str()]).find(|word| !refused.stderr.contains(word));
            ensure!(refused.code != 0 && missing.is_none(), "without {missing:?}: {refused:?}");
            Ok(())
        };
        expect("none", &["No such file or directory"])?;
        fs::write(&disk, "")?;
        expect("empty", &["no bytes"])?;
        // no file system at all, and one that is broken
        fs::write(&disk, vec![7; 1 << 20])?;
        expect("garbage", &["mount of ext4"])?;
        file_system(&disk, 16)?;
        node.detached(Runtime::Kata, "first", &["--mount", &mount], &["sleep", "1000"])?;
        expect("second", &["lock"])?;
        node.remove("first")?;
        fs::write(&disk, [&fs::read(&disk)?[..4096], &vec![0xff; 12 << 20]].concat())?;
        expect("broken", &["mount of ext4"])?;
        direct_volume(node, &["remove", "--volume-path", &path])?;
        Ok(())
    })
}

#[test]
fn the_command_line_refuses_what_it_cannot_do() -> Result<()> {
    with_node(|node| {
        let info = r#"{"volume-type":"spdkvol","device":"/dev/x","fstype":"ext4"}"#;
        let refused = direct_volume(node, &["add", "--volume-path", "/v", "--mount-info", info]);
        let error = format!("{:#}", refused.err().context("it was taken")?);
        ensure!(error.contains("spdkvol"), "{error}");
        Ok(())
    })
}

/// What a snapshotter says of a root file system.
fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

/// Runs a script in a shim of its own with this root file system, and returns how it ended.
fn status_of(node: &Node, id: &str, script: &str, rootfs: Vec<Mount>) -> Result<u32> {
    let bundle = Bundle::make(node, id, &["/bin/sh", "-c", script])?;
    let shim = Shim::start(node, id, &bundle)?;
    let status = shim.create_from(id, rootfs).and_then(|_| {
        shim.start_container(id)?;
        let status = shim.wait(id)?;
        shim.delete(id)?;
        Ok(status)
    });
    shim.shut_down()?;
    status
}

/// As devmapper gives it; and erofs whose data is in another file than its names.
#[test]
fn root_file_systems_of_other_snapshotters() -> Result<()> {
    with_node(|node| {
        let dir = node.dir();
        let at = |name: &str| dir.join(name).display().to_string();
        image::lay_out(&dir.join("root"))?;
        let disk = dir.join("disk");
        fs::File::create(&disk)?.set_len(24 << 20)?;
        run("mkfs.ext4", &["-q", "-F", "-d", &at("root"), &at("disk")])?;
        let device = LoopDevice::new(&disk)?;
        let script = "grep -q '^/dev/vda / ext4 rw' /proc/mounts && echo new > /new && exit 7";
        ensure!(status_of(node, "c1", script, vec![mount("ext4", &device.0, &["rw"])])? == 7, "a block device");
        drop(device);
        let on_host = run("debugfs", &["-R", "cat /new", &at("disk")])?;
        ensure!(on_host == "new", "what was written is not on the host: {on_host:?}");

        let blob = format!("--blobdev={}", at("blob"));
        run("mkfs.erofs", &["--chunksize=4096", &blob, &at("meta"), &at("root")])?;
        file_system(&dir.join("upper"), 16)?;
        let mounts = vec![
            mount("ext4", &at("upper"), &["rw", "loop"]),
            mount("erofs", &at("meta"), &["ro", "loop", &format!("device={}", at("blob"))]),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ mount 1 }}",
                ],
            ),
        ];
        let script = "grep -q '^overlay / overlay rw' /proc/mounts && echo new > /etc/group && exit 8";
        ensure!(status_of(node, "c2", script, mounts)? == 8, "erofs of two files");

        let gone = status_of(node, "c3", "true", vec![mount("ext4", &at("none"), &["rw", "loop"])]);
        let error = format!("{:#}", gone.err().context("it was taken")?);
        ensure!(error.contains(&at("none")) && error.contains("No such file"), "{error}");
        Ok(())
    })
}

/// A raw volume of a pod: another path than the host's, no writing where it is not allowed.
#[test]
fn raw_volumes_of_pods() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let file = cri.node.dir().join("raw");
        fs::write(&file, [b"bytes".as_slice(), &vec![0; 1 << 20]].concat())?;
        let device = LoopDevice::new(&file)?;
        let mut told = Vec::new();
        for runtime in [Runtime::Runc, Runtime::Kata] {
            let pod = cri.run_pod(runtime, &format!("raw-{}", runtime.tag()), &serde_json::json!({}))?;
            let mut words = Vec::new();
            for permissions in ["rwm", "r"] {
                let devices = serde_json::json!({"devices": [
                    {"container_path": "/dev/disk", "host_path": device.0, "permissions": permissions}]});
                let one = cri.run(&pod, &format!("one-{permissions}"), &["sleep", "100000"], &devices)?;
                words.push(cri.sh(
                    &one,
                    "test -b /dev/disk; head -c 5 /dev/disk; (printf BYTES > /dev/disk) 2> /dev/null || echo no; \
                     sync; head -c 5 /dev/disk",
                )?);
            }
            cri.remove(&pod)?;
            words.push(String::from_utf8_lossy(&fs::read(&file)?[..5]).into_owned());
            fs::write(&file, [b"bytes".as_slice(), &vec![0; 1 << 20]].concat())?;
            run("blockdev", &["--flushbufs", &device.0])?;
            told.push(words);
        }
        ensure!(told[0] == told[1], "runc {:?}, kata {:?}", told[0], told[1]);
        ensure!(told[1][2] == "BYTES", "{told:?}");
        Ok(())
    })
}

/// A VM that did not boot finds its disks too.
#[test]
fn clones_of_a_template_have_disks() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("kt").tempdir_in("/var/tmp")?;
    let template_path = dir.path().display().to_string();
    let factory = [("enable_template", true.into()), ("template_path", template_path.into())];
    let config = Install::locate()?.config_table_with("factory", &factory)?;
    with_snapshotter("erofs", Some(config), |node| {
        let program = node.install().bin().join("kata-runtime").display().to_string();
        run(&program, &["--config", &node.config().display().to_string(), "factory", "init"])?;
        let from = node.log.len();
        let told = shell(node, "c1", &["--snapshotter", "erofs"], ROOT)?.ok()?.text();
        ensure!(told.starts_with("overlay / overlay rw"), "{told}");
        let log = node.log.lines_from(from);
        ensure!(log.iter().any(|line| line.contains("a clone of a template")), "it was no clone: {log:#?}");
        Ok(())
    })
}
