//! The guest's image instead of the initrd: what boots from it, and what is refused.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Node, NodeSetup, Runtime,
    cri::{Network, with_cri},
    install::Install,
    with_node_setup,
};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What the guest says of its root: the kernel's own view, and two tries to write. The nodes in a privileged container's
/// /dev are the host's, so it makes its own.
const ROOT: &str = r"
    cat /proc/cmdline
    for disk in dm-0 vda; do
        echo $disk $(cat /sys/block/$disk/ro)
        mknod /tmp/$disk b $(tr : ' ' < /sys/block/$disk/dev)
    done
    mkdir /disk && mount -t erofs -o ro /tmp/dm-0 /disk && ls /disk/sbin
    echo changed 2> /dev/null > /disk/sbin/more || echo refused
    dd if=/dev/zero of=/tmp/vda bs=4096 seek=300 count=1 conv=fsync 2> /dev/null || echo refused
";

fn on_image(changes: &[(&str, toml::Value)], test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let config = Some(Install::locate()?.image_config_with(changes)?);
    with_node_setup(NodeSetup { config, ..NodeSetup::default() }, test)
}

#[test]
fn boots_from_a_disk_that_nobody_writes() -> Result<()> {
    let image = Install::locate()?.image();
    let before = fs::read(&image)?;
    on_image(&[], |node| {
        let said = node.run(Runtime::Kata, "plain", &[], &["echo", "from a disk"]).output()?.ok()?.text();
        ensure!(said == "from a disk", "{said:?}");
        let root = node.run(Runtime::Kata, "root", &["--privileged"], &["sh", "-c", ROOT]).output()?.ok()?.text();
        for words in ["root=/dev/dm-0 rootfstype=erofs ro ", "dm-0 1\nvda 1\ninit\nrefused\nrefused"] {
            ensure!(root.contains(words), "{words:?} is missing in {root}");
        }
        Ok(())
    })?;
    ensure!(fs::read(&image)? == before, "the guest wrote into the image");
    Ok(())
}

/// As persistent memory, which the guest's kernel holds against the same hashes.
#[test]
fn boots_from_memory_that_nobody_writes() -> Result<()> {
    let image = Install::locate()?.image();
    let before = fs::read(&image)?;
    let memory = ("disable_image_nvdimm", toml::Value::from(false));
    on_image(std::slice::from_ref(&memory), |node| {
        let root = node.run(Runtime::Kata, "root", &["--privileged"], &["sh", "-c", MEMORY]).output()?.ok()?.text();
        for words in
            [" root=/dev/dm-0 rootfstype=erofs ro ", " verity 1 /dev/pmem0p1 /dev/pmem0p2 ", "\ndm-0 1 pmem0p1 pmem0p2"]
        {
            ensure!(root.contains(words), "{words:?} is missing in {root}");
        }
        Ok(())
    })?;
    on_image(&[memory, ("kernel_verity_params", "".into())], |node| {
        let line = node.run(Runtime::Kata, "plain", &[], &["cat", "/proc/cmdline"]).output()?.ok()?.text();
        ensure!(line.contains("root=/dev/pmem0p1 rootfstype=erofs ro "), "{line}");
        Ok(())
    })?;
    ensure!(fs::read(&image)? == before, "the guest wrote into the image");
    Ok(())
}

/// What is under the verified disk, and a try to write it.
const MEMORY: &str = r"
    cat /proc/cmdline
    echo dm-0 $(cat /sys/block/dm-0/ro) $(ls /sys/block/dm-0/slaves)
    mknod /tmp/disk b $(tr : ' ' < /sys/block/pmem0/dev)
    dd if=/dev/zero of=/tmp/disk bs=4096 seek=300 count=8 conv=fsync 2> /dev/null
    sync
";

/// A pod tells its guest more: names to resolve by, which are written where nothing can be.
#[test]
fn a_pod_boots_from_a_disk() -> Result<()> {
    let config = Some(Install::locate()?.image_config_with(&[])?);
    with_cri(NodeSetup { config, ..NodeSetup::default() }, Network::default(), |cri| {
        let pod = cri.run_pod(Runtime::Kata, "disk", &json!({"dns_config": {"servers": ["192.0.2.53"]}}))?;
        let one = cri.run(&pod, "one", &["sleep", "1000"], &json!({}))?;
        let said = cri.sh(&one, "cat /proc/cmdline /etc/resolv.conf")?;
        ensure!(said.contains("root=/dev/dm-0") && said.contains("192.0.2.53"), "{said}");
        cri.remove(&pod)
    })
}

