//! Wrong input: each kind gets an error that names it, soon, and leaves nothing behind.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{
    Node, NodeSetup, Runtime,
    install::Install,
    task_api::{Bundle, Shim, call, specification},
    with_node, with_node_setup,
};
use std::time::Duration;
use toml::Value;

/// A wrong configuration is found out before anything is started.
const SOON: Duration = Duration::from_secs(3);

/// Starts a container with this text as configuration, and wants an error with all these words.
fn refused(text: String, words: &[&str]) -> Result<()> {
    with_node_setup(NodeSetup { config: Some(text), ..NodeSetup::default() }, |node| {
        let done = node.run(Runtime::Kata, "c1", &[], &["true"]).output()?;
        ensure!(done.code != 0, "a container started");
        ensure!(done.took < SOON, "the error took {:?}: {}", done.took, done.stderr);
        for word in words {
            ensure!(done.stderr.contains(word), "{word:?} is not in the error: {}", done.stderr);
        }
        let lines = done.stderr.trim_end().lines().count();
        ensure!(lines <= 3, "the error has {lines} lines: {}", done.stderr);
        Ok(())
    })
}

fn refused_value(key: &str, value: impl Into<Value>, words: &[&str]) -> Result<()> {
    refused(Install::locate()?.config_with(&[(key, value.into())])?, words)
}

#[test]
fn no_kernel() -> Result<()> {
    refused_value("kernel", "/no/such/kernel", &["kernel", "/no/such/kernel"])
}

#[test]
fn no_initrd() -> Result<()> {
    refused_value("initrd", "/no/such/initrd", &["initrd", "/no/such/initrd"])
}

#[test]
fn a_directory_as_kernel() -> Result<()> {
    refused_value("kernel", "/etc", &["kernel", "/etc"])
}

#[test]
fn no_qemu() -> Result<()> {
    refused_value("path", "/no/such/qemu", &["path", "/no/such/qemu"])
}

#[test]
fn no_virtiofsd() -> Result<()> {
    refused_value("virtio_fs_daemon", "/no/such/virtiofsd", &["virtio_fs_daemon", "/no/such/virtiofsd"])
}

/// Kata takes 0 for its own default of memory; that or an error are both right, a hang or a VM without memory are not.
#[test]
fn no_memory() -> Result<()> {
    let text = Install::locate()?.config_with(&[("default_memory", Value::Integer(0))])?;
    with_node_setup(NodeSetup { config: Some(text), ..NodeSetup::default() }, |node| {
        let done = node.run(Runtime::Kata, "c1", &[], &["grep", "MemTotal", "/proc/meminfo"]).output()?;
        match done.code {
            0 => ensure!(done.text().contains("MemTotal"), "{}", done.text()),
            _ => ensure!(done.stderr.contains("default_memory"), "{}", done.stderr),
        }
        Ok(())
    })
}

#[test]
fn a_tebibyte_of_memory() -> Result<()> {
    refused_value("default_memory", 1_048_576, &["default_memory", "1048576"])
}

#[test]
fn broken_toml() -> Result<()> {
    refused("[hypervisor.qemu]\npath = \"/usr/bin/qemu\nkernel = 3\n".into(), &["configuration.toml", "2"])
}

#[test]
fn a_value_of_the_wrong_type() -> Result<()> {
    let text = "[hypervisor.qemu]\n# a comment\ndefault_memory = \"much\"\n[agent.kata]\n[runtime]\n";
    refused(text.into(), &["configuration.toml", "3", "default_memory", "much"])
}

#[test]
fn no_configuration_at_all() -> Result<()> {
    with_node(|node| {
        let options = ["--runtime-config-path", "/no/such/configuration.toml"];
        let done = node.run(Runtime::Kata, "c1", &options, &["true"]).output()?;
        ensure!(done.code != 0 && done.stderr.contains("/no/such/configuration.toml"), "{done:?}");
        Ok(())
    })
}

