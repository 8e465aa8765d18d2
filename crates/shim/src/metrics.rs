//! A container's figures as containerd's clients read them. The agent counts in cgroups of version 2 and tells Kata's
//! messages, which are version 1's; what those have no place for is in the memory's map of details.

use std::collections::BTreeMap;

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat, Metrics,
    PidsStat, Throttle,
};
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use runtime::agent_api::agent as api;

use crate::convert::{Rpc, any};

/// No limit of memory, as version 1 of cgroups shows it: the largest multiple of a page in a signed number.
const NO_LIMIT_V1: u64 = i64::MAX as u64 / 4096 * 4096;

/// The guest's numbers in the form that clients on this host expect: that of the host's own cgroup version.
///
/// Every message that runc's have is there, also where the guest has nothing to tell: clients look into them without
/// asking first (CRI-O ends when one is missing).
pub(crate) fn of(stats: &api::StatsContainerResponse, host_is_v2: bool) -> Rpc<Any> {
    let cgroup = &stats.cgroup_stats;
    if host_is_v2 { any(&version_2(cgroup)) } else { any(&version_1(cgroup)) }
}

fn version_1(stats: &api::CgroupStats) -> Metrics {
    Metrics {
        hugetlb: stats
            .hugetlb_stats
            .iter()
            .map(|(size, data)| HugetlbStat {
                usage: data.usage,
                max: data.max_usage,
                failcnt: data.failcnt,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        pids: MessageField::some(PidsStat {
            current: stats.pids_stats.current,
            limit: stats.pids_stats.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu_1(&stats.cpu_stats)),
        memory: MessageField::some(memory_1(&stats.memory_stats)),
        memory_oom_control: MessageField::some(MemoryOomControl {
            oom_kill: detail(&stats.memory_stats, "events.oom_kill"),
            ..Default::default()
        }),
        blkio: MessageField::some(BlkIOStat {
            io_service_bytes_recursive: blkio(&stats.blkio_stats.io_service_bytes_recursive),
            io_serviced_recursive: blkio(&stats.blkio_stats.io_serviced_recursive),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn detail(memory: &api::MemoryStats, name: &str) -> u64 {
    memory.stats.get(name).copied().unwrap_or_default()
}

fn cpu_1(cpu: &api::CpuStats) -> CPUStat {
    CPUStat {
        usage: MessageField::some(CPUUsage {
            total: cpu.cpu_usage.total_usage,
            kernel: cpu.cpu_usage.usage_in_kernelmode,
            user: cpu.cpu_usage.usage_in_usermode,
            per_cpu: cpu.cpu_usage.percpu_usage.clone(),
            ..Default::default()
        }),
        throttling: MessageField::some(Throttle {
            periods: cpu.throttling_data.periods,
            throttled_periods: cpu.throttling_data.throttled_periods,
            throttled_time: cpu.throttling_data.throttled_time,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Version 2 counts a whole tree, so both the own and the total numbers of version 1 are that. How many pages came in
/// and went out it does not tell.
fn memory_1(memory: &api::MemoryStats) -> MemoryStat {
    let detail = |name: &str| detail(memory, name);
    // what both versions call no limit is told in version 1's way
    let limit = |bytes: u64| bytes.min(NO_LIMIT_V1);
    let (usage, swap) = (&memory.usage, &memory.swap_usage);
    let unlimited = |usage: u64| MemoryEntry { limit: NO_LIMIT_V1, usage, ..Default::default() };
    let both = if usage.limit >= NO_LIMIT_V1 { NO_LIMIT_V1 } else { limit(usage.limit.saturating_add(swap.limit)) };
    MemoryStat {
        cache: detail("file"),
        rss: detail("anon"),
        rss_huge: detail("anon_thp"),
        mapped_file: detail("file_mapped"),
        dirty: detail("file_dirty"),
        writeback: detail("file_writeback"),
        pg_fault: detail("pgfault"),
        pg_maj_fault: detail("pgmajfault"),
        inactive_anon: detail("inactive_anon"),
        active_anon: detail("active_anon"),
        inactive_file: detail("inactive_file"),
        active_file: detail("active_file"),
        unevictable: detail("unevictable"),
        hierarchical_memory_limit: limit(usage.limit),
        hierarchical_swap_limit: both,
        total_cache: detail("file"),
        total_rss: detail("anon"),
        total_rss_huge: detail("anon_thp"),
        total_mapped_file: detail("file_mapped"),
        total_dirty: detail("file_dirty"),
        total_writeback: detail("file_writeback"),
        total_pg_fault: detail("pgfault"),
        total_pg_maj_fault: detail("pgmajfault"),
        total_inactive_anon: detail("inactive_anon"),
        total_active_anon: detail("active_anon"),
        total_inactive_file: detail("inactive_file"),
        total_active_file: detail("active_file"),
        total_unevictable: detail("unevictable"),
        usage: MessageField::some(MemoryEntry {
            limit: limit(usage.limit),
            usage: usage.usage,
            max: usage.max_usage,
            failcnt: usage.failcnt,
            ..Default::default()
        }),
        // memory and swap together
        swap: MessageField::some(MemoryEntry {
            limit: both,
            usage: usage.usage.saturating_add(swap.usage),
            max: usage.max_usage.saturating_add(swap.max_usage),
            failcnt: swap.failcnt,
            ..Default::default()
        }),
        kernel: MessageField::some(unlimited(detail("kernel"))),
        kernel_tcp: MessageField::some(unlimited(detail("sock"))),
        ..Default::default()
    }
}

fn blkio(entries: &[api::BlkioStatsEntry]) -> Vec<BlkIOEntry> {
    entries
        .iter()
        .map(|entry| BlkIOEntry {
            op: entry.op.clone(),
            major: entry.major,
            minor: entry.minor,
            value: entry.value,
            ..Default::default()
        })
        .collect()
}

fn version_2(stats: &api::CgroupStats) -> v2::Metrics {
    let detail = |name: &str| detail(&stats.memory_stats, name);
    let cpu = &stats.cpu_stats;
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids_stats.current,
            // zero is version 1's word for none
            limit: if stats.pids_stats.limit == 0 { u64::MAX } else { stats.pids_stats.limit },
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: cpu.cpu_usage.total_usage / 1000,
            user_usec: cpu.cpu_usage.usage_in_usermode / 1000,
            system_usec: cpu.cpu_usage.usage_in_kernelmode / 1000,
            nr_periods: cpu.throttling_data.periods,
            nr_throttled: cpu.throttling_data.throttled_periods,
            throttled_usec: cpu.throttling_data.throttled_time / 1000,
            nr_bursts: detail("cpu.nr_bursts"),
            burst_usec: detail("cpu.burst_usec"),
            ..Default::default()
        }),
        memory: MessageField::some(memory_2(&stats.memory_stats)),
        rdma: MessageField::some(v2::RdmaStat::default()),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: detail("events.low"),
            high: detail("events.high"),
            max: detail("events.max"),
            oom: detail("events.oom"),
            oom_kill: detail("events.oom_kill"),
            oom_group_kill: detail("events.oom_group_kill"),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat { usage: io(&stats.blkio_stats), ..Default::default() }),
        hugetlb: stats
            .hugetlb_stats
            .iter()
            .map(|(size, data)| v2::HugeTlbStat {
                current: data.usage,
                max: detail(&format!("hugetlb.{size}.max")),
                pagesize: size.clone(),
                failcnt: data.failcnt,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn memory_2(memory: &api::MemoryStats) -> v2::MemoryStat {
    let detail = |name: &str| detail(memory, name);
    // later kernels count both kinds apart
    let either = |name: &str| {
        let parts = detail(&format!("{name}_anon")).saturating_add(detail(&format!("{name}_file")));
        detail(name).max(parts)
    };
    v2::MemoryStat {
        anon: detail("anon"),
        file: detail("file"),
        kernel_stack: detail("kernel_stack"),
        slab: detail("slab"),
        sock: detail("sock"),
        shmem: detail("shmem"),
        file_mapped: detail("file_mapped"),
        file_dirty: detail("file_dirty"),
        file_writeback: detail("file_writeback"),
        anon_thp: detail("anon_thp"),
        inactive_anon: detail("inactive_anon"),
        active_anon: detail("active_anon"),
        inactive_file: detail("inactive_file"),
        active_file: detail("active_file"),
        unevictable: detail("unevictable"),
        slab_reclaimable: detail("slab_reclaimable"),
        slab_unreclaimable: detail("slab_unreclaimable"),
        pgfault: detail("pgfault"),
        pgmajfault: detail("pgmajfault"),
        workingset_refault: either("workingset_refault"),
        workingset_activate: either("workingset_activate"),
        workingset_nodereclaim: detail("workingset_nodereclaim"),
        pgrefill: detail("pgrefill"),
        pgscan: detail("pgscan"),
        pgsteal: detail("pgsteal"),
        pgactivate: detail("pgactivate"),
        pgdeactivate: detail("pgdeactivate"),
        pglazyfree: detail("pglazyfree"),
        pglazyfreed: detail("pglazyfreed"),
        thp_fault_alloc: detail("thp_fault_alloc"),
        thp_collapse_alloc: detail("thp_collapse_alloc"),
        usage: memory.usage.usage,
        usage_limit: memory.usage.limit,
        swap_usage: memory.swap_usage.usage,
        swap_limit: memory.swap_usage.limit,
        max_usage: memory.usage.max_usage,
        swap_max_usage: memory.swap_usage.max_usage,
        ..Default::default()
    }
}

/// Version 1 has a line for each number, version 2 one for each device.
fn io(stats: &api::BlkioStats) -> Vec<v2::IOEntry> {
    let mut devices = BTreeMap::<(u64, u64), v2::IOEntry>::new();
    let mut each = |entries: &[api::BlkioStatsEntry],
                    read: fn(&mut v2::IOEntry) -> &mut u64,
                    write: fn(&mut v2::IOEntry) -> &mut u64| {
        for entry in entries {
            let device = devices.entry((entry.major, entry.minor)).or_insert_with(|| v2::IOEntry {
                major: entry.major,
                minor: entry.minor,
                ..Default::default()
            });
            match entry.op.as_str() {
                "Read" => *read(device) = entry.value,
                "Write" => *write(device) = entry.value,
                _ => {}
            }
        }
    };
    each(&stats.io_service_bytes_recursive, |device| &mut device.rbytes, |device| &mut device.wbytes);
    each(&stats.io_serviced_recursive, |device| &mut device.rios, |device| &mut device.wios);
    devices.into_values().collect()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::MessageDyn;
    use containerd_shim_protos::protobuf::reflect::ReflectValueRef;

    use super::*;

    #[test]
    fn both_versions_tell_the_same() {
        let mut stats = api::CgroupStats::new();
        let memory = stats.memory_stats.mut_or_insert_default();
        memory.stats.insert("events.oom_kill".into(), 3);
        memory.stats.insert("anon".into(), 4096);
        let blkio = stats.blkio_stats.mut_or_insert_default();
        let entry = |major, op: &str, value| api::BlkioStatsEntry { major, op: op.into(), value, ..Default::default() };
        blkio.io_service_bytes_recursive = vec![entry(8, "Read", 1), entry(8, "Write", 2), entry(7, "Read", 3)];
        blkio.io_serviced_recursive = vec![entry(8, "Write", 4)];
        let (one, two) = (version_1(&stats), version_2(&stats));
        assert_eq!((one.memory_oom_control.oom_kill, one.memory.rss), (3, 4096));
        assert_eq!((two.memory_events.oom_kill, two.memory.anon), (3, 4096));
        assert_eq!(one.blkio.io_service_bytes_recursive.len(), 3);
        let told: Vec<_> = two.io.usage.iter().map(|io| (io.major, io.rbytes, io.wbytes, io.rios, io.wios)).collect();
        assert_eq!(told, [(7, 3, 0, 0, 0), (8, 1, 2, 0, 4)]);
    }
    /// The paths of all messages in this one, and in those.
    fn messages(of: &dyn MessageDyn, at: &str) -> Vec<String> {
        let mut found = Vec::new();
        for field in of.descriptor_dyn().fields() {
            let path = format!("{at}/{}", field.name());
            if field.is_singular()
                && let Some(ReflectValueRef::Message(message)) = field.get_singular(of)
            {
                found.push(path.clone());
                found.extend(messages(&*message, &path));
            }
        }
        found
    }

    /// What containerd's cgroup libraries make without asking whether there is anything (`Stat` of both versions), and
    /// their clients read likewise. `metrics_have_what_runcs_have` compares with a runc that runs.
    #[test]
    fn no_message_is_missing_when_there_is_nothing_to_tell() {
        let nothing = api::CgroupStats::new();
        let one = [
            "/pids",
            "/cpu",
            "/cpu/usage",
            "/cpu/throttling",
            "/memory",
            "/memory/usage",
            "/memory/swap",
            "/memory/kernel",
            "/memory/kernel_tcp",
            "/blkio",
            "/memory_oom_control",
        ];
        assert_eq!(messages(&version_1(&nothing), ""), one);
        let two = ["/pids", "/cpu", "/memory", "/rdma", "/io", "/memory_events"];
        assert_eq!(messages(&version_2(&nothing), ""), two);
    }

    #[test]
    fn no_limit_is_told_in_each_versions_way() {
        let mut stats = api::CgroupStats::new();
        let memory = stats.memory_stats.mut_or_insert_default();
        memory.usage.mut_or_insert_default().limit = u64::MAX;
        memory.swap_usage.mut_or_insert_default().limit = u64::MAX;
        let (one, two) = (version_1(&stats), version_2(&stats));
        assert_eq!((one.memory.usage.limit, one.memory.swap.limit, one.pids.limit), (NO_LIMIT_V1, NO_LIMIT_V1, 0));
        assert_eq!((two.memory.usage_limit, two.memory.swap_limit, two.pids.limit), (u64::MAX, u64::MAX, u64::MAX));
        let memory = stats.memory_stats.mut_or_insert_default();
        memory.usage = Some(api::MemoryData { usage: 5, max_usage: 7, limit: 100, ..Default::default() }).into();
        memory.swap_usage = Some(api::MemoryData { usage: 1, limit: 20, ..Default::default() }).into();
        let one = version_1(&stats).memory;
        assert_eq!((one.swap.usage, one.swap.limit, one.hierarchical_swap_limit), (6, 120, 120));
    }
}
