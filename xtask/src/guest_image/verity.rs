//! dm-verity's tree of hashes (the kernel's Documentation/admin-guide/device-mapper/verity.rst, format 1): the digest of
//! each block, put into blocks, of which again each has a digest, up to a single one.

use sha2::{Digest, Sha256};

use super::BLOCK;
use crate::kernel::hex;

/// The hashes of some data.
pub(super) struct Tree {
    /// The topmost level first, as the kernel wants it without a superblock.
    pub(super) blocks: Vec<u8>,
    /// The digest of the topmost block, in hexadecimal digits.
    pub(super) root: String,
    /// In hexadecimal digits.
    pub(super) salt: String,
}

impl Tree {
    /// `data` is whole blocks. Salted with a digest of its own, so that the same data has the same tree.
    pub(super) fn of(data: &[u8]) -> Self {
        let salt: [u8; 32] = Sha256::digest(data).into();
        let digest =
            |block: &[u8]| -> [u8; 32] { Sha256::new().chain_update(salt).chain_update(block).finalize().into() };
        let level = |below: &[u8]| {
            let mut hashes: Vec<u8> = below.chunks(BLOCK).flat_map(digest).collect();
            hashes.resize(hashes.len().next_multiple_of(BLOCK), 0);
            hashes
        };
        let mut levels = vec![level(data)];
        while let Some(top) = levels.last().filter(|top| top.len() > BLOCK) {
            levels.push(level(top));
        }
        let root = levels.last().map(|top| digest(top)).unwrap_or_default();
        levels.reverse();
        Self { blocks: levels.concat(), root: hex(&root), salt: hex(&salt) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_has_a_hash_for_each_block_below() {
        assert_eq!(Tree::of(&[0; BLOCK]).blocks.len(), BLOCK);
        assert_eq!(Tree::of(&vec![0; 128 * BLOCK]).blocks.len(), BLOCK);
        // two blocks of hashes and one above them
        let tree = Tree::of(&vec![0; 129 * BLOCK]);
        assert_eq!(tree.blocks.len(), 3 * BLOCK);
        assert!(tree.blocks[64..BLOCK].iter().all(|byte| *byte == 0), "the top has two hashes");
    }

    #[test]
    fn every_byte_counts() {
        let mut data = vec![0; 200 * BLOCK];
        let before = Tree::of(&data).root;
        data[150 * BLOCK + 7] = 1;
        assert_ne!(Tree::of(&data).root, before);
    }
}
