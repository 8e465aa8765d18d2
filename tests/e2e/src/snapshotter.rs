//! Root file systems on disks: containerd 2.x with its snapshotters of images, `blockfile` and `erofs`.

use crate::{Containerd, Node, NodeSetup, ctr::Invocation, image, with_node_setup};
use anyhow::Result;
use std::{fs, path::Path};

/// Runs `test` on a node of containerd 2.x that has both, with the test image unpacked in `name`. A container of
/// `blockfile` has `mib` MiB.
pub fn with_snapshotter(
    name: &str,
    mib: u64,
    config: Option<String>,
    test: impl FnOnce(&Node) -> Result<()>,
) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("kb").tempdir_in("/var/tmp")?;
    let scratch = dir.path().join("scratch");
    file_system(&scratch, mib)?;
    let settings = format!(
        "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nscratch_file = \"{}\"\n\
         [plugins.\"io.containerd.snapshotter.v1.erofs\"]\ndefault_size = \"32M\"\n",
        scratch.display()
    );
    with_node_setup(NodeSetup { containerd: Containerd::V2, settings, config, ..NodeSetup::default() }, |node| {
        let archive = image::archive()?.display().to_string();
        node.ctr(["image", "import", "--local", "--snapshotter", name, &archive]).output()?.ok()?;
        test(node)
    })
}

/// An ext4 of so many MiB in a file.
pub fn file_system(path: &Path, mib: u64) -> Result<()> {
    fs::File::create(path)?.set_len(mib << 20)?;
    let words = ["-q", "-F", "-b", "4096"].map(Path::new);
    Invocation::new("mkfs.ext4", words.into_iter().chain([path])).output()?.ok()?;
    Ok(())
}
