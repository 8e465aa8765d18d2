//! Writes the guest's initrd: a cpio archive (newc) with the agent as /init and nothing that the agent does not need
//! before it has mounted the rest. The same agent gives the same bytes. Not compressed: unpacking costs more than
//! reading when the CPU is emulated.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::step;
use crate::workspace::{INITRD, Workspace};

/// A folder's mode bits, beside its permissions.
pub(crate) const DIRECTORY: u32 = 0o040_000;
/// A file's mode bits, beside its permissions.
pub(crate) const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// dist/…/kata-containers-initrd.img from the compiled agent.
pub(crate) fn provide(workspace: &Workspace) -> Result<()> {
    step::timed("writing the initrd", || {
        let agent = workspace.agent();
        let program = fs::read(&agent)
            .with_context(|| format!("the agent {} cannot be read: run `make build`", agent.display()))?;
        let image = archive(&program)?;
        let directory = workspace.guest_files();
        fs::create_dir_all(&directory).with_context(|| format!("{} cannot be made", directory.display()))?;
        let temporary = directory.join(".initrd");
        fs::write(&temporary, &image)
            .and_then(|()| fs::rename(&temporary, directory.join(INITRD)))
            .with_context(|| format!("{} cannot be written", directory.join(INITRD).display()))?;
        println!("    {INITRD}: {} KiB", image.len() / 1024);
        Ok(())
    })
}

fn archive(init: &[u8]) -> Result<Vec<u8>> {
    let mut cpio = Cpio::default();
    // by name, each folder before what is in it
    cpio.add("dev", DIRECTORY | 0o755, (0, 0), &[])?;
    // PID 1's first words and its empty stdin, before devtmpfs is mounted
    cpio.add("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[])?;
    cpio.add("dev/null", CHARACTER_DEVICE | 0o666, (1, 3), &[])?;
    cpio.add("etc", DIRECTORY | 0o755, (0, 0), &[])?;
    cpio.add("init", FILE | 0o755, (0, 0), init)?;
    cpio.add("mnt", DIRECTORY | 0o755, (0, 0), &[])?;
    cpio.add("proc", DIRECTORY | 0o555, (0, 0), &[])?;
    cpio.add("root", DIRECTORY | 0o700, (0, 0), &[])?;
    cpio.add("run", DIRECTORY | 0o755, (0, 0), &[])?;
    cpio.add("sys", DIRECTORY | 0o555, (0, 0), &[])?;
    cpio.add("tmp", DIRECTORY | 0o1777, (0, 0), &[])?;
    cpio.add("var", DIRECTORY | 0o755, (0, 0), &[])?;
    cpio.end()
}

/// The archive so far. Owners and times are always 0, inodes count from 1: nothing of the build machine gets in.
#[derive(Default)]
pub(crate) struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    pub(crate) fn add(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        self.entries += 1;
        self.write(name, self.entries, mode, device, data)
    }

    pub(crate) fn end(mut self) -> Result<Vec<u8>> {
        self.write("TRAILER!!!", 0, 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn write(&mut self, name: &str, inode: u32, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let Ok(size) = u32::try_from(data.len()) else {
            bail!("{name} has {} bytes: cpio's newc form holds at most 4 GiB a file", data.len());
        };
        let name_size = u32::try_from(name.len() + 1)?;
        let links = if mode & DIRECTORY == 0 { 1 } else { 2 };
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(data);
        self.align();
        Ok(())
    }

    /// Names and contents start at multiples of four.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_agent_gives_the_same_bytes() -> Result<()> {
        assert_eq!(archive(b"agent")?, archive(b"agent")?);
        Ok(())
    }

    #[test]
    fn a_header_has_110_bytes_and_everything_is_aligned() -> Result<()> {
        let image = archive(b"12345")?;
        assert_eq!(image.len() % 4, 0);
        assert_eq!(&image[..6], b"070701");
        // "dev" and its end fill the header up to 114, so the next one starts at 116
        assert_eq!(&image[110..116], b"dev\0\0\0");
        assert_eq!(&image[116..122], b"070701");
        Ok(())
    }
}
