//! The host's mounts in a pod's volumes, beside runc: what of them is seen, written, and left alone.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, NodeSetup, Runtime,
    cri::{Cri, Network, with_cri},
    mounts,
};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

const FOREVER: [&str; 2] = ["sleep", "100000"];

/// A folder of the host's that is a mount, whose mounts its copies get; `sub` in it is one.
struct Volume(PathBuf);

impl Volume {
    fn new(cri: &Cri<'_>, name: &str) -> Result<Self> {
        let path = cri.node.dir().join(name);
        fs::create_dir_all(path.join("sub")).context("a folder")?;
        mount(Some(&path), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        let volume = Self(path);
        mount(None::<&str>, &volume.0, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
        volume.mount("sub")?;
        Ok(volume)
    }

    /// Mounts a new file system with a file `word` on a folder in it.
    fn mount(&self, name: &str) -> Result<()> {
        let at = self.0.join(name);
        fs::create_dir_all(&at)?;
        mount(Some("volume"), &at, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        fs::write(at.join("word"), name)?;
        Ok(())
    }

    /// What a pod's container is told of it.
    fn at(&self, destination: &str, more: &Value) -> Value {
        let mut mount = json!({"container_path": destination, "host_path": self.0});
        for (key, value) in more.as_object().into_iter().flatten() {
            mount[key] = value.clone();
        }
        mount
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        mounts::unmount_below(std::slice::from_ref(&self.0));
    }
}

/// What a test does with a volume in a container of each runtime, which must come out the same.
fn in_both(more: &Value, test: impl Fn(&Cri<'_>, &Volume, &str) -> Result<String>) -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let mut seen = Vec::new();
        for runtime in BOTH {
            let volume = Volume::new(cri, runtime.tag())?;
            let pod = cri.run_pod(runtime, &format!("volume-{}", runtime.tag()), &json!({}))?;
            let one = cri.run(&pod, "one", &FOREVER, &json!({"mounts": [volume.at("/data", more)]}))?;
            seen.push(test(cri, &volume, &one).with_context(|| format!("with {}", runtime.tag()))?);
            cri.remove(&pod)?;
        }
        ensure!(seen[0] == seen[1], "runc {:?}, kata {:?}", seen[0], seen[1]);
        Ok(())
    })
}

#[test]
fn a_containers_end_leaves_the_hosts_mounts_alone() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let volume = Volume::new(cri, "volume")?;
        let pod = cri.run_pod(Runtime::Kata, "volume", &json!({}))?;
        for propagation in [0, 1, 2] {
            let mounts = json!({"mounts": [volume.at("/data", &json!({"propagation": propagation}))]});
            let name = format!("one{propagation}");
            let one = cri.run(&pod, &name, &FOREVER, &mounts)?;
            ensure!(cri.sh(&one, "cat /data/sub/word")? == "sub", "the host's mount in the container");
            cri.say(["stop", "--timeout", "0", &one])?;
            cri.say(["rm", &one])?;
            ensure!(
                fs::read_to_string(volume.0.join("sub/word")).is_ok_and(|word| word == "sub"),
                "{name} took it off"
            );
        }
        // whoever made a mount can take it off and its folder away, while a container has it
        volume.mount("short")?;
        let given = json!({"mounts": [volume.at("/data", &json!({}))]});
        let one = cri.run(&pod, "before", &FOREVER, &given)?;
        ensure!(cri.sh(&one, "cat /data/short/word")? == "short", "the host's mount in the container");
        mounts::unmount_below(&[volume.0.join("short")]);
        fs::remove_dir(volume.0.join("short"))?;
        cri.say(["stop", "--timeout", "0", &one])?;
        // and with what the pod's end takes off
        cri.run(&pod, "last", &FOREVER, &given)?;
        cri.remove(&pod)?;
        ensure!(fs::read_to_string(volume.0.join("sub/word")).is_ok_and(|word| word == "sub"), "the pod took it off");
        Ok(())
    })
}

#[test]
fn the_hosts_later_mounts_are_seen_where_it_was_asked_for() -> Result<()> {
    for propagation in [1, 2] {
        in_both(&json!({"propagation": propagation}), |cri, volume, one| {
            volume.mount("later")?;
            let seen = cri.sh(one, "cat /data/later/word 2> /dev/null || echo nothing")?;
            ensure!(seen == "later", "propagation {propagation}: {seen:?}");
            // what is taken off goes there too, when the guest asks again for what it knows: after a second
            mounts::unmount_below(&[volume.0.join("later")]);
            cri.sh(one, "for i in $(seq 50); do test -e /data/later/word || break; sleep 0.1; done; ls /data/later")
        })?;
    }
    Ok(())
}

#[test]
fn a_read_only_mounts_submounts_are_not_read_only() -> Result<()> {
    in_both(&json!({"readonly": true}), |cri, volume, one| {
        let script = "touch /data/file 2> /dev/null; echo $?; echo other > /data/sub/word; echo $?";
        let seen = cri.sh(one, script)?;
        ensure!(fs::read_to_string(volume.0.join("sub/word"))? == "other\n", "{seen:?}");
        ensure!(!Path::new(&volume.0).join("file").exists(), "{seen:?}");
        Ok(seen)
    })
}
