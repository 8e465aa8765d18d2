//! Files as the two runtimes of Kata read them.

use std::path::Path;
use std::time::Duration;

use config::{Config, FsCache};

fn parse(text: &str) -> Config {
    Config::parse(text, Path::new("/c.toml")).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(text: &str) -> String {
    Config::parse(text, Path::new("/c.toml")).expect_err("refused").to_string()
}

#[test]
fn the_go_runtimes_file() {
    let config = parse(include_str!("data/go.toml"));
    assert_eq!(config.warnings, Vec::<String>::new());
    // what it asks for at Kata's own defaults and does not get
    let notices = config.notices.iter().map(|notice| notice.split_once(" has no effect: ").expect("why").0);
    assert_eq!(
        notices.collect::<Vec<_>>(),
        [
            "/c.toml:11: hypervisor.qemu.enable_annotations = [\"enable_iommu\", \"kernel_params\", \
             \"kernel_verity_params\"]",
            "/c.toml:102: runtime.static_sandbox_resource_mgmt = false",
        ]
    );
    let vm = &config.hypervisor;
    assert_eq!(vm.kernel, Path::new("/opt/kata/share/kata-containers/vmlinuz.container"));
    assert_eq!(vm.initrd.as_deref(), Some(Path::new("/opt/kata/share/kata-containers/kata-containers-initrd.img")));
    assert_eq!(vm.kernel_params, "cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1");
    assert_eq!((config.qemu.cpu_features.as_str(), vm.firmware.as_deref()), ("pmu=off", None));
    assert_eq!((vm.default_vcpus, vm.default_memory_mib), (1, 256));
    assert!(vm.default_maxvcpus >= 1 && vm.default_maxmemory_mib >= 256);
    assert_eq!(vm.virtio_fs_daemon.as_deref(), Some(Path::new("/usr/libexec/virtiofsd")));
    assert_eq!(vm.virtio_fs_cache, FsCache::Always);
    assert_eq!(vm.virtio_fs_extra_args, ["--thread-pool-size=1"]);
    assert_eq!(config.qemu.seccomp_sandbox, "on,obsolete=deny");
    assert!(vm.enable_debug && config.agent.enable_debug && config.runtime.enable_debug);
    assert_eq!(config.agent.dial_timeout, Duration::from_secs(30));
    assert!(config.runtime.disable_guest_seccomp);
    assert_eq!(config.runtime.create_container_timeout, Duration::from_secs(90));
}

#[test]
fn the_rust_runtimes_file() {
    let config = parse(include_str!("data/rs.toml"));
    assert_eq!(config.warnings, Vec::<String>::new());
    let sizes = ["overhead_memory", "overhead_vcpus", "queue_size"];
    for (notice, key) in config.notices.iter().zip(sizes) {
        assert!(notice.contains(&format!(": hypervisor.qemu.{key} = ")), "{notice}");
    }
    assert_eq!(config.notices.len(), sizes.len(), "{:?}", config.notices);
    let vm = &config.hypervisor;
    assert_eq!(vm.kernel, Path::new("/opt/kata/share/kata-containers/vmlinux.container"));
    assert_eq!((vm.default_vcpus, vm.default_memory_mib), (1, 512));
    assert_eq!(vm.virtio_fs_cache, FsCache::Metadata);
    assert_eq!(vm.virtio_fs_extra_args, ["--thread-pool-size=1"]);
    assert_eq!(config.qemu.seccomp_sandbox, "on");
    assert_eq!(config.agent.dial_timeout, Duration::from_secs(3));
    assert_eq!(config.runtime.create_container_timeout, Duration::from_secs(30));
    assert!(!config.runtime.disable_guest_seccomp);
}

#[test]
fn of_both_names_the_go_runtimes_counts() {
    let config = parse(
        "[agent.kata]\ndial_timeout = 7\nreconnect_timeout_ms = 3000\ncreate_container_timeout = 30\n[runtime]\ncreate_container_timeout = 8\n",
    );
    assert_eq!(config.agent.dial_timeout, Duration::from_secs(7));
    assert_eq!(config.runtime.create_container_timeout, Duration::from_secs(8));
    let config = parse("[hypervisor.qemu]\nseccompsandbox = \"go\"\nseccomp_sandbox = \"rs\"\n");
    assert_eq!(config.qemu.seccomp_sandbox, "go");
}

#[test]
fn an_empty_file_is_the_defaults_within_the_host() {
    let config = parse("");
    assert_eq!(config.hypervisor.default_memory_mib, 512);
    assert_eq!(config.hypervisor.virtio_fs_cache, FsCache::Auto);
    assert_eq!(config.agent.dial_timeout, Duration::from_secs(45));
    assert_eq!(config.agent.request_timeout, Duration::from_secs(60));
    assert!(!config.runtime.disable_guest_seccomp);
    assert_eq!(parse("[hypervisor.qemu]\n[agent.kata]\n[runtime]\n[factory]\n[agent]\n"), config);
}

#[test]
fn processors_are_bounded_by_the_host() {
    let host = parse("").hypervisor.default_maxvcpus;
    let of = |value: &str| parse(&format!("hypervisor.qemu.default_vcpus = {value}")).hypervisor.default_vcpus;
    assert_eq!((of("0"), of("0.2"), of("1")), (1, 1, 1));
    assert_eq!((of("-1"), of("100000"), of("1e300"), of("9223372036854775807")), (host, host, host, host));
    let most = |value: &str| parse(&format!("hypervisor.qemu.default_maxvcpus = {value}")).hypervisor.default_maxvcpus;
    assert_eq!((most("0"), most("100000"), most("1")), (host, host, 1));
}

#[test]
fn a_limit_below_the_start_is_refused() {
    let text = "[hypervisor.qemu]\ndefault_memory = 512\ndefault_maxmemory = 256\n";
    assert_eq!(
        refused(text),
        "/c.toml:3: hypervisor.qemu.default_maxmemory = 256: must be 0 or at least default_memory, which is 512 MiB"
    );
}

#[test]
fn unknown_keys_are_warned_of_with_the_nearest() {
    let config = parse("[hypervisor.qemu]\nkernal = \"/k\"\n\n[runtime]\nenable_debig = true\nabsolutely_else = 1\n");
    let mut warnings = config.warnings;
    warnings.sort();
    assert_eq!(
        warnings,
        [
            "/c.toml:2: unknown key `hypervisor.qemu.kernal`; did you mean `hypervisor.qemu.kernel`?",
            "/c.toml:5: unknown key `runtime.enable_debig`; did you mean `runtime.enable_debug`?",
            "/c.toml:6: unknown key `runtime.absolutely_else`",
        ]
    );
}

#[test]
fn many_unknown_keys_are_one_warning() {
    let lines: Vec<_> = (0..50_000).map(|number| format!("k{number}=1")).collect();
    let warnings = parse(&lines.join("\n")).warnings;
    assert_eq!(warnings.len(), 33);
    assert_eq!(warnings[32], "/c.toml: more unknown keys");
}

#[test]
fn keys_of_other_versions_are_no_mistake() {
    let config = parse(
        "[netmon]\nenable_netmon = false\npath = \"/n\"\n[image]\nservice_offload = false\n[hypervisor.qemu]\nenable_swap = false\nhotplug_vfio_on_root_bus = false\n",
    );
    assert_eq!(config.warnings, Vec::<String>::new());
}
