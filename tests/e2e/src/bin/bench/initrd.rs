//! Initial file systems for the measurements: an archive of cpio's "newc" form.

/// An archive that grows.
#[derive(Debug, Default)]
pub(crate) struct Archive(Vec<u8>);

impl Archive {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Appends one file: thirteen numbers of eight hexadecimal digits, the name, the content.
    pub(crate) fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let archive = &mut self.0;
        let inode = archive.len() as u32 + 1;
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        archive.extend(b"070701");
        for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }

    /// The whole archive; another one may follow it, from a multiple of 512 on.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self.0
    }
}
