//! What cannot be used: one line each, with file, line, key, value and what is allowed.

use std::path::Path;

use config::Config;

fn refused(text: &str) -> String {
    match Config::parse(text, Path::new("/etc/c.toml")) {
        Ok(_) => panic!("accepted: {text}"),
        Err(error) => error.to_string(),
    }
}

/// The setting stands in line 3 of its table.
#[track_caller]
fn value(table: &str, setting: &str, allowed: &str) {
    let error = refused(&format!("# first\n[{table}]\n{setting}\n"));
    assert_eq!(error, format!("/etc/c.toml:3: {table}.{setting}: {allowed}"));
}

#[test]
fn values_that_cannot_be() {
    let qemu = "hypervisor.qemu";
    value(qemu, "kernel = 7", "must be a string");
    value(qemu, "kernel = \"vmlinux\"", "must be an absolute path");
    value(qemu, "kernel_params = \"a\\nb\"", "must be one line of at most 2048 bytes");
    value(qemu, "initrd = \"\"", "a guest needs an initrd or an image: set a path, or remove the key");
    value(qemu, "rootfs_type = \"btrfs\"", "must be \"ext4\" or \"xfs\" or \"erofs\"");
    value(qemu, "accelerator = \"hvf\"", "must be \"auto\" or \"kvm\" or \"tcg\"");
    value(qemu, "machine_type = \"q36\"", "must be \"q35\"");
    value(qemu, "machine_type = \"microvm\"", "is not supported yet: must be \"q35\"");
    let others = "is not supported: set \"virtio-fs\", \"virtio-9p\" or \"none\"";
    value(qemu, "shared_fs = \"virtio-fs-nydus\"", others);
    let all = "must be \"auto\" or \"virtio-fs\" or \"virtio-9p\" or \"none\"";
    value(qemu, "shared_fs = \"nfs\"", all);
    value(qemu, "msize_9p = 1024", "must be a whole number from 4096 to 512000");
    value(qemu, "virtio_fs_cache = \"none\"", "must be \"never\" or \"metadata\" or \"auto\" or \"always\"");
    value(qemu, "virtio_fs_queue_size = 1000", "must be a power of two from 2 to 1024");
    value(qemu, "virtio_fs_queue_size = 2048", "must be a power of two from 2 to 1024");
    value(qemu, "virtio_fs_extra_args = \"-d\"", "must be a list of strings");
    let error = refused("hypervisor.qemu.virtio_fs_extra_args = [\"a\\u0000b\"]");
    assert!(error.ends_with(" = [\"a\\0b\"]: must be strings of one line of at most 2048 bytes"), "{error}");
    value(qemu, "tcg_tb_size = -1", "must be a whole number from 0 to 1024");
    value(qemu, "enable_debug = \"yes\"", "must be true or false");
    value(qemu, "default_maxvcpus = -1", "must be a whole number from 0 to 4294967295");
    value("agent.kata", "agent_channel = \"virtio\"", "must be \"auto\" or \"serial\" or \"vsock\"");
    value("agent.kata", "dial_timeout = 0", "must be a whole number from 1 to 3600");
    value("runtime", "create_container_timeout = 1.5", "must be a whole number from 1 to 86400");
    value("runtime", "disable_guest_seccomp = 1", "must be true or false");
}

#[test]
fn a_guest_boots_one_thing() {
    let both = "[hypervisor.qemu]\ninitrd = \"/a\"\nimage = \"/b\"\n";
    let why = "a guest boots an image or an initrd, and `initrd` is set too: remove one of them";
    assert_eq!(refused(both), format!("/etc/c.toml:3: hypervisor.qemu.image = \"/b\": {why}"));
    let root = |text: &str| {
        let hypervisor = Config::parse(text, Path::new("/c.toml")).expect("right").hypervisor;
        (hypervisor.initrd.is_some(), hypervisor.image)
    };
    assert_eq!(root(""), (true, None));
    assert_eq!(root("[hypervisor.qemu]\nimage = \"\"\n"), (true, None));
    assert_eq!(root("[hypervisor.qemu]\nimage = \"/b\"\n"), (false, Some("/b".into())));
    assert_eq!(root("[hypervisor.qemu]\ninitrd = \"\"\nimage = \"/b\"\n"), (false, Some("/b".into())));
    let is_memory = |setting: &str| {
        let text = format!("[hypervisor.qemu]\nimage = \"/b\"\n{setting}\n");
        Config::parse(&text, Path::new("/c.toml")).expect("right").hypervisor.image_is_memory
    };
    for setting in ["disable_image_nvdimm = false", "vm_rootfs_driver = \"virtio-pmem\""] {
        assert_eq!(root(&format!("[hypervisor.qemu]\n{setting}\n")), (true, None));
        assert!(is_memory(setting), "{setting}");
    }
    for setting in ["", "disable_image_nvdimm = true", "vm_rootfs_driver = \"virtio-blk-pci\""] {
        assert!(!is_memory(setting), "{setting}");
    }
    for (setting, why) in [
        ("vm_rootfs_driver = \"virtio-blk-mmio\"", "must be \"virtio-blk-pci\" or \"virtio-pmem\""),
        (
            "vm_rootfs_driver = \"virtio-blk-pci\"\ndisable_image_nvdimm = false",
            "disable_image_nvdimm = false says the opposite: remove one of them",
        ),
    ] {
        let error = refused(&format!("[hypervisor.qemu]\nimage = \"/b\"\n{setting}\n"));
        assert!(error.ends_with(why), "{error}");
    }
    let verity = format!("root_hash={},data_blocks=1,data_block_size=4096,hash_block_size=4096", "0".repeat(64));
    let error = refused(&format!("[hypervisor.qemu]\nkernel_verity_params = \"{verity}\"\n"));
    assert!(error.ends_with("works with `image` only, which is not set: set it too, or remove this key"), "{error}");
}

