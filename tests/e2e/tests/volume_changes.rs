//! What the host changes in a container's volumes before a process starts, beside runc, and what of a volume is kept when
//! its container is gone.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, NodeSetup, Runtime,
    cri::{Cri, Network, with_cri},
    ctr::Invocation,
    install::Install,
    mounts, processes,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

const FOREVER: [&str; 2] = ["sleep", "100000"];

/// Reads two mounted files, as Docker's resolv.conf is one, and all of a mounted folder.
const READ: &str = "cat /longer /shorter; cd /data; for f in longer shorter replaced new removed folder/file; do \
                    echo $f; cat $f 2> /dev/null; done; ls . folder; stat -c '%n %s %a' /longer /shorter *";

/// What the host has: each round is another state of the same names.
struct Changing(PathBuf);

impl Changing {
    fn new(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(folder.join("data/folder"))?;
        let changing = Self(folder);
        changing.change(0)?;
        Ok(changing)
    }

    fn change(&self, round: usize) -> Result<()> {
        let long = |length: usize| format!("round {round} {}\n", "x".repeat(length));
        for folder in [&self.0, &self.data()] {
            // as Docker writes its files: cut, then written
            fs::write(folder.join("longer"), long(100 * round + 1))?;
            fs::write(folder.join("shorter"), long(9000 - 3000 * round))?;
        }
        let data = self.data();
        fs::write(data.join("draft"), long(5000 * round))?;
        fs::rename(data.join("draft"), data.join("replaced"))?;
        fs::write(data.join("folder/file"), long(round))?;
        let (new, gone) = if round % 2 == 1 { ("new", "removed") } else { ("removed", "new") };
        fs::write(data.join(new), long(1))?;
        let _ = fs::remove_file(data.join(gone));
        Ok(())
    }

    fn data(&self) -> PathBuf {
        self.0.join("data")
    }

    fn mounts(&self) -> Value {
        let mount = |name: &str| json!({"container_path": format!("/{name}"), "host_path": self.0.join(name)});
        json!({"mounts": [mount("longer"), mount("shorter"), mount("data")]})
    }
}

/// What is seen by a container's first process, and by later ones, of what changed after its making, or just before.
fn seen(cri: &Cri<'_>, runtime: Runtime) -> Result<Vec<String>> {
    let changing = Changing::new(cri.node.dir().join(format!("changing-{}", runtime.tag())))?;
    let pod = cri.run_pod(runtime, &format!("changes-{}", runtime.tag()), &json!({}))?;
    let mut all = Vec::new();
    // one that was made before; the guest knows all of it from another one's looking
    let one = cri.run(&pod, "one", &FOREVER, &changing.mounts())?;
    let script = format!("({READ}) > /seen; touch /done; sleep 100000");
    let two = cri.create(&pod, "two", &["sh", "-c", &script], &changing.mounts())?;
    all.push(cri.sh(&one, READ)?);
    changing.change(1)?;
    cri.say(["start", &two])?;
    all.push(cri.sh(&two, "until [ -e /done ]; do sleep 0.1; done; cat /seen")?);
    for round in 2..=3 {
        cri.sh(&one, READ)?;
        changing.change(round)?;
        all.push(cri.sh(&one, READ)?);
    }
    // what its making has looked at, alone
    let three = cri.create(&pod, "three", &["sh", "-c", &script], &changing.mounts())?;
    changing.change(1)?;
    cri.say(["start", &three])?;
    all.push(cri.sh(&three, "until [ -e /done ]; do sleep 0.1; done; cat /seen")?);
    cri.remove(&pod)?;
    Ok(all)
}

/// A long line is told by its beginning and its length.
fn start(line: &str) -> String {
    format!("{:.20} of {} bytes", line, line.len())
}

#[test]
fn what_the_host_has_changed_before_a_process_starts_is_seen_whole() -> Result<()> {
    let mut runc = Vec::new();
    for kind in ["virtio-fs", "virtio-9p"] {
        let config = Some(Install::locate()?.config_with(&[("shared_fs", kind.into())])?);
        with_cri(NodeSetup { config, ..NodeSetup::default() }, Network::default(), |cri| {
            if runc.is_empty() {
                runc = seen(cri, Runtime::Runc)?;
            }
            for (step, (runc, kata)) in runc.iter().zip(seen(cri, Runtime::Kata)?).enumerate() {
                let mut lines = runc.lines().zip(kata.lines());
                let different = lines.find(|(one, two)| one != two).map(|(one, two)| (start(one), start(two)));
                ensure!(*runc == kata, "{kind} step {step}, the first difference of runc and kata: {different:?}");
            }
            Ok(())
        })?;
    }
    ensure!(runc[1].contains(&format!("round 1 {}\n", "x".repeat(101))), "{}", runc[1]);
    Ok(())
}

