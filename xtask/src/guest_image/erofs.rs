//! A read-only file system (erofs, its core on-disk format): no compression, since unpacking costs more than reading when
//! the CPU is emulated; everything owned by root and of time 0.
//!
//! Block 0 has the superblock, then come the blocks of inodes, then the contents, each from a block's beginning.

use anyhow::{Context, Result, bail, ensure};

use super::BLOCK;

/// What the kernel finds the superblock by, 1024 bytes from the beginning.
const MAGIC: u32 = 0xe0f5_e1e2;
const INODE: usize = 32;
const DIRENT: usize = 12;

const FOLDER: u16 = 0o040_000;
const FILE: u16 = 0o100_000;
const LINK: u16 = 0o120_000;

/// A file, a folder or a link.
pub(super) struct Node<'a> {
    /// Permissions.
    pub(super) mode: u16,
    pub(super) kind: Kind<'a>,
}

pub(super) enum Kind<'a> {
    Folder(Vec<(&'a str, Node<'a>)>),
    File(&'a [u8]),
    Link(&'a str),
}

/// The file system with this root, in whole blocks.
pub(super) fn write(root: &Node<'_>) -> Result<Vec<u8>> {
    let count = root.count();
    let mut writer = Writer { inodes: Vec::new(), contents: Vec::new(), first: 1 + (count * INODE).div_ceil(BLOCK) };
    let number = writer.reserve();
    writer.node(root, number, number)?;
    let mut image = vec![0; BLOCK];
    image.extend_from_slice(&writer.inodes);
    image.resize(writer.first * BLOCK, 0);
    image.extend_from_slice(&writer.contents);
    let blocks = u32::try_from(image.len() / BLOCK).context("the file system is too large")?;
    let superblock = &mut image[1024..1024 + 128];
    superblock[..4].copy_from_slice(&MAGIC.to_le_bytes());
    superblock[0xc] = BLOCK.trailing_zeros() as u8;
    superblock[0xe..0x10].copy_from_slice(&u16::try_from(number)?.to_le_bytes());
    superblock[0x10..0x18].copy_from_slice(&(count as u64).to_le_bytes());
    superblock[0x24..0x28].copy_from_slice(&blocks.to_le_bytes());
    // where the inodes begin
    superblock[0x28..0x2c].copy_from_slice(&1_u32.to_le_bytes());
    Ok(image)
}

impl Node<'_> {
    fn count(&self) -> usize {
        match &self.kind {
            Kind::Folder(entries) => 1 + entries.iter().map(|(_, node)| node.count()).sum::<usize>(),
            _ => 1,
        }
    }

    /// The type bits of its mode, and its type in a folder.
    fn types(&self) -> (u16, u8) {
        match self.kind {
            Kind::File(_) => (FILE, 1),
            Kind::Folder(_) => (FOLDER, 2),
            Kind::Link(_) => (LINK, 7),
        }
    }
}

struct Writer {
    inodes: Vec<u8>,
    contents: Vec<u8>,
    /// The block in which the contents begin.
    first: usize,
}

impl Writer {
    /// A new inode's number, which says where it is.
    fn reserve(&mut self) -> usize {
        let number = self.inodes.len() / INODE;
        self.inodes.resize(self.inodes.len() + INODE, 0);
        number
    }