#[test]
fn templates_are_of_an_initrd() {
    let template = "[factory]\nenable_template = true\n[hypervisor.qemu]\n";
    let error = refused(&format!("{template}image = \"/b\"\n"));
    assert!(error.ends_with("set `initrd` instead, or enable_template to false"), "{error}");
}

#[test]
fn what_a_pool_cannot_have() {
    let pool = "[factory]\nvm_cache_number = 2\n";
    for (setting, why) in [
        ("[hypervisor.qemu]\nimage = \"/b\"", "set `initrd` instead of `image`, or this to 0"),
        ("[hypervisor.qemu]\nshared_fs = \"none\"", "set `shared_fs` to \"virtio-fs\" or \"auto\", or this to 0"),
        ("[agent.kata]\nagent_channel = \"vsock\"", "enable_template to false and vm_cache_number to 0"),
    ] {
        let error = refused(&format!("{pool}{setting}\n"));
        assert!(error.ends_with(why), "{error}");
    }
    for setting in ["vm_cache_number = 257", "vm_cache_number = -1", "vm_cache_endpoint = \"a\""] {
        let error = refused(&format!("[factory]\n{setting}\n"));
        assert!(error.contains("must be"), "{error}");
    }
}

#[test]
fn disks_as_memory_have_no_cache_of_their_own() {
    let qemu = "hypervisor.qemu";
    let ways = "is not supported: must be \"virtio-blk\" or \"virtio-scsi\" or \"virtio-pmem\"";
    value(qemu, "block_device_driver = \"virtio-mmio\"", ways);
    let other = "is not supported: persistent memory is a PCI device here, not an ACPI one: set \"virtio-pmem\", which the \
                 guest has as /dev/pmem0 too";
    value(qemu, "block_device_driver = \"nvdimm\"", other);
    let pmem = "[hypervisor.qemu]\nblock_device_driver = \"virtio-pmem\"\nblock_device_cache_set = true\n";
    let why = "cannot be combined with block_device_driver = \"virtio-pmem\"";
    for setting in
        ["cache_direct = true", "cache_noflush = true", "logical_sector_size = 512", "physical_sector_size = 4096"]
    {
        let error = refused(&format!("{pmem}block_device_{setting}\n"));
        assert!(error.contains(why), "{error}");
    }
    Config::parse(pmem, Path::new("/c.toml")).expect("as it is by default");
}

#[test]
fn memory_that_cannot_be_says_what_the_host_has() {
    for setting in ["0", "127", "-1", "\"2G\"", "512.0", "16777217"] {
        let error = refused(&format!("[hypervisor.qemu]\ndefault_memory = {setting}\n"));
        let shown = setting.strip_suffix(".0").unwrap_or(setting);
        let start =
            format!("/etc/c.toml:2: hypervisor.qemu.default_memory = {shown}: must be a whole number from 128 to ");
        assert!(error.starts_with(&start) && error.ends_with(", MiB (this host's memory)"), "{error}");
    }
}

#[test]
fn processors_that_cannot_be() {
    for setting in ["\"1\"", "nan", "inf", "true", "[]"] {
        let error = refused(&format!("hypervisor.qemu.default_vcpus = {setting}"));
        assert!(error.contains(": must be a number of processors: 1 to "), "{error}");
    }
}

