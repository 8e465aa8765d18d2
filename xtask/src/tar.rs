//! Writes tar archives (ustar) as far as images need them: folders, files and links, owned by root, made at time 0.

use anyhow::{Context, Result, ensure};

const BLOCK: usize = 512;

/// An archive in memory.
#[derive(Default)]
pub(crate) struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    pub(crate) fn directory(&mut self, name: &str, mode: u32) -> Result<()> {
        self.entry(&format!("{name}/"), mode, b'5', "", &[])
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entry(name, mode, b'0', "", data)
    }

    pub(crate) fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.entry(name, 0o777, b'2', target, &[])
    }

    /// The whole archive, with the two empty blocks that end it.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, kind: u8, target: &str, data: &[u8]) -> Result<()> {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, room: usize, text: &str| {
            ensure!(text.len() < room, "{text:?} is too long for a tar header: at most {} bytes", room - 1);
            header[at..at + text.len()].copy_from_slice(text.as_bytes());
            Ok(())
        };
        put(0, 100, name)?;
        put(100, 8, &format!("{mode:07o}"))?;
        put(108, 8, "0000000")?;
        put(116, 8, "0000000")?;
        put(124, 12, &format!("{:011o}", data.len())).with_context(|| format!("{name} is larger than 8 GiB"))?;
        put(136, 12, "00000000000")?;
        put(157, 100, target)?;
        put(257, 6, "ustar")?;
        header[156] = kind;
        header[263..265].copy_from_slice(b"00");
        // the sum counts its own field as blanks
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_sum_up_and_blocks_are_whole() -> Result<()> {
        let mut tar = Tar::default();
        tar.directory("tmp", 0o1777)?;
        tar.file("a", 0o644, b"abc")?;
        tar.link("b", "a")?;
        let bytes = tar.end();
        assert_eq!(bytes.len(), BLOCK * (1 + 2 + 1 + 2));
        assert_eq!(&bytes[..5], b"tmp/\0");
        assert_eq!(&bytes[BLOCK * 2..BLOCK * 2 + 3], b"abc");
        let stored = std::str::from_utf8(&bytes[148..154])?;
        let sum: u32 = bytes[..BLOCK].iter().map(|byte| u32::from(*byte)).sum();
        let field: u32 = bytes[148..156].iter().map(|byte| u32::from(*byte)).sum();
        assert_eq!(u32::from_str_radix(stored, 8)?, sum - field + 8 * u32::from(b' '));
        Ok(())
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        assert!(Tar::default().file(&"x".repeat(100), 0o644, b"").is_err());
    }
}
