//! Files on a real disk: which are read, and what the host has to say to them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use config::{Config, FileSystem};
use tempfile::TempDir;

/// A folder with all that a configuration names.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for (name, text) in [("qemu", "not empty"), ("kernel", "\x7fELF"), ("initrd", "not empty")] {
            fs::write(dir.path().join(name), text).expect("a file");
        }
        fs::set_permissions(dir.path().join("qemu"), fs::Permissions::from_mode(0o755)).expect("its mode");
        Self { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file; its first four lines name what is needed.
    fn write(&self, more: &str) -> PathBuf {
        let (at, file) = (|name| self.at(name).display().to_string(), self.at("configuration.toml"));
        let text = format!(
            "[hypervisor.qemu]\npath = \"{}\"\nkernel = \"{}\"\ninitrd = \"{}\"\n{more}",
            at("qemu"),
            at("kernel"),
            at("initrd")
        );
        fs::write(&file, text).expect("the file");
        file
    }

    fn load(&self, more: &str) -> Result<Config, String> {
        Config::load(Some(&self.write(more))).map_err(|error| {
            let error = error.to_string();
            assert!(!error.contains('\n'), "{error:?}");
            error.replace(&self.dir.path().display().to_string(), "DIR")
        })
    }

    fn refused(&self, more: &str) -> String {
        self.load(more).expect_err("refused")
    }
}

#[test]
fn a_whole_one() {
    let host = Host::new();
    let config = host.load("").expect("is whole");
    assert_eq!(config.source, host.at("configuration.toml"));
    assert_eq!(config.hypervisor.path, host.at("qemu"));
}

#[test]
fn drop_ins_win_in_alphabetical_order_key_by_key() {
    let host = Host::new();
    fs::create_dir(host.at("config.d")).expect("config.d");
    let drop_in = |name: &str, text: &str| fs::write(host.at("config.d").join(name), text).expect("a drop-in");
    drop_in("20-b.toml", "[hypervisor.qemu]\nkernel_params = \"two\"\n[agent.kata]\nreconnect_timeout_ms = 9000\n");
    drop_in("10-a.toml", "[hypervisor.qemu]\nkernel_params = \"one\"\ntcg_tb_size = 64\n");
    drop_in("30-c.conf", "not read");
    drop_in(".40-d.toml", "not read");
    let config =
        host.load("kernel_params = \"base\"\ncpu_features = \"x\"\n[agent.kata]\ndial_timeout = 5\n").expect("loads");
    assert_eq!(config.hypervisor.kernel_params, "two");
    assert_eq!(config.qemu.tcg_tb_size_mib, 64);
    assert_eq!(config.qemu.cpu_features, "x");
    // a later file wins under the key's other name too
    assert_eq!(config.agent.dial_timeout.as_secs(), 9);
    drop_in("50-e.toml", "\n\n[hypervisor.qemu]\ndefault_memory = 0\n");
    let error = host.refused("");
    assert!(error.starts_with("DIR/config.d/50-e.toml:4: hypervisor.qemu.default_memory = 0: must be "), "{error}");
}

