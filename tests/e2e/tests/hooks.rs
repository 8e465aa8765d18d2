//! OCI hooks: each runs where and when the specification says, and a failed one fails what it belongs to.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::Mount;
use e2e::{
    Node,
    events::Events,
    task_api::{Bundle, Shim, specification},
    with_node,
};
use serde_json::{Value, json};
use std::{fs, path::Path, time::Duration};

fn shell(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], "timeout": 10 })
}

fn bundle(node: &Node, name: &str, command: &str, hooks: &Value) -> Result<Bundle> {
    let bundle = Bundle::make(node, name, &["true"])?;
    let mut spec = specification(&["sh", "-c", command]);
    spec["hooks"] = hooks.clone();
    bundle.write(&spec)?;
    Ok(bundle)
}

fn state(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

#[test]
fn all_run_in_their_place() -> Result<()> {
    with_node(|node| {
        let hooks = json!({
            "prestart": [shell("cat > prestart")],
            "createRuntime": [shell("test -s prestart && cat > created")],
            "startContainer": [shell("cat > /tmp/hooked; uname -r >> /tmp/hooked")],
            "poststart": [shell("cat > started")],
            "poststop": [shell("cat > stopped")],
        });
        // the container's own program sees what its hook left, from the guest's kernel
        let bundle =
            bundle(node, "hooks", "grep -q '\"id\":\"hooks\"' /tmp/hooked && grep -q kata /tmp/hooked", &hooks)?;
        let at = |name: &str| bundle.path.join(name);
        let shim = Shim::start(node, "hooks", &bundle)?;
        let tested = (|| {
            let pid = shim.create("hooks")?;
            let created = state(&at("created"))?;
            ensure!(created["pid"] == pid && created["status"] == "creating", "{created}");
            ensure!(!at("started").exists(), "poststart before the start");
            shim.start_container("hooks")?;
            ensure!(state(&at("started"))?["status"] == "running", "poststart");
            let status = shim.wait("hooks")?;
            ensure!(status == 0, "startContainer left nothing: exit status {status}");
            ensure!(!at("stopped").exists(), "poststop before the delete");
            shim.delete("hooks")?;
            ensure!(state(&at("stopped"))?["status"] == "stopped", "poststop");
            Ok(())
        })();
        shim.shut_down()?;
        tested
    })
}

/// The end of a process that was quicker than the hooks after its start is told after the start.
#[test]
fn the_end_is_told_after_the_start() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        let hooks = json!({ "poststart": [shell("sleep 1")] });
        let bundle = bundle(node, "quick", "exit 5", &hooks)?;
        let shim = Shim::start(node, "quick", &bundle)?;
        let tested = (|| {
            shim.create("quick")?;
            shim.start_container("quick")?;
            let status = shim.wait("quick")?;
            ensure!(status == 5, "exit status {status}");
            events.wait_exit("quick", Duration::from_secs(5))?;
            let told: Vec<_> = events.of("quick").into_iter().map(|event| event.topic).collect();
            ensure!(told == ["/tasks/create", "/tasks/start", "/tasks/exit"], "{told:?}");
            shim.delete("quick").map(drop)
        })();
        shim.shut_down()?;
        tested
    })
}

/// containerd may be killed while it waits for a start; the process runs by then, and its end must be known.
#[test]
fn a_start_goes_on_when_its_caller_is_gone() -> Result<()> {
    with_node(|node| {
        let hooks = json!({ "poststart": [shell("sleep 2; touch started")] });
        let bundle = bundle(node, "left", "sleep 1; exit 7", &hooks)?;
        let shim = Shim::start(node, "left", &bundle)?;
        let tested = (|| {
            shim.create("left")?;
            shim.start_and_leave("left", Duration::from_millis(500))?;
            // waits for the start, which goes on
            let deleted = shim.delete("left");
            ensure!(bundle.path.join("started").exists(), "the hook was cut off: {deleted:?}");
            let status = if let Ok(status) = deleted {
                status
            } else {
                shim.wait("left")?;
                shim.delete("left")?
            };
            ensure!(status == 7, "exit status {status}");
            Ok(())
        })();
        shim.shut_down()?;
        tested
    })
}

/// containerd gives the root file system as mounts, and hooks look for it where the bundle says that it is.
#[test]
fn those_of_the_host_see_the_containers_files() -> Result<()> {
    with_node(|node| {
        let hooks = json!({
            "createRuntime": [shell("test -x rootfs/bin/busybox && echo from-the-host > rootfs/etc/hooked")],
            "poststart": [shell("test -s rootfs/etc/hooked && touch started")],
        });
        let bundle = bundle(node, "files", "grep -q from-the-host /etc/hooked", &hooks)?;
        let (root, at) = (bundle.path.join("rootfs"), bundle.path.join("elsewhere"));
        fs::rename(&root, &at)?;
        fs::create_dir(&root)?;
        let bind = |from: &Path| Mount {
            type_: "bind".into(),
            source: from.display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        };
        let shim = Shim::start(node, "files", &bundle)?;
        let tested = (|| {
            shim.create_from("files", vec![bind(&at)])?;
            shim.start_container("files")?;
            ensure!(bundle.path.join("started").exists(), "poststart did not see it");
            let status = shim.wait("files")?;
            ensure!(status == 0, "the container does not see what the hook wrote: exit status {status}");
            shim.delete("files")?;
            ensure!(fs::read_dir(&root)?.next().is_none(), "the bundle still shows the root file system");
            Ok(())
        })();
        shim.shut_down()?;
        tested
    })
}

#[test]
fn a_failed_one_fails_the_create() -> Result<()> {
    with_node(|node| {
        for (name, hooks, words) in [
            (
                "fails",
                json!({ "createRuntime": [shell("echo broken >&2; exit 3")] }),
                ["createRuntime hook /bin/sh", "broken"],
            ),
            ("absent", json!({ "prestart": [{ "path": "/no/hook" }] }), ["/no/hook", "No such file"]),
            ("inside", json!({ "createContainer": [shell("true")] }), ["createContainer", "createRuntime"]),
        ] {
            let bundle = bundle(node, name, "true", &hooks)?;
            let shim = Shim::start(node, name, &bundle)?;
            let created = shim.create(name);
            shim.shut_down()?;
            let said = format!("{:#}", created.err().with_context(|| format!("{name}: was created"))?);
            ensure!(words.iter().all(|word| said.contains(word)), "{name}: {said}");
        }
        Ok(())
    })
}
