//! The settings that every driver has, and the defaults: the file that is installed and the documentation show these.

use std::path::PathBuf;
use std::time::Duration;

use crate::driver::{Driver, Qemu};
use crate::key::Word;

/// Everything.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Whose table `[hypervisor.NAME]` is used.
    pub driver: Driver,
    /// What each driver has of `[hypervisor.NAME]`.
    pub hypervisor: Hypervisor,
    /// What only QEMU has of `[hypervisor.qemu]`.
    pub qemu: Qemu,
    /// `[agent.kata]`.
    pub agent: Agent,
    /// `[runtime]`.
    pub runtime: Runtime,
    /// `[factory]`.
    pub factory: Factory,
    /// The base file.
    pub source: PathBuf,
    /// Unknown keys, each with the most similar known one, and keys that ask for something that is not done.
    pub warnings: Vec<String>,
    /// Keys at Kata's own default that ask for something that is not done, and what was used instead of a setting.
    pub notices: Vec<String>,
}

impl Config {
    /// The defaults, as of this file.
    pub(crate) fn defaults(source: PathBuf) -> Self {
        Self {
            driver: Driver::default(),
            hypervisor: Hypervisor::default(),
            qemu: Qemu::default(),
            agent: Agent::default(),
            runtime: Runtime::default(),
            factory: Factory::default(),
            source,
            warnings: Vec::new(),
            notices: Vec::new(),
        }
    }
}

/// How the host speaks to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AgentChannel {
    /// vsock where the host has it, else the serial port.
    #[default]
    Auto,
    /// A virtio-serial port, which only our own agent knows.
    Serial,
    /// The kernel's vsock or an error.
    Vsock,
}

impl Word for AgentChannel {
    const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("serial", Self::Serial), ("vsock", Self::Vsock)];
}

/// What virtiofsd lets the guest keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FsCache {
    /// Nothing.
    Never,
    /// Names and attributes.
    Metadata,
    /// As the files change.
    #[default]
    Auto,
    /// Everything, for files that the host never changes.
    Always,
}

impl Word for FsCache {
    const WORDS: &'static [(&'static str, Self)] =
        &[("never", Self::Never), ("metadata", Self::Metadata), ("auto", Self::Auto), ("always", Self::Always)];
}

/// How the host's files reach the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SharedFs {
    /// virtio-fs where the host has a virtiofsd, else 9p.
    #[default]
    Auto,
    /// virtio-fs or an error.
    VirtioFs,
    /// 9p, served by the VMM.
    VirtioNineP,
    /// Not at all: block devices only.
    None,
}

impl Word for SharedFs {
    const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("virtio-fs", Self::VirtioFs), ("virtio-9p", Self::VirtioNineP), ("none", Self::None)];
}

/// The file system of the guest's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileSystem {
    /// ext4, and ext2 and ext3 by the same driver.
    #[default]
    Ext4,
    /// XFS.
    Xfs,
    /// erofs.
    Erofs,
}

impl Word for FileSystem {
    const WORDS: &'static [(&'static str, Self)] = &[("ext4", Self::Ext4), ("xfs", Self::Xfs), ("erofs", Self::Erofs)];
}

/// `kernel_verity_params`: Kata's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verity {
    /// 64 hexadecimal digits.
    pub root_hash: String,
    /// Hexadecimal digits, or `-` for none.
    pub salt: String,
    /// Blocks of the image's first partition.
    pub data_blocks: u64,
    /// Bytes of each.
    pub data_block_size: u64,
    /// Bytes of a block of hashes, which are the second partition.
    pub hash_block_size: u64,
}

/// How an interface of the pod gets into the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Internetworking {
    /// A tap, joined with the interface by traffic control.
    #[default]
    TcFilter,
    /// A macvtap on top of it, which takes all that comes in.
    MacVtap,
    /// Not at all.
    None,
}

impl Word for Internetworking {
    const WORDS: &'static [(&'static str, Self)] =
        &[("tcfilter", Self::TcFilter), ("macvtap", Self::MacVtap), ("none", Self::None)];
}

