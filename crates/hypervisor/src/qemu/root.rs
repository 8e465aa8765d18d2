//! The guest's root: how QEMU gets it, and what the guest's kernel is told of it.
//!
//! An initrd is copied and given back after the boot (`boot_file`). An image is the same open file for as long as the VM
//! lives, read-only in every way there is: it was opened so, QEMU's device is so, the guest mounts it so. It is a disk, or
//! memory that the guest has for one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use super::boot_file::BootFile;
use super::pmem;
use super::snapshot::path_of;
use crate::{Image, Root, guest_kernel};

/// The file, open.
#[derive(Debug)]
pub(super) enum RootFile {
    Initrd(BootFile),
    Image(OwnedFd),
}

impl RootFile {
    /// Opens it; blocks for some milliseconds when it is an initrd.
    pub(super) fn open(root: &Root) -> io::Result<Self> {
        match root {
            Root::Initrd(path) => BootFile::new(path).map(Self::Initrd),
            Root::Image(Image { path, .. }) => {
                let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
                Ok(Self::Image(File::open(path).map_err(named)?.into()))
            }
        }
    }

    /// For a child to inherit, and what the child is told of it.
    pub(super) fn share(&self, root: &Root) -> io::Result<(OwnedFd, RootArguments)> {
        let (fd, path) = match self {
            Self::Initrd(copy) => copy.share()?,
            Self::Image(file) => {
                let fd = file.try_clone()?;
                let path = path_of(&fd);
                (fd, path)
            }
        };
        let bytes = nix::sys::stat::fstat(&fd)?.st_size;
        let arguments = RootArguments::new(root, &path, u64::try_from(bytes).unwrap_or(0));
        Ok((fd, arguments))
    }

    /// What can be given back when the guest has booted.
    pub(super) fn into_copy(self) -> Option<BootFile> {
        match self {
            Self::Initrd(copy) => Some(copy),
            Self::Image(_) => None,
        }
    }
}

/// Its part of the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RootArguments {
    /// Options with their values.
    pub(super) arguments: Vec<(&'static str, String)>,
    /// Added to the guest kernel's parameters, with a blank before.
    pub(super) kernel_params: String,
    /// Bytes of the guest's addresses that it takes as memory.
    pub(super) memory: u64,
}

impl RootArguments {
    /// QEMU opens `path`, which has so many bytes.
    pub(super) fn new(root: &Root, path: &str, bytes: u64) -> Self {
        match root {
            // it takes its value as it is
            Root::Initrd(_) => Self { arguments: vec![("-initrd", path.to_owned())], ..Self::default() },
            Root::Image(image) if image.is_memory => {
                let arguments = vec![
                    ("-object", pmem::file("image", path, bytes, true).line()),
                    ("-device", pmem::device("root", "image", None).line()),
                ];
                Self { arguments, kernel_params: guest_kernel::root(image), memory: bytes }
            }
            Root::Image(image) => {
                Self { arguments: virtio_blk(path), kernel_params: guest_kernel::root(image), memory: 0 }
            }
        }
    }
}

/// The host's page cache is right: every VM reads the same file. Nobody writes, so there is nothing to lock either.
fn virtio_blk(path: &str) -> Vec<(&'static str, String)> {
    vec![
        (
            "-blockdev",
            format!("driver=file,node-name=image,filename={path},read-only=on,auto-read-only=off,locking=off"),
        ),
        ("-device", "virtio-blk-pci,drive=image,id=root,num-queues=1".into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(is_memory: bool) -> Root {
        Root::Image(Image { path: "/no/such/image".into(), file_system: "erofs".into(), verity: None, is_memory })
    }

    #[test]
    fn an_initrd_is_one_option() {
        let arguments = RootArguments::new(&Root::Initrd("/i".into()), "/proc/self/fd/7", 1);
        assert_eq!(arguments.arguments, [("-initrd", "/proc/self/fd/7".to_owned())]);
        assert_eq!(arguments.kernel_params, "");
    }

    #[test]
    fn a_disk_is_read_only() {
        let arguments = RootArguments::new(&image(false), "/proc/self/fd/7", 1);
        assert!(arguments.arguments[0].1.contains("filename=/proc/self/fd/7,read-only=on"), "{arguments:?}");
        assert_eq!(arguments.kernel_params, " root=/dev/vda1 rootfstype=erofs ro");
    }

    #[test]
    fn memory_takes_addresses() {
        let arguments = RootArguments::new(&image(true), "/proc/self/fd/7", 6 << 20);
        let object =
            "memory-backend-file,id=image,mem-path=/proc/self/fd/7,size=6291456,share=on,readonly=on".to_owned();
        assert_eq!(arguments.arguments[0], ("-object", object));
        assert_eq!(arguments.memory, 6 << 20);
        assert_eq!(arguments.kernel_params, " rootwait root=/dev/pmem0p1 rootfstype=erofs ro");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = RootFile::open(&image(false)).expect_err("missing");
        assert!(error.to_string().starts_with("/no/such/image: "), "{error}");
    }
}