/// A file system of its own for a volume, as a driver of volumes makes it.
struct Disk {
    device: String,
    point: PathBuf,
}

fn run(program: &str, args: &[&str]) -> Result<String> {
    Ok(Invocation::new(program, args.iter().map(ToString::to_string)).output()?.ok()?.text())
}

impl Disk {
    fn new(folder: &Path, name: &str) -> Result<Self> {
        let (image, point) = (folder.join(format!("{name}.img")), folder.join(name));
        fs::create_dir(&point)?;
        fs::File::create(&image)?.set_len(8 << 20)?;
        run("mkfs.ext4", &["-q", "-m0", &image.display().to_string()])?;
        let device = run("losetup", &["--find", "--show", &image.display().to_string()])?.trim().to_owned();
        let disk = Self { device, point };
        run("mount", &[&disk.device, &disk.point.display().to_string()])?;
        Ok(disk)
    }

    /// Whether the kernel has let go of it. A device that is in use is only marked to be given back.
    fn is_free(&self) -> bool {
        let name = self.device.trim_start_matches("/dev/");
        !Path::new(&format!("/sys/block/{name}/loop/backing_file")).exists()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        mounts::unmount_below(std::slice::from_ref(&self.point));
        let _ = run("losetup", &["--detach", &self.device]);
    }
}

/// How many files virtiofsd has open.
fn open_files(cri: &Cri<'_>) -> Result<usize> {
    let all = processes::of_node(cri.node.tag());
    let daemons = all.iter().filter(|process| process.name.starts_with("virtiofsd"));
    let mut count = 0;
    for daemon in daemons {
        count += fs::read_dir(format!("/proc/{}/fd", daemon.pid)).context("virtiofsd's files")?.count();
    }
    ensure!(count > 0, "no virtiofsd in {all:?}");
    Ok(count)
}

#[test]
fn a_removed_containers_files_are_let_go_of() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        for runtime in BOTH {
            let pod = cri.run_pod(runtime, &format!("gone-{}", runtime.tag()), &json!({}))?;
            let stays = cri.run(&pod, "stays", &FOREVER, &json!({}))?;
            // its program is open from here on
            cri.sh(&stays, &format!("until grep -qx {} /proc/[0-9]*/comm; do :; done", FOREVER[0]))?;
            let before = (runtime == Runtime::Kata).then(|| open_files(cri)).transpose()?;
            for round in 0..3 {
                let disk = Disk::new(cri.node.dir(), &format!("disk-{}-{round}", runtime.tag()))?;
                let folder = cri.node.dir().join(format!("folder-{}-{round}", runtime.tag()));
                fs::create_dir(&folder)?;
                fs::write(folder.join("file"), "x")?;
                let mount = |at: &str, path: &Path| json!({"container_path": at, "host_path": path});
                let mounts = [mount("/disk", &disk.point), mount("/f", &folder), mount("/file", &folder.join("file"))];
                let name = format!("goes{round}");
                let one = cri.run(&pod, &name, &FOREVER, &json!({"mounts": mounts}))?;
                cri.sh(&one, "mkdir /disk/a && echo word > /disk/a/b && cat /disk/a/b /f/file /file && ls -lR /disk")?;
                cri.say(["stop", "--timeout", "0", &one])?;
                cri.say(["rm", &one])?;
                // the file system is let go of as soon as the daemon has heard of it
                run("umount", &[&disk.point.display().to_string()])?;
                run("losetup", &["--detach", &disk.device])?;
                Cri::until(|| Ok((disk.is_free(), format!("{} is in use after {name} of {runtime:?}", disk.device))))?;
                if let Some(before) = before {
                    Cri::until(|| {
                        let count = open_files(cri)?;
                        Ok((count <= before, format!("{count} open files after {name}, {before} before")))
                    })?;
                }
            }
            cri.remove(&pod)?;
        }
        Ok(())
    })
}