/// How the guest has block devices of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockDriver {
    /// A PCI device each.
    #[default]
    VirtioBlk,
    /// Units of one controller.
    VirtioScsi,
    /// Persistent memory: the file itself, mapped. What cannot be that is as [`Self::VirtioBlk`].
    VirtioPmem,
}

impl Word for BlockDriver {
    // the Go runtime's names and the Rust runtime's
    const WORDS: &'static [(&'static str, Self)] = &[
        ("virtio-blk", Self::VirtioBlk),
        ("virtio-blk-pci", Self::VirtioBlk),
        ("virtio-scsi", Self::VirtioScsi),
        ("virtio-pmem", Self::VirtioPmem),
    ];
}

/// How the VMM reads and writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockAio {
    /// By threads of its own.
    #[default]
    Threads,
    /// By Linux' AIO, which takes `cache_direct`.
    Native,
    /// By io_uring.
    IoUring,
}

impl Word for BlockAio {
    const WORDS: &'static [(&'static str, Self)] =
        &[("threads", Self::Threads), ("native", Self::Native), ("io_uring", Self::IoUring)];
}

/// The keys `block_device_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockDevices {
    /// `block_device_driver`.
    pub driver: BlockDriver,
    /// `block_device_aio`.
    pub aio: BlockAio,
    /// The next two count.
    pub cache_set: bool,
    /// Past the host's page cache.
    pub cache_direct: bool,
    /// The guest's flushes are ignored.
    pub cache_noflush: bool,
    /// Bytes; 0 is the VMM's.
    pub logical_sector_size: u32,
    /// Bytes; 0 is the VMM's.
    pub physical_sector_size: u32,
}

/// `[hypervisor.NAME]`: what each driver has.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the file")]
pub struct Hypervisor {
    /// The VMM's program.
    pub path: PathBuf,
    /// Guest kernel: bzImage, or ELF with a PVH note (quicker).
    pub kernel: PathBuf,
    /// Guest initrd with the agent as `/init`; either this or `image` is there.
    pub initrd: Option<PathBuf>,
    /// Disk with the agent as `/sbin/init` in its first partition.
    pub image: Option<PathBuf>,
    /// The file system of the image's first partition.
    pub rootfs_type: FileSystem,
    /// What the guest's kernel holds the image against.
    pub kernel_verity_params: Option<Verity>,
    /// The image is persistent memory instead of a disk (`disable_image_nvdimm`, `vm_rootfs_driver`).
    pub image_is_memory: bool,
    /// Added to the guest's kernel command line.
    pub kernel_params: String,
    /// `-bios`; `None` is qboot where QEMU brings it.
    pub firmware: Option<PathBuf>,
    /// Processors at boot.
    pub default_vcpus: u32,
    /// Most processors a VM may have.
    pub default_maxvcpus: u32,
    /// Memory at boot, MiB.
    ///
    /// Kata's default is 2048. A page of memory costs 64 bytes of the guest's memory map, which is written at boot:
    /// 32 MiB for 2 GiB, in time and in resident memory of every pod. A container's own limit is added on top.
    pub default_memory_mib: u64,
    /// Most memory a VM may have, MiB.
    pub default_maxmemory_mib: u64,
    /// Pairs of queues of each network card.
    pub network_queues: u32,
    /// The VMM copies every frame itself even where the host's kernel could (`/dev/vhost-net`).
    pub disable_vhost_net: bool,
    /// How the host's files reach the guest.
    pub shared_fs: SharedFs,
    /// Largest packet of 9p, bytes. Kata's default is 8192, of which a file is many.
    pub msize_9p: u32,
    /// `None` looks at the usual places.
    pub virtio_fs_daemon: Option<PathBuf>,
    /// What the guest may keep.
    pub virtio_fs_cache: FsCache,
    /// Entries of the request queue.
    pub virtio_fs_queue_size: u32,
    /// Appended to virtiofsd's arguments.
    pub virtio_fs_extra_args: Vec<String>,
    /// Memory that the guest has freed goes back to the host.
    pub reclaim_guest_freed_memory: bool,
    /// Own key: the host's kernel may keep equal pages of several guests once (KSM).
    pub merge_guest_memory: bool,
    /// A root file system that is a block device or its image is mounted by the host and shared as files.
    pub disable_block_device_use: bool,
    /// How block devices get into the VM.
    pub block: BlockDevices,
    /// Where the guest's random numbers come from.
    pub entropy_source: PathBuf,
    /// The guest's console goes to the log.
    pub enable_debug: bool,
}