#[test]
fn what_is_not_supported_yet_is_never_ignored() {
    let qemu = "hypervisor.qemu";
    value(qemu, "enable_hugepages = true", "is not supported yet: remove it or set it to false");
    value(qemu, "hot_plug_vfio = \"root-port\"", "is not supported yet: remove it or set it to \"no-port\"");
    let window = "a DAX window of virtio-fs is supported by no release of QEMU: set it to 0";
    value(qemu, "virtio_fs_cache_size = 1024", window);
    let hidden = "is not supported: hide the feature by cpu_features instead, for example \"vmx=off,svm=off\", and remove \
                  this key";
    value(qemu, "disable_nested_virtualization = true", hidden);
    value("agent.kata", "kernel_modules = [\"e1000e\"]", "is not supported yet: remove it or set it to []");
    value("agent.kata.mem_agent", "mem_agent_enable = true", "is not supported yet: remove it or set it to false");
    value("runtime", "internetworking_model = \"l3forwarding\"", "must be \"tcfilter\" or \"macvtap\" or \"none\"");
    let alone = "works with internetworking_model = \"none\" only: set that too, or remove this key";
    value("runtime", "disable_new_netns = true", alone);
    value("hypervisor.clh", "path = \"/c\"", "this hypervisor is not supported yet: use [hypervisor.qemu]");
    let error = refused("[hypervisor.firecracker]\n");
    assert_eq!(
        error,
        "/etc/c.toml:1: hypervisor.firecracker = (a table): this hypervisor is not supported yet: use [hypervisor.qemu]"
    );
    value("runtime", "hypervisor_name = \"clh\"", "is not supported yet: remove it or set it to \"qemu\"");
}

#[test]
fn tables_and_keys_are_not_confused() {
    assert_eq!(refused("runtime = 3"), "/etc/c.toml:1: runtime = 3: must be a table");
    assert_eq!(refused("[hypervisor]\nqemu = \"x\""), "/etc/c.toml:2: hypervisor.qemu = \"x\": must be a table");
    assert_eq!(
        refused("[hypervisor.qemu.kernel]\npath = \"/k\""),
        "/etc/c.toml:2: hypervisor.qemu.kernel.path = \"/k\": `hypervisor.qemu.kernel` is a key, not a table: set it in \
         one line"
    );
    assert_eq!(
        refused("hypervisor.qemu.kernel = {}"),
        "/etc/c.toml:1: hypervisor.qemu.kernel = (a table): must be a string"
    );
}

#[test]
fn broken_toml_has_its_line() {
    for (text, line) in [
        ("[hypervisor.qemu\n", 1),
        ("\n\nkernel = \n", 3),
        ("a = 1\na = 2\n", 2),
        ("[runtime]\n[runtime]\n", 2),
        ("x = \"no end\n", 1),
        ("a = 1\nb c = 2\n", 2),
        ("a = \"\"\"\nnever\nends", 3),
        ("\n= 3", 2),
    ] {
        let error = refused(text);
        assert!(error.starts_with(&format!("/etc/c.toml:{line}: not TOML: ")), "{text:?}: {error}");
        assert!(!error.contains('\n'), "{error:?}");
    }
}

#[test]
fn one_line_whatever_the_names_hold() {
    let error = Config::parse("\"a\\nb\" = [1", Path::new("/x\ny.toml")).expect_err("broken").to_string();
    assert!(error.starts_with("/x\\ny.toml:1: ") && !error.contains('\n'), "{error:?}");
    let error = refused("[hypervisor.\"q\\nx\"]\nk = \"a\\nb\"");
    assert!(!error.contains('\n'), "{error:?}");
    let warned = Config::parse("\"a\\nb\" = 1", Path::new("/x\ny.toml")).expect("is TOML").warnings;
    assert_eq!(warned, ["/x\\ny.toml:1: unknown key `\"a\\nb\"`"]);
}

#[test]
fn long_values_are_cut() {
    let error = refused(&format!("hypervisor.qemu.kernel = \"{}\"", "x".repeat(100_000)));
    assert!(error.len() < 400, "{}", error.len());
}

#[test]
fn depth_is_no_danger() {
    for text in [
        format!("a = {}{}", "[".repeat(100_000), "]".repeat(100_000)),
        format!("a = {}1{}", "{b=".repeat(50_000), "}".repeat(50_000)),
        format!("{}a = 1", "a.".repeat(100_000)),
        format!("[{}a]\nb = 1", "a.".repeat(100_000)),
    ] {
        // what it says is the parser's affair: it comes back
        let _ = Config::parse(&text, Path::new("/c.toml"));
    }
}
