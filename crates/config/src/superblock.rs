//! Which file system the guest's image has: its first partition and the superblock there. Owns the reads of the image, each of
//! a fixed size. Trusts nothing in it: the answer is one of three names or none.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::file::Entry;
use crate::key::Word as _;
use crate::types::{Config, FileSystem};
use crate::value::refuse;
use crate::{Error, OneLine};

/// Bytes in which partition tables count.
const SECTOR: u64 = 512;
/// Beginning of a partition that is read: the superblocks of all three are in it.
const HEAD: usize = 2048;

/// Takes the file system that the image has for the one that the configuration says.
pub(crate) fn decide(config: &mut Config, setting: &Entry, image: &Path) -> Result<(), Error> {
    let found = File::open(image).and_then(|file| detect(&file));
    let found = found.map_err(|error| refuse(setting, format!("reading {}: {error}", image.display())))?;
    let said = config.hypervisor.rootfs_type;
    match found {
        Some(found) if found != said => {
            let (found, said, image) = (found.as_str(), setting.value.to_string(), image.display());
            let told =
                format!("{} = {said}: the file system of {image} is {found}, which is used instead", setting.key);
            config.notices.push(OneLine(told).to_string());
        }
        Some(_) => {}
        // with a root hash the guest's kernel finds out and says whether the image was changed
        None if config.hypervisor.kernel_verity_params.is_some() => {}
        None => {
            let why = format!(
                "the first partition of {} has neither erofs nor ext4 nor xfs: set `image` to a guest image",
                image.display()
            );
            return Err(refuse(setting, why));
        }
    }
    config.hypervisor.rootfs_type = found.unwrap_or(said);
    Ok(())
}

/// The file system in the first partition; none without a partition table or with another file system.
fn detect(disk: &File) -> io::Result<Option<FileSystem>> {
    let Some(start) = first_partition(disk)? else { return Ok(None) };
    let mut head = [0; HEAD];
    Ok(if read(disk, &mut head, start)? { of_superblock(&head) } else { None })
}

/// By the magic numbers; which are in different places, so a file system that was made over another may leave both. The kernel
/// refuses all but the one that is whole, and `mkfs` clears the others.
fn of_superblock(head: &[u8; HEAD]) -> Option<FileSystem> {
    const SUPERBLOCK: usize = 1024;
    const EXT_MAGIC: usize = SUPERBLOCK + 56;
    if head[SUPERBLOCK..].starts_with(&0xe0f5_e1e2_u32.to_le_bytes()) {
        Some(FileSystem::Erofs)
    } else if head[EXT_MAGIC..].starts_with(&0xef53_u16.to_le_bytes()) {
        Some(FileSystem::Ext4)
    } else if head.starts_with(b"XFSB") {
        Some(FileSystem::Xfs)
    } else {
        None
    }
}

/// Where the first partition begins, in bytes: by an MBR, or by the GPT that an MBR announces.
fn first_partition(disk: &File) -> io::Result<Option<u64>> {
    const TABLE: usize = 446;
    /// The type of the one partition of an MBR that protects a GPT.
    const PROTECTIVE: u8 = 0xee;
    let mut sector = [0; SECTOR as usize];
    if !read(disk, &mut sector, 0)? || sector[510..] != [0x55, 0xaa] {
        return Ok(None);
    }
    let first = &sector[TABLE..][..16];
    match first[4] {
        0 => Ok(None),
        PROTECTIVE => first_of_gpt(disk),
        _ => Ok(Some(u64::from(u32::from_le_bytes([first[8], first[9], first[10], first[11]])) * SECTOR)),
    }
}

fn first_of_gpt(disk: &File) -> io::Result<Option<u64>> {
    let mut header = [0; 92];
    if !read(disk, &mut header, SECTOR)? || !header.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let mut entry = [0; 128];
    let Some(at) = number(&header[72..]).checked_mul(SECTOR) else { return Ok(None) };
    if !read(disk, &mut entry, at)? || entry[..16] == [0; 16] {
        return Ok(None);
    }
    Ok(number(&entry[32..]).checked_mul(SECTOR))
}

/// The little-endian number at the beginning.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Whether the disk is long enough.
fn read(disk: &File, buffer: &mut [u8], at: u64) -> io::Result<bool> {
    // an offset that is no file's is one behind the end
    if i64::try_from(at).is_err() {
        return Ok(false);
    }
    match disk.read_exact_at(buffer, at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: usize = 1 << 20;

    /// A disk with an MBR whose first partition has these bytes at this place.
    fn disk(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; START + (1 << 16)];
        disk[446 + 4] = 0x83;
        disk[446 + 8..446 + 12].copy_from_slice(&((START as u64 / SECTOR) as u32).to_le_bytes());
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[START + at..][..magic.len()].copy_from_slice(magic);
        disk
    }

    fn detected(bytes: &[u8]) -> Option<FileSystem> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        detect(file.as_file()).expect("read")
    }

    fn as_gpt(mut disk: Vec<u8>) -> Vec<u8> {
        disk[446 + 4] = 0xee;
        disk[446 + 8..446 + 12].copy_from_slice(&1_u32.to_le_bytes());
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[512 + 72..512 + 80].copy_from_slice(&2_u64.to_le_bytes());
        disk[1024] = 1;
        disk[1024 + 32..1024 + 40].copy_from_slice(&(START as u64 / SECTOR).to_le_bytes());
        disk
    }

    #[test]
    fn by_its_superblock() {
        for (at, magic, found) in [
            (1024, [0xe2, 0xe1, 0xf5, 0xe0].as_slice(), FileSystem::Erofs),
            (1080, &[0x53, 0xef], FileSystem::Ext4),
            (0, b"XFSB", FileSystem::Xfs),
        ] {
            let disk = disk(at, magic);
            assert_eq!(detected(&disk), Some(found));
            assert_eq!(detected(&as_gpt(disk)), Some(found));
        }
    }

    #[test]
    fn nothing_in_it_is_trusted() {
        let erofs = [0xe2, 0xe1, 0xf5, 0xe0];
        assert_eq!(detected(&[]), None);
        assert_eq!(detected(&disk(1024, b"btrf")), None);
        let mut no_table = disk(1024, &erofs);
        no_table[511] = 0;
        assert_eq!(detected(&no_table), None);
        let mut unused = disk(1024, &erofs);
        unused[446 + 4] = 0;
        assert_eq!(detected(&unused), None);
        // beyond the end, and where no file has bytes
        let mut far = disk(1024, &erofs);
        far[446 + 8..446 + 12].fill(0xff);
        assert_eq!(detected(&far), None);
        for place in [512 + 72, 1024 + 32] {
            for byte in [0xff, 0x7f, 0x3f] {
                let mut gpt = as_gpt(disk(1024, &erofs));
                gpt[place..place + 8].fill(byte);
                assert_eq!(detected(&gpt), None, "{place} {byte}");
            }
        }
        let cut = disk(1024, &erofs);
        assert_eq!(detected(&cut[..START + 1000]), None);
    }
}
