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
use crate::{Image, Root, Verity};

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
                Self { arguments, kernel_params: kernel_params(image), memory: bytes }
            }
            Root::Image(image) => Self { arguments: virtio_blk(path), kernel_params: kernel_params(image), memory: 0 },
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

/// The first virtio-blk disk of the guest's: others are behind a bridge.
const DISK: &str = "/dev/vda";
/// The first of its persistent memories, likewise.
const MEMORY: &str = "/dev/pmem0p";

fn kernel_params(image: &Image) -> String {
    // memory becomes a disk in the background, after the kernel has asked whether there is one
    let (disk, wait, wait_mapped) = if image.is_memory {
        (MEMORY, " rootwait".to_owned(), format!(" dm-mod.waitfor={MEMORY}1,{MEMORY}2"))
    } else {
        (DISK, String::new(), String::new())
    };
    let (table, root) = match &image.verity {
        None => (wait, format!("{disk}1")),
        Some(verity) => (verified(verity, disk) + &wait_mapped, "/dev/dm-0".into()),
    };
    format!("{table} root={root} rootfstype={} ro", image.file_system)
}

/// The device mapper's table, made by the kernel before it mounts its root.
///
/// A block that is not what it was ends the machine, with words that the host can show: an I/O error in some program
/// of the guest's would tell nobody.
fn verified(verity: &Verity, disk: &str) -> String {
    let Verity { root_hash, salt, data_blocks, data_block_size, hash_block_size } = verity;
    let sectors = data_blocks.saturating_mul(data_block_size / 512);
    format!(
        " dm-mod.create=\"dm-verity,,,ro,0 {sectors} verity 1 {disk}1 {disk}2 {data_block_size} {hash_block_size} \
         {data_blocks} 0 sha256 {root_hash} {salt} 1 panic_on_corruption\""
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(verity: Option<Verity>) -> Root {
        Root::Image(Image { path: "/no/such/image".into(), file_system: "erofs".into(), verity, is_memory: false })
    }

    #[test]
    fn an_initrd_is_one_option() {
        let arguments = RootArguments::new(&Root::Initrd("/i".into()), "/proc/self/fd/7", 1);
        assert_eq!(arguments.arguments, [("-initrd", "/proc/self/fd/7".to_owned())]);
        assert_eq!(arguments.kernel_params, "");
    }

    #[test]
    fn a_disk_is_read_only_and_its_hash_is_the_kernels() {
        let (root_hash, salt) = ("ab".repeat(32), "-".into());
        let verity = Verity { root_hash, salt, data_blocks: 10, data_block_size: 4096, hash_block_size: 4096 };
        let arguments = RootArguments::new(&image(Some(verity)), "/proc/self/fd/7", 1);
        assert!(arguments.arguments[0].1.contains("filename=/proc/self/fd/7,read-only=on"), "{arguments:?}");
        let table = format!("0 80 verity 1 /dev/vda1 /dev/vda2 4096 4096 10 0 sha256 {} - 1 panic", "ab".repeat(32));
        assert!(arguments.kernel_params.contains(&table), "{arguments:?}");
        assert!(arguments.kernel_params.ends_with(" root=/dev/dm-0 rootfstype=erofs ro"), "{arguments:?}");
        let believed = RootArguments::new(&image(None), "/proc/self/fd/7", 1);
        assert_eq!(believed.kernel_params, " root=/dev/vda1 rootfstype=erofs ro");
    }

    #[test]
    fn memory_is_waited_for() {
        let (root_hash, salt) = ("ab".repeat(32), "-".into());
        let verity = Verity { root_hash, salt, data_blocks: 10, data_block_size: 4096, hash_block_size: 4096 };
        for (verity, params) in [
            (Some(verity), " dm-mod.waitfor=/dev/pmem0p1,/dev/pmem0p2 root=/dev/dm-0 rootfstype=erofs ro"),
            (None, " rootwait root=/dev/pmem0p1 rootfstype=erofs ro"),
        ] {
            let Root::Image(image) = image(verity) else { panic!("an image") };
            let root = Root::Image(Image { is_memory: true, ..image });
            let arguments = RootArguments::new(&root, "/proc/self/fd/7", 6 << 20);
            assert!(arguments.kernel_params.ends_with(params), "{arguments:?}");
            let object =
                "memory-backend-file,id=image,mem-path=/proc/self/fd/7,size=6291456,share=on,readonly=on".to_owned();
            assert_eq!(arguments.arguments[0], ("-object", object));
            assert_eq!(arguments.memory, 6 << 20);
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = RootFile::open(&image(None)).expect_err("missing");
        assert!(error.to_string().starts_with("/no/such/image: "), "{error}");
    }
}
