//! Writes the guest's image: a disk whose first partition is a read-only file system (erofs) with the agent as
//! /sbin/init, and whose second has the hashes of the first (dm-verity). The same agent gives the same bytes, and no
//! tool of the build machine's has a part in it.

mod erofs;
mod verity;

use std::fs;

use anyhow::{Context, Result};

use self::erofs::{Kind, Node};
use crate::step;
use crate::workspace::{IMAGE, IMAGE_VERITY, Workspace};

/// Of the file system and of the hashes.
pub(crate) const BLOCK: usize = 4096;
const SECTOR: usize = 512;
/// Where the first partition begins, as on every disk.
const START: usize = 1 << 20;
/// The disk is a whole number of these, as Kata's are, which are also persistent memory.
const WHOLE: usize = 2 << 20;

/// dist/…/kata-containers.img and what the configuration says of it.
pub(crate) fn provide(workspace: &Workspace) -> Result<()> {
    step::timed("writing the guest image", || {
        let agent = workspace.agent();
        let program = fs::read(&agent)
            .with_context(|| format!("the agent {} cannot be read: run `make build`", agent.display()))?;
        let image = Image::of(&program)?;
        let directory = workspace.guest_files();
        fs::create_dir_all(&directory).with_context(|| format!("{} cannot be made", directory.display()))?;
        for (name, bytes) in [(IMAGE, image.disk.as_slice()), (IMAGE_VERITY, image.verity.as_bytes())] {
            let temporary = directory.join(format!(".{name}"));
            fs::write(&temporary, bytes)
                .and_then(|()| fs::rename(&temporary, directory.join(name)))
                .with_context(|| format!("{} cannot be written", directory.join(name).display()))?;
        }
        println!("    {IMAGE}: {} KiB", image.disk.len() / 1024);
        Ok(())
    })
}

struct Image {
    disk: Vec<u8>,
    /// `kernel_verity_params` of it.
    verity: String,
}

impl Image {
    fn of(init: &[u8]) -> Result<Self> {
        let data = erofs::write(&tree(init))?;
        let hashes = verity::Tree::of(&data);
        let mut disk = vec![0; START];
        disk.extend_from_slice(&data);
        let second = disk.len();
        disk.extend_from_slice(&hashes.blocks);
        let end = disk.len();
        disk.resize(end.next_multiple_of(WHOLE), 0);
        partitions(&mut disk, &[(START, second), (second, end)])?;
        let verity = format!(
            "root_hash={},salt={},data_blocks={},data_block_size={BLOCK},hash_block_size={BLOCK}",
            hashes.root,
            hashes.salt,
            data.len() / BLOCK
        );
        Ok(Self { disk, verity })
    }
}

/// The initrd's folders; nothing is written in any but /run, where the agent mounts memory.
fn tree(init: &[u8]) -> Node<'_> {
    let folder = |mode: u16, entries: Vec<(&'static str, Node<'static>)>| Node { mode, kind: Kind::Folder(entries) };
    let link = |target: &'static str| Node { mode: 0o777, kind: Kind::Link(target) };
    let empty = |mode: u16| folder(mode, Vec::new());
    let init = Node { mode: 0o755, kind: Kind::File(init) };
    Node {
        mode: 0o755,
        kind: Kind::Folder(vec![
            ("dev", empty(0o755)),
            // written for what runs in the guest itself
            ("etc", folder(0o755, vec![("resolv.conf", link("/run/resolv.conf"))])),
            ("mnt", empty(0o755)),
            ("proc", empty(0o555)),
            ("root", empty(0o700)),
            ("run", empty(0o755)),
            ("sbin", Node { mode: 0o755, kind: Kind::Folder(vec![("init", init)]) }),
            ("sys", empty(0o555)),
            ("tmp", empty(0o1777)),
            ("var", empty(0o755)),
        ]),
    }
}

/// A table of primary partitions (MBR); each is from a byte to a byte.
fn partitions(disk: &mut [u8], all: &[(usize, usize)]) -> Result<()> {
    const TABLE: usize = 446;
    const LINUX: u8 = 0x83;
    for (number, (from, to)) in all.iter().enumerate() {
        let entry = &mut disk[TABLE + 16 * number..][..16];
        entry[4] = LINUX;
        entry[8..12].copy_from_slice(&u32::try_from(from / SECTOR)?.to_le_bytes());
        entry[12..16].copy_from_slice(&u32::try_from((to - from) / SECTOR)?.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_agent_gives_the_same_bytes_on_whole_mebibytes() -> Result<()> {
        let (one, two) = (Image::of(&[7; 10_000])?, Image::of(&[7; 10_000])?);
        assert!(one.disk == two.disk && one.verity == two.verity);
        assert_eq!(one.disk.len() % WHOLE, 0);
        let other = Image::of(&[8; 10_000])?;
        assert_ne!(one.verity, other.verity, "another agent has another hash");
        assert!(one.verity.starts_with("root_hash=") && one.verity.ends_with(",hash_block_size=4096"));
        Ok(())
    }

    #[test]
    fn the_partitions_are_where_the_table_says() -> Result<()> {
        let image = Image::of(b"agent")?;
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| image.disk[at + byte])) as usize * SECTOR;
        let (first, length, second) = (number(446 + 8), number(446 + 12), number(446 + 16 + 8));
        assert_eq!((first, second), (START, START + length));
        assert_eq!(image.disk[first + 1024..][..4], 0xe0f5_e1e2_u32.to_le_bytes());
        Ok(())
    }
}
