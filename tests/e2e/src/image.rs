//! Builds the test image: busybox with its applets as an OCI image layout in one tar, made once per test process.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
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

/// The media type of an image's manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

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
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-image");
    fs::create_dir_all(&target)?;
    let work = tempfile::tempdir_in(&target)?;
    let root = work.path().join("root");
    lay_out(&root)?;

    let folder = work.path().join("layout");
    let mut layout = Layout::new(&folder)?;
    let layer = layout.layer(&root)?;
    // a sandbox that no test takes for its own process
    let (shell, pause) = (["sh"].as_slice(), ["sh", "-c", "trap exit TERM INT; tail -f /dev/null & wait"].as_slice());
    for (name, user, command) in
        [(NAME, "", shell), (FOR_APP, "app", shell), (FOR_NOBODY, "no-such-user", shell), (PAUSE, "", pause)]
    {
        layout.image(name, &[&layer], &json!({"Env": ["PATH=/bin:/usr/bin"], "Cmd": command, "User": user}))?;
    }
    layout.finish()?;
    // one name per checkout, replaced whole: test binaries that run one after another do not pile up copies
    let archive = target.join("image.tar");
    let fresh = work.path().join("image.tar");
    tar(&folder, &fresh)?;
    fs::rename(&fresh, &archive)?;
    Ok(archive)
}

/// Something in a layout: what it is called there, and its size.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `sha256:…`.
    pub digest: String,
    size: usize,
}

/// A folder that becomes an OCI image layout.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    /// An empty one in a folder of its own.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join("blobs/sha256"))?;
        Ok(Self { dir: dir.to_owned(), manifests: Vec::new() })
    }

    /// A layer with all that is below `root`.
    pub fn layer(&self, root: &Path) -> Result<Blob> {
        let path = self.dir.join("layer.tar");
        tar(root, &path)?;
        let layer = self.blob(&fs::read(&path)?)?;
        fs::remove_file(path)?;
        Ok(layer)
    }

    /// An image of these layers; `config` is what it says of its process. Returns its manifest.
    pub fn image(&mut self, name: &str, layers: &[&Blob], config: &Value) -> Result<Blob> {
        let digests: Vec<_> = layers.iter().map(|layer| &layer.digest).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": digests},
        });
        let config = self.blob(config.to_string().as_bytes())?;
        let described = |blob: &Blob, kind: &str| {
            let kind = format!("application/vnd.oci.image.{kind}");
            json!({"mediaType": kind, "digest": blob.digest, "size": blob.size})
        };
        let layers: Vec<_> = layers.iter().map(|layer| described(layer, "layer.v1.tar")).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": described(&config, "config.v1+json"), "layers": layers,
        });
        let manifest = self.blob(manifest.to_string().as_bytes())?;
        let mut entry = described(&manifest, "manifest.v1+json");
        entry["annotations"] = json!({"io.containerd.image.name": name});
        entry["platform"] = json!({"architecture": "amd64", "os": "linux"});
        self.manifests.push(entry);
        Ok(manifest)
    }

    /// Writes what makes it a layout.
    pub fn finish(self) -> Result<()> {
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.dir.join("index.json"), index.to_string())?;
        fs::write(self.dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(())
    }

    /// Writes `content` under its digest.
    fn blob(&self, content: &[u8]) -> Result<Blob> {
        let hex = Sha256::digest(content).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        fs::write(self.dir.join("blobs/sha256").join(&hex), content)?;
        Ok(Blob { digest: format!("sha256:{hex}"), size: content.len() })
    }
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
