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

/// The guest's numbers in the form that clients on this host expect: that of the host's own cgroup version.
pub(crate) fn of(stats: &api::StatsContainerResponse, host_is_v2: bool) -> Rpc<Any> {
    let cgroup = &stats.cgroup_stats;
    if host_is_v2 { any(&version_2(cgroup)) } else { any(&version_1(cgroup)) }
}

fn version_1(stats: &api::CgroupStats) -> Metrics {
    let (cpu, memory) = (&stats.cpu_stats, &stats.memory_stats);
    let detail = |name: &str| memory.stats.get(name).copied().unwrap_or_default();
    let entry = |data: &api::MemoryData| MemoryEntry {
        limit: data.limit,
        usage: data.usage,
        max: data.max_usage,
        failcnt: data.failcnt,
        ..Default::default()
    };
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
        cpu: MessageField::some(CPUStat {
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
        }),
        memory: MessageField::some(MemoryStat {
            cache: detail("file"),
            rss: detail("anon"),
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
            total_inactive_file: detail("inactive_file"),
            total_active_file: detail("active_file"),
            total_cache: detail("file"),
            total_rss: detail("anon"),
            usage: MessageField::some(entry(&memory.usage)),
            swap: MessageField::some(entry(&memory.swap_usage)),
            kernel: MessageField::some(entry(&memory.kernel_usage)),
            ..Default::default()
        }),
        memory_oom_control: MessageField::some(MemoryOomControl {
            oom_kill: detail("events.oom_kill"),
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
    let (cpu, memory) = (&stats.cpu_stats, &stats.memory_stats);
    let detail = |name: &str| memory.stats.get(name).copied().unwrap_or_default();
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids_stats.current,
            limit: stats.pids_stats.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: cpu.cpu_usage.total_usage / 1000,
            user_usec: cpu.cpu_usage.usage_in_usermode / 1000,
            system_usec: cpu.cpu_usage.usage_in_kernelmode / 1000,
            nr_periods: cpu.throttling_data.periods,
            nr_throttled: cpu.throttling_data.throttled_periods,
            throttled_usec: cpu.throttling_data.throttled_time / 1000,
            ..Default::default()
        }),
        memory: MessageField::some(v2::MemoryStat {
            anon: detail("anon"),
            file: detail("file"),
            kernel_stack: detail("kernel_stack"),
            slab: detail("slab"),
            sock: detail("sock"),
            shmem: detail("shmem"),
            file_mapped: detail("file_mapped"),
            file_dirty: detail("file_dirty"),
            file_writeback: detail("file_writeback"),
            inactive_anon: detail("inactive_anon"),
            active_anon: detail("active_anon"),
            inactive_file: detail("inactive_file"),
            active_file: detail("active_file"),
            unevictable: detail("unevictable"),
            pgfault: detail("pgfault"),
            pgmajfault: detail("pgmajfault"),
            usage: memory.usage.usage,
            usage_limit: memory.usage.limit,
            swap_usage: memory.swap_usage.usage,
            swap_limit: memory.swap_usage.limit,
            max_usage: memory.usage.max_usage,
            ..Default::default()
        }),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: detail("events.low"),
            high: detail("events.high"),
            max: detail("events.max"),
            oom: detail("events.oom"),
            oom_kill: detail("events.oom_kill"),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat { usage: io(&stats.blkio_stats), ..Default::default() }),
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
}