/// `[agent.kata]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Agent {
    /// The agent logs more, and its log goes to the shim's.
    pub enable_debug: bool,
    /// Own key.
    pub channel: AgentChannel,
    /// How long a guest may take from its start to the agent's first word.
    pub dial_timeout: Duration,
    /// How long any one call may take.
    pub request_timeout: Duration,
}

/// `[runtime]`.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the file")]
pub struct Runtime {
    /// The shim logs more.
    pub enable_debug: bool,
    /// `true` drops the container's seccomp profile. Kata's default is `true`; here a profile that was asked for is
    /// kept.
    pub disable_guest_seccomp: bool,
    /// How the pod's interfaces get into the VM.
    pub internetworking: Internetworking,
    /// `true`: the pod's network is not looked at, and may be the host's; the VM has a loopback interface only.
    pub disable_new_netns: bool,
    /// `true`: the whole VM counts for the pod's cgroup on the host; `false`: its processors only. Kata's Go runtime has
    /// `false`, its Rust runtime `true`, which is what a pod's overhead in Kubernetes is for.
    pub sandbox_cgroup_only: bool,
    /// `true`: an emptyDir on disk is the host's folder; `false`: the VM has one of its own, in its memory.
    pub disable_guest_empty_dir: bool,
    /// How long making a container may take.
    pub create_container_timeout: Duration,
}

/// `[factory]`: pods that are clones of a VM that has booted before.
#[derive(Debug, Clone, PartialEq)]
pub struct Factory {
    /// A pod's VM is a clone where it can be one.
    pub enable_template: bool,
    /// The folder of saved VMs.
    pub template_path: PathBuf,
    /// Own key: the first pod that finds no saved VM of its kind has one made beside it.
    pub make_template_on_demand: bool,
    /// How many ready VMs `kata-runtime factory init` keeps for pods; 0 is none, and then no pod asks.
    pub vm_cache_number: u32,
    /// The socket at which they are given out.
    pub vm_cache_endpoint: PathBuf,
}

impl Default for Factory {
    fn default() -> Self {
        Self {
            enable_template: false,
            template_path: "/run/vc/vm/template".into(),
            make_template_on_demand: true,
            vm_cache_number: 0,
            vm_cache_endpoint: "/var/run/kata-containers/cache.sock".into(),
        }
    }
}

impl Default for Hypervisor {
    fn default() -> Self {
        Self {
            path: "/usr/bin/qemu-system-x86_64".into(),
            kernel: "/usr/local/share/kata-containers/vmlinux.container".into(),
            initrd: Some("/usr/local/share/kata-containers/kata-containers-initrd.img".into()),
            image: None,
            rootfs_type: FileSystem::Ext4,
            kernel_verity_params: None,
            image_is_memory: false,
            kernel_params: String::new(),
            firmware: None,
            default_vcpus: 1,
            default_maxvcpus: 0,
            default_memory_mib: 512,
            default_maxmemory_mib: 0,
            network_queues: 1,
            disable_vhost_net: false,
            shared_fs: SharedFs::default(),
            msize_9p: 128 << 10,
            virtio_fs_daemon: None,
            virtio_fs_cache: FsCache::Auto,
            virtio_fs_queue_size: 1024,
            virtio_fs_extra_args: vec!["--thread-pool-size=1".into()],
            reclaim_guest_freed_memory: false,
            merge_guest_memory: false,
            disable_block_device_use: false,
            block: BlockDevices::default(),
            entropy_source: "/dev/urandom".into(),
            enable_debug: false,
        }
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            enable_debug: false,
            channel: AgentChannel::default(),
            dial_timeout: Duration::from_secs(45),
            request_timeout: Duration::from_secs(60),
        }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            enable_debug: false,
            disable_guest_seccomp: false,
            internetworking: Internetworking::default(),
            disable_new_netns: false,
            sandbox_cgroup_only: true,
            disable_guest_empty_dir: true,
            create_container_timeout: Duration::from_secs(60),
        }
    }
}