#[test]
fn a_file_that_is_missing_or_of_the_wrong_kind() {
    let host = Host::new();
    fs::create_dir(host.at("folder")).expect("a folder");
    fs::write(host.at("empty"), "").expect("an empty file");
    let with = |name: &str, file: &str| {
        let line = format!("{name} = \"{}\"", host.at(file).display());
        fs::create_dir_all(host.at("config.d")).expect("config.d");
        fs::write(host.at("config.d/1.toml"), format!("[hypervisor.qemu]\n{line}\n")).expect("a drop-in");
        let error = host.refused("");
        let (place, rest) = error.split_once(&format!(" = \"DIR/{file}\": ")).expect("key and value");
        assert_eq!(place, format!("DIR/config.d/1.toml:2: hypervisor.qemu.{name}"));
        rest.to_owned()
    };
    assert_eq!(with("kernel", "gone"), "no such file: run `make install`, or set another path");
    assert_eq!(with("kernel", "folder"), "is a directory: set the path of a file");
    assert_eq!(with("kernel", "empty"), "is empty: run `make install`, or set another path");
    assert_eq!(with("kernel", "initrd"), "is not a kernel (ELF or bzImage): run `make install`, or set another path");
    fs::write(host.at("bzImage"), [&[0; 0x202], b"HdrS".as_slice(), &[0; 99]].concat()).expect("a kernel");
    fs::write(host.at("config.d/1.toml"), format!("hypervisor.qemu.kernel = {:?}\n", host.at("bzImage")))
        .expect("a drop-in");
    assert!(host.load("").is_ok());
    assert_eq!(with("initrd", "gone"), "no such file: run `make install`, or set another path");
    assert_eq!(with("initrd", "folder"), "is a directory: set the path of a file");
    assert_eq!(with("path", "gone"), "no such file: install qemu-system-x86, or set another path");
    assert_eq!(with("path", "kernel"), "is not a program: install qemu-system-x86, or make it executable");
    assert_eq!(
        with("virtio_fs_daemon", "gone"),
        "no such file: install virtiofsd or qemu-system-common, or set another path"
    );
    assert_eq!(with("firmware", "folder"), "is a directory: set the path of a file");
    assert_eq!(with("entropy_source", "gone"), "no such file: remove the key to use /dev/urandom, or set another path");
}

#[test]
fn a_device_is_no_kernel() {
    let host = Host::new();
    fs::remove_file(host.at("kernel")).expect("removed");
    std::os::unix::fs::symlink("/dev/null", host.at("kernel")).expect("a link");
    assert!(host.refused("").ends_with("kernel\": is not a regular file: set the path of a file"));
}

#[test]
fn a_default_that_is_missing_names_no_line() {
    let host = Host::new();
    let file = host.at("configuration.toml");
    fs::write(&file, format!("[hypervisor.qemu]\npath = \"{}\"\nkernel = \"/\"\n", host.at("qemu").display()))
        .expect("written");
    let error = Config::load(Some(&file)).expect_err("a folder").to_string();
    assert!(
        error.ends_with("configuration.toml:3: hypervisor.qemu.kernel = \"/\": is a directory: set the path of a file")
    );
    fs::write(&file, "[hypervisor.qemu]\nentropy_source = \"\"\n").expect("written");
    // where the defaults are installed there is nothing to see
    if let Err(error) = Config::load(Some(&file)) {
        let error = error.to_string();
        assert!(
            error.contains("configuration.toml: hypervisor.qemu.") && error.contains(" (the default): "),
            "{error}"
        );
    }
}

#[test]
fn memory_beyond_the_host_and_an_initrd_beyond_the_memory() {
    let host = Host::new();
    let error = host.refused("default_memory = 1048576\n");
    let start =
        "DIR/configuration.toml:5: hypervisor.qemu.default_memory = 1048576: must be a whole number from 128 to ";
    assert!(error.starts_with(start) && error.ends_with(", MiB (this host's memory)"), "{error}");
    let initrd = fs::File::create(host.at("initrd")).expect("an initrd");
    // no byte of it is on the disk
    initrd.set_len(128 << 20).expect("its length");
    assert_eq!(
        host.refused("default_memory = 128\n"),
        "DIR/configuration.toml:4: hypervisor.qemu.initrd = \"DIR/initrd\": has 128 MiB, which must be less than \
         default_memory, 128 MiB"
    );
    assert!(host.load("default_memory = 129\n").is_ok());
}