/// Without a hash the disk is believed, as Kata's are. Kata's own file says ext4 whatever the image is.
#[test]
fn boots_from_a_disk_without_hashes() -> Result<()> {
    on_image(&[("kernel_verity_params", "".into()), ("rootfs_type", "ext4".into())], |node| {
        let line = node.run(Runtime::Kata, "plain", &[], &["cat", "/proc/cmdline"]).output()?.ok()?.text();
        ensure!(line.contains("root=/dev/vda1 rootfstype=erofs ro "), "{line}");
        Ok(())
    })
}

/// A copy of the image in which one byte is another.
fn flipped(image: &Path, at: usize, folder: &Path) -> Result<PathBuf> {
    let mut bytes = fs::read(image)?;
    *bytes.get_mut(at).context("the image is shorter")? ^= 1;
    let path = folder.join("flipped.img");
    fs::write(&path, bytes)?;
    Ok(path)
}

/// The start fails, and the error says that it was the image's fault.
fn dies(id: &str, changes: &[(&str, toml::Value)]) -> Result<()> {
    on_image(changes, |node| {
        let done = node.run(Runtime::Kata, id, &[], &["true"]).output()?;
        let told = done.stderr.contains("verity") && done.stderr.contains("corrupted");
        ensure!(done.code != 0 && told, "{id}: {}", done.stderr);
        Ok(())
    })
}

#[test]
fn a_changed_byte_ends_the_boot() -> Result<()> {
    let image = Install::locate()?.image();
    let dir = tempfile::tempdir()?;
    // the superblock, and a page of the agent's that its first instructions are in or near
    let magic = fs::read(&image)?.windows(4).position(|four| four == 0xe0f5_e1e2_u32.to_le_bytes());
    let superblock = magic.context("no erofs in the image")?;
    let entry = entry_point(&fs::read(&image)?).context("no program in the image")?;
    for (name, at) in [("superblock", superblock + 8), ("program", entry)] {
        let path = flipped(&image, at, dir.path())?.display().to_string();
        dies(name, &[("image", path.into())])?;
    }
    let path = flipped(&image, entry, dir.path())?.display().to_string();
    dies("memory", &[("image", path.into()), ("vm_rootfs_driver", "virtio-pmem".into())])
}

/// Where in the image the agent's first instruction is: it is the only program there (elf(5)).
fn entry_point(image: &[u8]) -> Option<usize> {
    let start = image.windows(4).position(|four| four == b"\x7fELF")?;
    let number = |at: usize, length: usize| -> Option<usize> {
        let bytes = image.get(start + at..)?.get(..length)?;
        Some(bytes.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let (entry, table) = (number(24, 8)?, number(32, 8)?);
    for segment in 0..number(56, 2)? {
        let at = table + segment * number(54, 2)?;
        let (kind, offset, address, size) =
            (number(at, 4)?, number(at + 8, 8)?, number(at + 16, 8)?, number(at + 32, 8)?);
        if kind == 1 && (address..address + size).contains(&entry) {
            return Some(start + offset + entry - address);
        }
    }
    None
}

#[test]
fn another_root_hash_ends_the_boot() -> Result<()> {
    let install = Install::locate()?;
    let table: toml::Table = fs::read_to_string(install.image_config())?.parse()?;
    let params = table["hypervisor"]["qemu"]["kernel_verity_params"].as_str().context("no verity")?.to_owned();
    let (name, rest) = params.split_at("root_hash=".len());
    let other = if rest.starts_with('0') { "1" } else { "0" };
    dies("hash", &[("kernel_verity_params", format!("{name}{other}{}", &rest[1..]).into())])
}

#[test]
fn what_cannot_be_booted_is_refused() -> Result<()> {
    let install = Install::locate()?;
    let cases = [
        (
            "both",
            ("initrd", install.initrd().display().to_string().into()),
            "a guest boots an image or an initrd, and `initrd` is set too",
        ),
        ("driver", ("vm_rootfs_driver", "virtio-blk-mmio".into()), "must be \"virtio-blk-pci\" or \"virtio-pmem\""),
        ("missing", ("image", "/no/such/image".into()), "no such file: run `make install`"),
    ];
    for (name, change, why) in cases {
        on_image(&[change], |node| {
            let done = node.run(Runtime::Kata, name, &[], &["true"]).output()?;
            ensure!(done.code != 0 && done.stderr.contains(why), "{name}: {}", done.stderr);
            Ok(())
        })?;
    }
    Ok(())
}