    fn node(&mut self, node: &Node<'_>, number: usize, parent: usize) -> Result<()> {
        let (links, bytes) = match &node.kind {
            Kind::File(bytes) => (1, bytes.to_vec()),
            Kind::Link(target) => (1, target.as_bytes().to_vec()),
            Kind::Folder(entries) => {
                let folders = entries.iter().filter(|(_, node)| matches!(node.kind, Kind::Folder(_))).count();
                (2 + folders, self.folder(entries, number, parent)?)
            }
        };
        let (kind, _) = node.types();
        let block = self.first + self.contents.len() / BLOCK;
        let inode = &mut self.inodes[number * INODE..][..INODE];
        // the two fields before are 0: a short inode whose contents are one run of blocks, without attributes
        inode[0x4..0x6].copy_from_slice(&(kind | node.mode).to_le_bytes());
        inode[0x6..0x8].copy_from_slice(&u16::try_from(links)?.to_le_bytes());
        inode[0x8..0xc].copy_from_slice(&u32::try_from(bytes.len()).context("a file is too large")?.to_le_bytes());
        inode[0x10..0x14].copy_from_slice(&u32::try_from(block)?.to_le_bytes());
        inode[0x14..0x18].copy_from_slice(&u32::try_from(number + 1)?.to_le_bytes());
        self.contents.extend_from_slice(&bytes);
        self.contents.resize(self.contents.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    /// A folder's one block: entries of one size, then their names; by name, since the kernel searches by halves.
    fn folder(&mut self, entries: &[(&str, Node<'_>)], number: usize, parent: usize) -> Result<Vec<u8>> {
        let mut all = vec![(".", number, 2), ("..", parent, 2)];
        for (name, node) in entries {
            let inside = self.reserve();
            self.node(node, inside, number)?;
            all.push((name, inside, node.types().1));
        }
        all.sort_unstable();
        if all.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            bail!("a folder has two entries of the same name");
        }
        let mut names = Vec::new();
        let mut block = Vec::new();
        for (name, inside, kind) in &all {
            let offset = u16::try_from(all.len() * DIRENT + names.len())?;
            block.extend_from_slice(&(*inside as u64).to_le_bytes());
            block.extend_from_slice(&offset.to_le_bytes());
            block.extend_from_slice(&[*kind, 0]);
            names.extend_from_slice(name.as_bytes());
        }
        block.append(&mut names);
        ensure!(block.len() <= BLOCK, "a folder of {} entries does not fit in a block", all.len());
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8], at: usize, length: usize) -> usize {
        bytes[at..at + length].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    #[test]
    fn a_file_is_found_by_its_path() -> Result<()> {
        let file = Node { mode: 0o755, kind: Kind::File(b"contents") };
        let folder = Node { mode: 0o755, kind: Kind::Folder(vec![("init", file)]) };
        let link = Node { mode: 0o777, kind: Kind::Link("sbin") };
        let image = write(&Node { mode: 0o755, kind: Kind::Folder(vec![("sbin", folder), ("-bin", link)]) })?;
        assert_eq!((image.len() % BLOCK, number(&image, 1024, 4)), (0, MAGIC as usize));
        let look = |inode: usize, name: &str| {
            let at = number(&image, 1024 + 0x28, 4) * BLOCK + inode * INODE;
            let (size, start) = (number(&image, at + 8, 4), number(&image, at + 0x10, 4) * BLOCK);
            let folder = &image[start..start + size];
            let count = number(folder, 8, 2) / DIRENT;
            let name_of = |place: usize| {
                let from = number(folder, place * DIRENT + 8, 2);
                let to = if place + 1 < count { number(folder, (place + 1) * DIRENT + 8, 2) } else { size };
                &folder[from..to]
            };
            assert!((1..count).all(|place| name_of(place - 1) < name_of(place)), "sorted");
            (0..count).find(|place| name_of(*place) == name.as_bytes()).map(|place| number(folder, place * DIRENT, 8))
        };
        let root = number(&image, 1024 + 0xe, 2);
        let sbin = look(root, "sbin").context("sbin")?;
        assert_eq!((look(root, ".."), look(sbin, ".."), look(sbin, "more")), (Some(root), Some(root), None));
        let init = BLOCK + look(sbin, "init").context("init")? * INODE;
        assert_eq!(image[number(&image, init + 0x10, 4) * BLOCK..][..number(&image, init + 8, 4)], *b"contents");
        Ok(())
    }

    #[test]
    fn names_are_once() {
        let entry = || ("a", Node { mode: 0, kind: Kind::File(b"") });
        assert!(write(&Node { mode: 0o755, kind: Kind::Folder(vec![entry(), entry()]) }).is_err());
    }
}
