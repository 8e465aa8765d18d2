//! Kernel parameters that a guest needs under every VMM. What one VMM needs besides is in its driver's folder; what the agent
//! and its containers need comes with [`crate::Boot::kernel_params`].

use crate::{Image, Verity, VmSpec};

/// For every guest.
///
/// `dummy.numdummies=0`, `ifb.numifbs=0`, `bonding.max_bonds=0`, `fb_tunnels=none`: no interface that nobody asked for.
/// `panic=-1`: a panic resets at once, which every VMM sees: that is how the host learns of it.
/// `oops=panic`: a kernel that has lost its way does not go on half alive, with calls that never return.
/// `cryptomgr.notests`, `rcupdate.rcu_expedited=1`, `net.ifnames`: as Kata's guests boot.
const ALWAYS: &str = "panic=-1 oops=panic rcupdate.rcu_expedited=1 cryptomgr.notests net.ifnames=0 \
    dummy.numdummies=0 ifb.numifbs=0 bonding.max_bonds=0 fb_tunnels=none random.trust_cpu=on";

/// Memory up to which a guest gets [`SMALL`], MiB.
const SMALL_MIB: u64 = 1024;
/// An eighth of the kernel's own tables of names and inodes, which are cleared at boot: half a MiB, for files by the
/// hundred thousand.
const SMALL: &str = " dhash_entries=8192 ihash_entries=4096";

/// Without a blank at either end.
pub(crate) fn params(spec: &VmSpec) -> String {
    let tables = if spec.size.memory_mib <= SMALL_MIB { SMALL } else { "" };
    let quiet = if spec.debug { "" } else { " quiet" };
    format!("{ALWAYS}{tables}{quiet} nr_cpus={}", spec.size.vcpus)
}

/// The guest's first virtio-blk disk.
const DISK: &str = "/dev/vda";
/// The first of its persistent memories.
const MEMORY: &str = "/dev/pmem0p";

/// The guest's root is its first disk, or its first persistent memory. With a blank before it.
pub(crate) fn root(image: &Image) -> String {
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

    fn image(verity: bool, is_memory: bool) -> Image {
        let verity = verity.then(|| Verity {
            root_hash: "ab".repeat(32),
            salt: "-".into(),
            data_blocks: 10,
            data_block_size: 4096,
            hash_block_size: 4096,
        });
        Image { path: "/no/such/image".into(), file_system: "erofs".into(), verity, is_memory }
    }

    #[test]
    fn the_hashes_of_a_disk_are_the_kernels() {
        let params = root(&image(true, false));
        let table = format!("0 80 verity 1 /dev/vda1 /dev/vda2 4096 4096 10 0 sha256 {} - 1 panic", "ab".repeat(32));
        assert!(params.contains(&table), "{params}");
        assert!(params.ends_with(" root=/dev/dm-0 rootfstype=erofs ro"), "{params}");
        assert_eq!(root(&image(false, false)), " root=/dev/vda1 rootfstype=erofs ro");
    }

    #[test]
    fn memory_is_waited_for() {
        let params = root(&image(true, true));
        let end = " dm-mod.waitfor=/dev/pmem0p1,/dev/pmem0p2 root=/dev/dm-0 rootfstype=erofs ro";
        assert!(params.ends_with(end), "{params}");
        assert_eq!(root(&image(false, true)), " rootwait root=/dev/pmem0p1 rootfstype=erofs ro");
    }
}