/// Creates a container from a bundle in a shim of its own; what it says, and that nothing stays, is the test.
fn creation(node: &Node, id: &str, bundle: &Bundle) -> Result<String> {
    let shim = match Shim::start(node, id, bundle) {
        Ok(shim) => shim,
        // refusing as early as this is fine, too
        Err(error) => {
            let _ = call(node, id, &bundle.path, "delete")?;
            return Ok(format!("{error:#}"));
        }
    };
    let created = shim.create(id);
    shim.shut_down()?;
    match created {
        Ok(pid) => bail!("{id} was created with pid {pid}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

fn says(node: &Node, id: &str, bundle: &Bundle, words: &[&str]) -> Result<()> {
    let said = creation(node, id, bundle).context(id.to_owned())?;
    for word in words {
        ensure!(said.contains(word), "{id}: {word:?} is not in the error: {said}");
    }
    ensure!(said.len() < 1500, "{id}: an error of {} bytes", said.len());
    Ok(())
}

#[test]
fn a_bundle_without_rootfs() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "no-rootfs", &["true"])?;
        std::fs::remove_dir_all(bundle.path.join("rootfs"))?;
        says(node, "no-rootfs", &bundle, &["rootfs"])
    })
}

#[test]
fn a_bundle_with_invalid_json() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "bad-json", &["true"])?;
        for text in ["{\"process\": ", "", "[]", "{\"ociVersion\": 7}", "\0\0\0"] {
            bundle.write_text(text)?;
            says(node, "bad-json", &bundle, &["config.json"]).with_context(|| format!("{text:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn a_bundle_without_configuration() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "no-json", &["true"])?;
        std::fs::remove_file(bundle.path.join("config.json"))?;
        says(node, "no-json", &bundle, &["config.json"])
    })
}

#[test]
fn a_huge_configuration() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "huge", &["true"])?;
        let mut spec = specification(&["true"]);
        spec["annotations"] = serde_json::json!({"filler": "x".repeat(20_000_000)});
        bundle.write(&spec)?;
        says(node, "huge", &bundle, &["config.json"])
    })
}

#[test]
fn empty_arguments() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "empty", &[])?;
        says(node, "empty", &bundle, &["args"])
    })
}

#[test]
fn ids_that_are_no_names() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "ids", &["true"])?;
        let long = "a".repeat(1000);
        for id in [long.as_str(), "../escape", "..", "a/b", "a b", ""] {
            let began = call(node, id, &bundle.path, "start")?;
            ensure!(began.code != 0, "start accepts the id {id:.40?}: {}", began.text());
            ensure!(began.stderr.contains("id"), "{id:.40?}: {}", began.stderr);
            let deleted = call(node, id, &bundle.path, "delete")?;
            ensure!(deleted.code != 0 || deleted.stderr.is_empty(), "{id:.40?}: {}", deleted.stderr);
        }
        // and in a request, after a good start
        let shim = Shim::start(node, "good", &bundle)?;
        let mut failed = None;
        for id in [long.as_str(), "../escape", ""] {
            match shim.create(id) {
                Ok(_) => failed = Some(format!("create accepts the id {id:.40?}")),
                Err(e) if format!("{e:#}").contains("id") => {}
                Err(e) => failed = Some(format!("{id:.40?}: {e:#}")),
            }
        }
        shim.shut_down()?;
        failed.map_or(Ok(()), |f| bail!(f))
    })
}

#[test]
fn a_second_create_of_the_same_id() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "twice", &["sh", "-c", "exit 42"])?;
        let shim = Shim::start(node, "twice", &bundle)?;
        let tested = (|| {
            shim.create("twice")?;
            let again = shim.create("twice").err().context("the second create succeeded")?;
            let again = format!("{again:#}");
            ensure!(again.contains("ALREADY_EXISTS") && again.contains("twice"), "{again}");
            // the first one is unharmed
            shim.start_container("twice")?;
            let status = shim.wait("twice")?;
            ensure!(status == 42, "exit status {status}");
            let deleted = shim.delete("twice")?;
            ensure!(deleted == 42, "delete says {deleted}");
            Ok(())
        })();
        shim.shut_down()?;
        tested
    })
}

#[test]
fn requests_about_nothing() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "nothing", &["true"])?;
        let shim = Shim::start(node, "nothing", &bundle)?;
        let answers = [shim.start_container("nothing"), shim.wait("other"), shim.delete("other")];
        shim.shut_down()?;
        for answer in answers {
            let said = format!("{:#}", answer.err().context("a request about nothing succeeded")?);
            ensure!(said.contains("NOT_FOUND"), "{said}");
        }
        Ok(())
    })
}
