//! Kata's keys that do nothing here yet: fine at Kata's own defaults, refused otherwise, so that no setting is ignored in
//! silence. What nobody knows is a warning with the nearest known key.

use crate::file::{Entry, Value};
use crate::keys::{self, refuse};
use crate::{Error, OneLine};

/// A key and the values that change nothing. Numbers and truths are written as in TOML.
type Row = (&'static str, &'static [&'static str]);

/// More than that are not listed: the file is then no configuration.toml.
const MOST_WARNINGS: usize = 32;

/// `*` accepts anything: what the key steers does not exist here, so every value means the same.
const ROWS: &[Row] = &[
    ("hypervisor.qemu.enable_annotations", &["*"]),
    ("hypervisor.qemu.valid_hypervisor_paths", &["*"]),
    ("hypervisor.qemu.valid_virtio_fs_daemon_paths", &["*"]),
    ("hypervisor.qemu.valid_entropy_sources", &["*"]),
    ("hypervisor.qemu.valid_vhost_user_store_paths", &["*"]),
    ("hypervisor.qemu.machine_accelerators", &["\"\""]),
    ("hypervisor.qemu.rootless", &["false"]),
    ("hypervisor.qemu.firmware_volume", &["\"\""]),
    ("hypervisor.qemu.pflashes", &["[]"]),
    ("hypervisor.qemu.default_bridges", &["*"]),
    ("hypervisor.qemu.memory_slots", &["*"]),
    ("hypervisor.qemu.memory_offset", &["0"]),
    ("hypervisor.qemu.enable_virtio_mem", &["false"]),
    ("hypervisor.qemu.enable_mem_prealloc", &["false"]),
    ("hypervisor.qemu.enable_hugepages", &["false"]),
    ("hypervisor.qemu.enable_numa", &["false"]),
    ("hypervisor.qemu.numa_mapping", &["[]"]),
    ("hypervisor.qemu.enable_guest_swap", &["false"]),
    ("hypervisor.qemu.enable_iothreads", &["false"]),
    ("hypervisor.qemu.indep_iothreads", &["0"]),
    ("hypervisor.qemu.enable_vhost_user_store", &["false"]),
    ("hypervisor.qemu.vhost_user_store_path", &["*"]),
    ("hypervisor.qemu.vhost_user_reconnect_timeout_sec", &["0"]),
    ("hypervisor.qemu.enable_iommu", &["false"]),
    ("hypervisor.qemu.enable_iommu_platform", &["false"]),
    ("hypervisor.qemu.hot_plug_vfio", &["\"no-port\""]),
    ("hypervisor.qemu.cold_plug_vfio", &["\"no-port\""]),
    ("hypervisor.qemu.pcie_root_port", &["0"]),
    ("hypervisor.qemu.pcie_switch_port", &["0"]),
    ("hypervisor.qemu.rx_rate_limiter_max_rate", &["0"]),
    ("hypervisor.qemu.tx_rate_limiter_max_rate", &["0"]),
    ("hypervisor.qemu.guest_hook_path", &["\"\""]),
    ("hypervisor.qemu.guest_memory_dump_path", &["\"\""]),
    ("hypervisor.qemu.guest_memory_dump_paging", &["false"]),
    ("hypervisor.qemu.disable_selinux", &["*"]),
    ("hypervisor.qemu.disable_guest_selinux", &["true"]),
    ("hypervisor.qemu.extra_monitor_socket", &["\"\""]),
    ("hypervisor.qemu.disable_nesting_checks", &["*"]),
    ("hypervisor.qemu.use_legacy_serial", &["*"]),
    ("hypervisor.qemu.confidential_guest", &["false"]),
    ("hypervisor.qemu.sev_snp_guest", &["false"]),
    ("hypervisor.qemu.snp_id_block", &["\"\""]),
    ("hypervisor.qemu.snp_id_auth", &["\"\""]),
    ("hypervisor.qemu.snp_guest_policy", &["*"]),
    ("hypervisor.qemu.measurement_algo", &["*"]),
    ("hypervisor.qemu.tdx_quote_generation_service_socket_port", &["*"]),
    ("hypervisor.qemu.guest_extension_images", &["[]"]),
    // of 2.x
    ("hypervisor.qemu.enable_swap", &["false"]),
    ("hypervisor.qemu.file_mem_backend", &["\"\""]),
    ("hypervisor.qemu.valid_file_mem_backends", &["*"]),
    ("hypervisor.qemu.hotplug_vfio_on_root_bus", &["false"]),
    ("agent.kata.trace_mode", &["*"]),
    ("agent.kata.trace_type", &["*"]),
    ("netmon.enable_netmon", &["false"]),
    ("netmon.path", &["*"]),
    ("netmon.enable_debug", &["*"]),
    ("image.service_offload", &["false"]),
    ("image.provision", &["*"]),
    ("runtime.EnablePprof", &["false"]),
    // the Rust runtime's
    ("hypervisor.qemu.rootless_user", &["\"\""]),
    ("hypervisor.qemu.boot_to_be_template", &["false"]),
    ("hypervisor.qemu.boot_from_template", &["false"]),
    ("hypervisor.qemu.memory_path", &["\"\""]),
    ("hypervisor.qemu.device_state_path", &["\"\""]),
    ("hypervisor.qemu.prefetch_list_path", &["\"\""]),
    ("hypervisor.qemu.initdata", &["\"\""]),
    ("hypervisor.qemu.disk_rate_limiter_bw_max_rate", &["0"]),
    ("hypervisor.qemu.disk_rate_limiter_bw_one_time_burst", &["0"]),
    ("hypervisor.qemu.disk_rate_limiter_ops_max_rate", &["0"]),
    ("hypervisor.qemu.disk_rate_limiter_ops_one_time_burst", &["0"]),
    ("hypervisor.qemu.net_rate_limiter_bw_max_rate", &["0"]),
    ("hypervisor.qemu.net_rate_limiter_bw_one_time_burst", &["0"]),
    ("hypervisor.qemu.net_rate_limiter_ops_max_rate", &["0"]),
    ("hypervisor.qemu.net_rate_limiter_ops_one_time_burst", &["0"]),
    ("hypervisor.qemu.overhead_vcpus", &["*"]),
    ("hypervisor.qemu.overhead_memory", &["*"]),
    ("hypervisor.qemu.queue_size", &["*"]),
    ("hypervisor.qemu.num_queues", &["1"]),
    ("hypervisor.qemu.hugepage_type", &["*"]),
    ("hypervisor.qemu.selinux_label", &["\"\""]),
    ("hypervisor.qemu.log_level", &["*"]),
    ("hypervisor.qemu.ctlpath", &["\"\""]),
    ("hypervisor.qemu.valid_ctlpaths", &["[]"]),
    ("hypervisor.qemu.guest_swap_path", &["*"]),
    ("hypervisor.qemu.guest_swap_size_percent", &["*"]),
    ("hypervisor.qemu.guest_swap_create_threshold_secs", &["*"]),
    ("hypervisor.qemu.disable_nested_virtualization", &["*"]),
    ("agent.kata.enable_tracing", &["false"]),
    ("agent.kata.kernel_modules", &["[]"]),
    ("agent.kata.debug_console_enabled", &["false"]),
    ("agent.kata.cdh_api_timeout", &["*"]),
    ("agent.kata.cdh_api_timeout_ms", &["*"]),
    ("agent.kata.container_pipe_size", &["0"]),
    ("agent.kata.server_port", &["1024"]),
    ("agent.kata.log_port", &["1025"]),
    ("agent.kata.health_check_request_timeout_ms", &["*"]),
    ("agent.kata.log_level", &["*"]),
    ("agent.kata.policy", &["\"\""]),
    ("agent.kata.launch_process_timeout", &["*"]),
    ("agent.kata.visible_cdi_devices", &["false"]),
    ("runtime.enable_vcpus_pinning", &["false"]),
    ("runtime.guest_selinux_label", &["\"\""]),
    ("runtime.enable_tracing", &["false"]),
    ("runtime.jaeger_endpoint", &["*"]),
    ("runtime.jaeger_user", &["*"]),
    ("runtime.jaeger_password", &["*"]),
    ("runtime.static_sandbox_resource_mgmt", &["true", "false"]),
    ("runtime.sandbox_bind_mounts", &["[]"]),
    ("runtime.vfio_mode", &["*"]),
    ("runtime.emptydir_mode", &["\"shared-fs\""]),
    ("runtime.experimental", &["[]"]),
    ("runtime.experimental_force_guest_pull", &["false"]),
    ("runtime.enable_pprof", &["false"]),
    ("runtime.dan_conf", &["*"]),
    ("runtime.kubelet_root_dir", &["*"]),
    ("runtime.pod_resource_api_sock", &["\"\""]),
    ("runtime.name", &["\"virt_container\""]),
    ("runtime.hypervisor_name", &["\"qemu\""]),
    ("runtime.agent_name", &["\"kata\""]),
    ("runtime.log_level", &["*"]),
    ("runtime.keep_abnormal", &["false"]),
    ("runtime.use_passfd_io", &["false"]),
    ("runtime.passfd_listener_port", &["*"]),
    ("runtime.shared_mounts", &["[]"]),
];

/// A key that [`keys`] does not know.
pub(crate) fn other(entry: &Entry, warnings: &mut Vec<String>) -> Result<(), Error> {
    let key = entry.key.as_str();
    if let Some(name) = key.strip_prefix("hypervisor.").and_then(|rest| rest.split('.').next())
        && name != "qemu"
    {
        return Err(refuse(entry, "this hypervisor is not supported yet: use [hypervisor.qemu]"));
    }
    if key == "agent.kata.mem_agent" || key.starts_with("agent.kata.mem_agent.") {
        // the others steer what this one turns on
        return match (key.ends_with(".mem_agent_enable"), &entry.value) {
            (false, _) | (true, Value::Bool(false)) => Ok(()),
            (true, _) => Err(refuse(entry, "is not supported yet: remove it or set it to false")),
        };
    }
    if let Some((_, accepted)) = ROWS.iter().find(|(name, _)| *name == key) {
        let value = entry.value.to_string();
        if accepted.iter().any(|one| *one == "*" || *one == value) {
            return Ok(());
        }
        return Err(refuse(entry, format!("is not supported yet: remove it or set it to {}", accepted.join(" or "))));
    }
    let known = keys::SUPPORTED.iter().copied().chain(ROWS.iter().map(|(name, _)| *name));
    if known.clone().any(|name| within(name, key)) {
        // a table that is there and empty is no mistake
        return if entry.value == Value::Table { Ok(()) } else { Err(refuse(entry, "must be a table")) };
    }
    if let Some(name) = known.clone().find(|name| within(key, name)) {
        return Err(refuse(entry, format!("`{name}` is a key, not a table: set it in one line")));
    }
    if warnings.len() >= MOST_WARNINGS {
        if warnings.len() == MOST_WARNINGS {
            warnings.push(format!("{}: more keys that nobody knows", entry.file.display()));
        }
        return Ok(());
    }
    let near = |name: &str| 1 + name.len() / 5;
    // names of quite another length are further away than that
    let alike = known.filter(|name| name.len().abs_diff(key.chars().count()) <= near(name));
    let hint = match alike.map(|name| (distance(name, key), name)).min() {
        Some((far, name)) if far <= near(name) => format!("; did you mean `{name}`?"),
        _ => String::new(),
    };
    let shown: String = key.chars().take(200).collect();
    let warning = format!("{}:{}: nothing is called `{shown}`{hint}", entry.file.display(), entry.line);
    warnings.push(OneLine(warning).to_string());
    Ok(())
}

/// Whether `key` is in the table `table`.
fn within(key: &str, table: &str) -> bool {
    key.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'))
}

/// Levenshtein's.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(200).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_is_both_supported_and_not() {
        for (name, accepted) in ROWS {
            assert!(!keys::SUPPORTED.contains(name), "{name}");
            assert!(!accepted.is_empty(), "{name}");
            assert_eq!(ROWS.iter().filter(|(other, _)| other == name).count(), 1, "{name}");
        }
    }

    #[test]
    fn distances() {
        assert_eq!(distance("kernel", "kernel"), 0);
        assert_eq!(distance("kernel", "kernal"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
