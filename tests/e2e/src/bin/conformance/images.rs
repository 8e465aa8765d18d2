//! The images that critest asks for, made here of busybox and two small programs: no registry of the world is needed.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    compile::compile,
    image::{self, Layout},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

/// A layout that a registry can serve.
#[derive(Debug)]
pub(crate) struct Images {
    /// Its folder.
    pub(crate) layout: PathBuf,
    /// `path/name:tag`, without the registry's host → the manifest's digest.
    pub(crate) manifests: BTreeMap<String, String>,
}

/// Registries that the names in critest begin with.
pub(crate) const REGISTRIES: [&str; 3] = ["registry.k8s.io", "gcr.io", "k8s.gcr.io"];

const KUBERNETES: &str = "e2e-test-images/";
const CRI_TOOLS: &str = "k8s-staging-cri-tools/";

/// Makes all of them below `work`.
pub(crate) fn make(work: &Path) -> Result<Images> {
    let layout = work.join("layout");
    let mut to = Writer { layout: Layout::new(&layout)?, manifests: BTreeMap::new() };
    let busybox = work.join("busybox");
    lay_out_busybox(&busybox)?;
    let busybox = to.layout.layer(&busybox)?;
    let shell = json!({"Cmd": ["sh"]});

    let programs = work.join("programs");
    fs::create_dir_all(programs.join("bin"))?;
    let web = compile(work, "web", include_str!("programs/web.c"))?;
    for name in ["nginx", "httpd"] {
        program(&programs.join("bin").join(name), &web, 0o755)?;
    }
    let who = compile(work, "who", include_str!("programs/who.c"))?;
    program(&programs.join("bin/who"), &who, 0o4755)?;
    let programs = to.layout.layer(&programs)?;
    let both = [&busybox, &programs];

    let nginx = |port: &str| json!({"Cmd": ["/bin/nginx", port, "master process"]});
    to.image(&format!("{KUBERNETES}busybox:1.29-2"), &[&busybox], &shell)?;
    to.image(&format!("{KUBERNETES}nginx:1.14-2"), &both, &nginx("80"))?;
    to.image(&format!("{KUBERNETES}httpd:2.4.39-4"), &both, &json!({"Cmd": ["/bin/httpd", "80"]}))?;
    to.image(&format!("{KUBERNETES}nonewprivs:1.3"), &both, &json!({"Entrypoint": ["/bin/who"]}))?;
    to.image("pause:3.9", &[&busybox], &shell)?;
    to.image(&format!("{CRI_TOOLS}hostnet-nginx-amd64:latest"), &both, &nginx("12003"))?;
    let user = |user: &str| json!({"Cmd": ["sh"], "User": user});
    to.image(&format!("{CRI_TOOLS}test-image-predefined-group:latest"), &[&busybox], &user("1000"))?;
    for (name, value) in
        [("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:users"), ("username-group", "www-data:100")]
    {
        to.image(&format!("{CRI_TOOLS}test-image-user-{name}:latest"), &[&busybox], &user(value))?;
    }
    for name in ["latest:latest", "tag:test", "tag:all", "1:latest", "2:latest", "3:latest"] {
        to.image(&format!("{CRI_TOOLS}test-image-{name}"), &[&busybox], &shell)?;
    }
    // one image with three names
    to.image(&format!("{CRI_TOOLS}test-image-tags:1"), &[&busybox], &shell)?;
    for tag in [2, 3] {
        let same = to.manifests[&format!("{CRI_TOOLS}test-image-tags:1")].clone();
        to.manifests.insert(format!("{CRI_TOOLS}test-image-tags:{tag}"), same);
    }
    to.layout.finish()?;
    Ok(Images { layout, manifests: to.manifests })
}

struct Writer {
    layout: Layout,
    manifests: BTreeMap<String, String>,
}

impl Writer {
    /// Images with the same configuration would be one image, and be removed together.
    fn image(&mut self, name: &str, layers: &[&image::Blob], config: &Value) -> Result<()> {
        let mut config = config.clone();
        config["Env"] = json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        config["Labels"] = json!({"kata.e2e.name": name});
        let manifest = self.layout.image(name, layers, &config)?;
        self.manifests.insert(name.to_owned(), manifest.digest);
        Ok(())
    }
}

fn program(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    fs::write(path, content)?;
    chown(path, Some(0), Some(0))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(|| path.display().to_string())
}

/// busybox as Kubernetes' image has it: each applet a file, and what Debian's busybox lacks as scripts.
fn lay_out_busybox(root: &Path) -> Result<()> {
    image::lay_out(root)?;
    let bin = root.join("bin");
    let busybox = bin.join("busybox");
    shell_that_looks_for_ls(&busybox)?;
    for entry in fs::read_dir(&bin)? {
        let path = entry?.path();
        if path.is_symlink() {
            // a path that is masked must not take all others with it
            fs::remove_file(&path)?;
            fs::hard_link(&busybox, &path)?;
        }
    }
    fs::rename(bin.join("ls"), bin.join("lr"))?;
    let scripts = [
        ("ls", "exec lr \"$@\""),
        ("ipcs", "exec cat /proc/sysvipc/shm"),
        (
            "pgrep",
            "code=1; for name in /proc/[0-9]*/comm; do read comm < $name && case $comm in *\"$1\"*) \
                   pid=${name#/proc/}; echo ${pid%/comm}; code=0;; esac; done 2> /dev/null; exit $code",
        ),
    ];
    for (name, text) in scripts {
        program(&bin.join(name), format!("#!/bin/sh\n{text}\n").as_bytes(), 0o755)?;
    }
    let users = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\n\
                 default-user:x:1000:1000::/home/default-user:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
    fs::write(root.join("etc/passwd"), users)?;
    let groups = "root:x:0:\nwww-data:x:33:\nusers:x:100:\ndefault-user:x:1000:\n\
                  group-defined-in-image:x:50000:default-user\nnogroup:x:65534:\n";
    fs::write(root.join("etc/group"), groups)?;
    Ok(())
}

/// The shell in Debian's busybox runs its own `ls` without looking for one, so that nothing would come of masking
/// /bin/ls. Under a name that sorts to the same place it is only found as a program.
fn shell_that_looks_for_ls(busybox: &Path) -> Result<()> {
    const NAMES: &[u8] = b"\0losetup\0ls\0lsmod\0";
    let mut bytes = fs::read(busybox)?;
    let at = bytes.windows(NAMES.len()).position(|part| part == NAMES);
    let at = at.context("busybox: its list of applets is not the one of Debian 12's busybox-static")?;
    bytes[at..at + NAMES.len()].copy_from_slice(b"\0losetup\0lr\0lsmod\0");
    ensure!(!bytes.windows(NAMES.len()).any(|part| part == NAMES), "busybox: two lists of applets");
    fs::write(busybox, bytes)?;
    Ok(())
}
