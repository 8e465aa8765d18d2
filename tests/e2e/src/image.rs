//! Builds the test image: busybox with its applets as an OCI image layout in one tar, made once per test process.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The name under which the image is imported.
pub const NAME: &str = "docker.io/library/kata-test:latest";

/// The same image with `app` as its user.
pub const FOR_APP: &str = "docker.io/library/kata-test:app";

/// The same image with a user that its /etc/passwd does not have.
pub const FOR_NOBODY: &str = "docker.io/library/kata-test:nobody";

/// A pod's sandbox, for runtimes that run one.
pub const PAUSE: &str = "docker.io/library/kata-test:pause";

/// The image's tar, built on first use.
pub fn archive() -> Result<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match BUILT.get_or_init(|| build().map_err(|e| format!("{e:#}"))) {
        Ok(path) => Ok(path),
        Err(why) => anyhow::bail!("building the test image: {why}"),
    }
}

/// Lays the image's root file system out below `root`.
pub fn lay_out(root: &Path) -> Result<()> {
    for dir in ["bin", "dev", "etc", "home/app", "proc", "root", "run", "sys", "tmp", "usr", "var"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = crate::install::program_path("busybox").context("busybox: not in PATH")?;
    fs::copy(&busybox, root.join("bin/busybox"))?;
    let applets = Command::new(&busybox).arg("--list").output()?;
    ensure!(applets.status.success(), "`busybox --list` failed");
    for applet in String::from_utf8(applets.stdout)?.lines().filter(|a| *a != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    symlink("../bin", root.join("usr/bin"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n")?;
    fs::write(root.join("etc/not-executable"), "#!/bin/sh\necho no\n")?;
    fs::set_permissions(root.join("etc/not-executable"), fs::Permissions::from_mode(0o644))?;
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    nix::unistd::chown(&root.join("home/app"), Some(1000.into()), Some(1000.into()))?;
    Ok(())
}

fn build() -> Result<PathBuf> {
    let target = std::env::temp_dir().join(format!("kata-e2e-image-{}", nix::unistd::geteuid()));
    fs::create_dir_all(&target)?;
    let work = tempfile::tempdir_in(&target)?;
    let root = work.path().join("root");
    lay_out(&root)?;

    let layout = work.path().join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layer_path = work.path().join("layer.tar");
    tar(&root, &layer_path)?;
    let layer = blob(&blobs, &fs::read(&layer_path)?)?;
    let mut manifests = Vec::new();
    let (shell, pause) =
        (["sh"].as_slice(), ["sh", "-c", "trap exit TERM INT; while :; do sleep 1000 & wait; done"].as_slice());
    for (name, user, command) in
        [(NAME, "", shell), (FOR_APP, "app", shell), (FOR_NOBODY, "no-such-user", shell), (PAUSE, "", pause)]
    {
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": command, "User": user},
            "rootfs": {"type": "layers", "diff_ids": [layer.0]},
        });
        let config = blob(&blobs, config.to_string().as_bytes())?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.0, "size": config.1},
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer.0, "size": layer.1,
            }],
        });
        let manifest = blob(&blobs, manifest.to_string().as_bytes())?;
        manifests.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest.0, "size": manifest.1,
            "annotations": {"io.containerd.image.name": name},
            "platform": {"architecture": "amd64", "os": "linux"},
        }));
    }
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    // one name per machine, replaced whole: test binaries that run one after another do not pile up copies
    let archive = target.join("image.tar");
    let fresh = work.path().join("image.tar");
    tar(&layout, &fresh)?;
    fs::rename(&fresh, &archive)?;
    Ok(archive)
}

/// Writes `content` under its digest and returns digest and size.
fn blob(blobs: &Path, content: &[u8]) -> Result<(String, usize)> {
    let hex = Sha256::digest(content).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    fs::write(blobs.join(&hex), content)?;
    Ok((format!("sha256:{hex}"), content.len()))
}

fn tar(dir: &Path, to: &Path) -> Result<()> {
    let done = Command::new("tar")
        .args(["--sort=name", "--mtime=@0", "--numeric-owner", "-cf"])
        .arg(to)
        .arg("-C")
        .arg(dir)
        .arg(".")
        .output()
        .context("running tar")?;
    ensure!(done.status.success(), "tar failed: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}