/// Kata's own file says ext4, whatever the image is.
#[test]
fn the_image_says_which_file_system_it_has() {
    const START: usize = 1 << 20;
    let host = Host::new();
    let write = |magic: &[u8]| {
        let mut disk = vec![0; 2 << 20];
        disk[450] = 0x83;
        disk[454..458].copy_from_slice(&(START as u32 / 512).to_le_bytes());
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[START + 1024..][..magic.len()].copy_from_slice(magic);
        fs::write(host.at("image"), disk).expect("an image");
    };
    let load = |more: &str| {
        let text = format!("initrd = \"\"\nimage = \"{}\"\n{more}", host.at("image").display());
        fs::create_dir_all(host.at("config.d")).expect("config.d");
        fs::write(host.at("config.d/1.toml"), format!("[hypervisor.qemu]\n{text}")).expect("a drop-in");
        host.load("")
    };
    write(&[0xe2, 0xe1, 0xf5, 0xe0]);
    let config = load("rootfs_type = \"ext4\"\ndisable_image_nvdimm = false\n").expect("an image of erofs");
    assert_eq!(config.hypervisor.rootfs_type, FileSystem::Erofs);
    let told = config.notices[0].replace(&host.dir.path().display().to_string(), "DIR");
    assert_eq!(
        told,
        "hypervisor.qemu.rootfs_type = \"ext4\": the file system of DIR/image is erofs, which is used instead"
    );
    assert_eq!(config.warnings, Vec::<String>::new());
    let config = load("rootfs_type = \"erofs\"\n").expect("as it says");
    assert_eq!((config.hypervisor.rootfs_type, config.notices.len()), (FileSystem::Erofs, 0));
    write(b"something");
    let why = "DIR/config.d/1.toml:4: hypervisor.qemu.rootfs_type = \"xfs\": the first partition of DIR/image has neither \
               erofs nor ext4 nor xfs: set `image` to a guest image";
    assert_eq!(load("rootfs_type = \"xfs\"\n").map(drop), Err(why.to_owned()));
    // a changed image with a root hash is the guest's kernel's to find
    let hash = "0".repeat(64);
    let verity = format!("root_hash={hash},data_blocks=1,data_block_size=4096,hash_block_size=4096");
    load(&format!("kernel_verity_params = \"{verity}\"\n")).expect("the guest decides");
}

#[test]
fn files_that_are_no_configuration() {
    let host = Host::new();
    let file = host.at("c.toml");
    let error = |file: &Path| {
        let error = Config::load(Some(file)).expect_err("refused").to_string();
        assert!(!error.contains('\n'), "{error:?}");
        error.replace(&host.dir.path().display().to_string(), "DIR")
    };
    assert_eq!(
        error(&file),
        "DIR/c.toml: no such file: correct --config, KATA_CONF_FILE, or ConfigPath in the runtime's options"
    );
    assert_eq!(error(host.dir.path()), "DIR: is not a regular file: name a configuration.toml");
    fs::write(&file, b"a = 1\nb = \"\xff\"\n").expect("written");
    assert_eq!(error(&file), "DIR/c.toml:2: is not UTF-8 text");
    fs::write(&file, "#".repeat((1 << 20) + 1)).expect("written");
    assert_eq!(error(&file), "DIR/c.toml: is larger than 1048576 bytes: shorten it");
    fs::write(&file, "[runtime\n").expect("written");
    assert!(error(&file).starts_with("DIR/c.toml:1: not TOML: "));
    // the largest that is read
    fs::write(&file, format!("[agent.kata]\ndial_timeout = 0\n{}", "#".repeat((1 << 20) - 30))).expect("written");
    assert!(error(&file).starts_with("DIR/c.toml:2: agent.kata.dial_timeout = 0: "));
}

#[test]
fn search_paths_in_order() {
    let paths = Config::search_paths();
    let place = |wanted: &str| paths.iter().position(|path| path == Path::new(wanted)).expect(wanted);
    let etc = place("/etc/kata-containers/configuration.toml");
    let usr = place("/usr/share/defaults/kata-containers/configuration.toml");
    let opt = place("/opt/kata/share/defaults/kata-containers/configuration.toml");
    assert!(etc < usr && usr < opt);
    // beside the program: …/debug/deps/x → …/debug/share/defaults
    let exe = std::env::current_exe().expect("this program");
    let prefix = exe.parent().and_then(Path::parent).expect("its prefix");
    let own = prefix.join("share/defaults/kata-containers/configuration.toml");
    assert_eq!(paths[etc + 1], own);
}
