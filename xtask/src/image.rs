//! Builds the container image that `make run` shows, from Debian's static busybox: an OCI image layout in one tar
//! archive, as `ctr image import` takes it. No registry and no image tool is needed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::kernel::hex;
use crate::step;
use crate::tar::Tar;

/// What the image is called once imported.
pub(crate) const NAME: &str = "docker.io/library/kata-busybox:latest";

const BUSYBOX: &str = "/bin/busybox";
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";

/// Writes the archive.
pub(crate) fn write(path: &Path) -> Result<()> {
    let busybox = fs::read(BUSYBOX)
        .with_context(|| format!("{BUSYBOX} cannot be read: run `make deps`, which installs busybox-static"))?;
    let applets = step::output(step::command(BUSYBOX).arg("--list"))?;
    let archive = layout(&layer(&busybox, &applets)?)?;
    fs::write(path, archive).with_context(|| format!("{} cannot be written", path.display()))
}

/// The file system.
fn layer(busybox: &[u8], applets: &str) -> Result<Vec<u8>> {
    let mut tar = Tar::default();
    for (name, mode) in [("bin", 0o755), ("dev", 0o755), ("etc", 0o755), ("home", 0o755), ("proc", 0o555)] {
        tar.directory(name, mode)?;
    }
    for (name, mode) in [("root", 0o700), ("sys", 0o555), ("tmp", 0o1777), ("usr", 0o755), ("var", 0o755)] {
        tar.directory(name, mode)?;
    }
    tar.file("bin/busybox", 0o755, busybox)?;
    for applet in applets.lines().filter(|applet| !applet.is_empty() && *applet != "busybox") {
        tar.link(&format!("bin/{applet}"), "busybox")?;
    }
    tar.file("etc/group", 0o644, GROUP.as_bytes())?;
    tar.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    Ok(tar.end())
}

/// The layer, what describes it, and what describes that.
fn layout(layer: &[u8]) -> Result<Vec<u8>> {
    let mut tar = Tar::default();
    tar.directory("blobs", 0o755)?;
    tar.directory("blobs/sha256", 0o755)?;
    let layer = blob(&mut tar, "application/vnd.oci.image.layer.v1.tar", layer)?;
    let config = json!({
        "architecture": architecture(), "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob(&mut tar, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let media = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media, "config": config, "layers": [layer] });
    let mut manifest = blob(&mut tar, media, manifest.to_string().as_bytes())?;
    manifest["annotations"] =
        json!({ "io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    tar.file("index.json", 0o644, index.to_string().as_bytes())?;
    tar.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(tar.end())
}

/// Adds it under its digest; returns its descriptor.
fn blob(tar: &mut Tar, media: &str, data: &[u8]) -> Result<Value> {
    let digest = hex(&Sha256::digest(data));
    tar.file(&format!("blobs/sha256/{digest}"), 0o644, data)?;
    Ok(json!({ "mediaType": media, "digest": format!("sha256:{digest}"), "size": data.len() }))
}

/// Go's name of it, which images use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
