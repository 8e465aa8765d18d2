//! A container's cgroup, version 2 (kernel: Documentation/admin-guide/cgroup-v2.rst).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use agent_api::agent as api;
use agent_api::oci::{LinuxDeviceCgroup, LinuxResources};

use tokio::io::Interest;

use crate::error::Error;

const ROOT: &str = "/sys/fs/cgroup";

/// What every container has where the guest is translated ([`crate::translator`]). The others (`cpu` above all, by whose
/// hierarchy the scheduler goes at each wake-up and sleep) are handed down there on demand; everywhere else all have all.
const TRANSLATED: &str = "memory pids io";

/// Hands those controllers down to the containers' cgroups that all have, as far as this kernel has them.
pub(crate) fn delegate() -> io::Result<()> {
    hand_down(for_all(crate::translator::is_there()))
}

/// `None` is all that the kernel has.
fn for_all(is_translated: bool) -> Option<&'static str> {
    is_translated.then_some(TRANSLATED)
}

/// The same for all that the kernel has: for a container that divides its cgroup itself.
pub(crate) fn delegate_all() -> io::Result<()> {
    hand_down(None)
}

/// Those that are wanted, or all.
fn hand_down(wanted: Option<&str>) -> io::Result<()> {
    let there = fs::read_to_string(format!("{ROOT}/cgroup.controllers"))?;
    let line = present(wanted.unwrap_or(&there), &there);
    let control = format!("{ROOT}/cgroup.subtree_control");
    // one that is missing would spoil the whole line
    fs::write(&control, line).map_err(|error| io::Error::new(error.kind(), format!("{control}: {error}")))
}

/// What is to be written for those of `wanted` that the kernel has: `cgroup_disable=` and other kernels leave some out.
fn present(wanted: &str, there: &str) -> String {
    let there: Vec<_> = there.split_whitespace().collect();
    let wanted = wanted.split_whitespace().filter(|name| there.contains(name));
    wanted.map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ")
}

/// The controller that has this file, where it is one that not all have.
fn controller_of(file: &str) -> Option<&'static str> {
    let name = file.split('.').next()?;
    ["cpu", "cpuset", "hugetlb"].into_iter().find(|one| *one == name)
}

fn has(controller: &str) -> bool {
    let there = fs::read_to_string(format!("{ROOT}/cgroup.controllers")).unwrap_or_default();
    !present(controller, &there).is_empty()
}

/// As the kernel would say it (cgroup-v2.rst).
fn is_weight(value: &str) -> bool {
    value.trim().parse::<u32>().is_ok_and(|weight| (1..=10_000).contains(&weight))
}

/// Where a process is, open. `None` when it is gone.
pub(crate) fn of_process(pid: i32) -> Option<File> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    // the second version's line (cgroups(7)); the agent sees all of the hierarchy
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    File::open(format!("{ROOT}{path}")).ok()
}

/// Whether a ready one fits.
pub(crate) fn are_plain(resources: Option<&LinuxResources>) -> bool {
    resources.is_none_or(|resources| crate::device_filter::is_plain(&resources.Devices))
}

/// Only against the weight of another does it mean anything.
const WEIGHT: &str = "cpu.weight";

const EVENTS: &str = "cgroup.events";

/// One cgroup. Dropping it kills what is in it and removes it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Open for processes that begin in it.
    folder: File,
    /// `cgroup.events`, open: each exec asks, and to find a file takes more than to read it.
    events: File,
    /// Whether this guest can weigh processors' time.
    can_weigh: bool,
    /// For when there is something to weigh it against.
    weight: Mutex<Option<String>>,
}

/// The folder of one that is made before a container needs it; no container has such a name.
pub(crate) const READY: &str = "@ready";

impl Cgroup {
    /// Makes it, with its limits and its device rules.
    pub(crate) fn create(id: &str, resources: Option<&LinuxResources>) -> Result<Self, Error> {
        let none = Vec::<LinuxDeviceCgroup>::new();
        Self::with_devices(id, resources.map_or(&none, |all| &all.Devices))?.fill(resources)
    }

    /// One without limits for a container that asks for no devices: to be made when there is time, or for all guests that
    /// begin from one saved guest.
    /// It is for containers whose rules [`are_plain`].
    pub(crate) fn ready() -> Result<Self, Error> {
        Self::with_devices(READY, &[])
    }

    /// Itself with these limits; its device rules stay.
    pub(crate) fn fill(self, resources: Option<&LinuxResources>) -> Result<Self, Error> {
        resources.map_or(Ok(()), |resources| self.limit(resources))?;
        Ok(self)
    }

    fn with_devices(name: &str, rules: &[LinuxDeviceCgroup]) -> Result<Self, Error> {
        let path = PathBuf::from(ROOT).join(name);
        fs::create_dir(&path).map_err(Error::failed(format!("cgroup {}", path.display())))?;
        // nobody is in it
        let undo = |_: &Error| drop(fs::remove_dir(&path));
        let folder = File::open(&path).map_err(Error::failed("cgroup")).inspect_err(undo)?;
        let events = File::open(path.join(EVENTS)).map_err(Error::failed(EVENTS)).inspect_err(undo)?;
        let cgroup = Self { path, folder, events, can_weigh: has("cpu"), weight: Mutex::default() };
        crate::device_filter::attach(cgroup.folder.as_fd(), rules).map_err(Error::failed("device rules"))?;
        Ok(cgroup)
    }

    /// Writes limits; zero is "not asked for", as on the wire.
    pub(crate) fn limit(&self, resources: &LinuxResources) -> Result<(), Error> {
        for (file, value) in settings(resources)? {
            let path = self.path.join(&file);
            if let Some(controller) = controller_of(&file)
                && !path.exists()
            {
                if file == WEIGHT && self.can_weigh {
                    if !is_weight(&value) {
                        return Err(Error::Invalid(format!("cgroup {WEIGHT} = {value:.20?} must be from 1 to 10000")));
                    }
                    *self.weight() = Some(value);
                    continue;
                }
                hand_down(Some(controller)).map_err(Error::failed(format!("enabling controller {controller}")))?;
            }
            if file == WEIGHT {
                // the older one
                self.weight().take();
            }
            match write_existing(&path, &value) {
                // no swap in this kernel or guest: nothing to limit
                Err(error) if file == "memory.swap.max" && error.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(Error::failed(format!("setting cgroup {file} = {value}")))?,
            }
        }
        Ok(())
    }

    fn weight(&self) -> MutexGuard<'_, Option<String>> {
        self.weight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether weights count already.
    pub(crate) fn is_weighed(&self) -> bool {
        self.path.join(WEIGHT).exists()
    }

    /// Lets the weight that it was given count.
    pub(crate) fn weigh(&self) -> Result<(), Error> {
        let Some(weight) = self.weight().take() else { return Ok(()) };
        let failed = || Error::failed(format!("setting cgroup {WEIGHT} = {weight}"));
        hand_down(Some("cpu")).map_err(failed())?;
        write_existing(&self.path.join(WEIGHT), &weight).map_err(failed())
    }

    /// Open for processes that begin in it.
    pub(crate) fn folder(&self) -> &File {
        &self.folder
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Whether all in it stand still, by whomever.
    pub(crate) fn is_frozen(&self) -> bool {
        // two words and two digits (cgroup-v2.rst)
        let mut text = [0; 256];
        let count = self.events.read_at(&mut text, 0).unwrap_or_default();
        text[..count].split(|byte| *byte == b'\n').any(|line| line == b"frozen 1")
    }

    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Error> {
        fs::write(self.path.join("cgroup.freeze"), if frozen { "1" } else { "0" })
            .map_err(Error::failed("cgroup.freeze"))
    }

    /// Kills every process in it and waits until the last is gone.
    pub(crate) async fn end(&self) -> Result<(), Error> {
        use io::{Read, Seek};
        let failed = || Error::failed(EVENTS);
        // not the one that is open: what has been read there is no news here
        let events = File::open(self.path.join(EVENTS)).map_err(failed())?;
        // a change of `populated` is an exceptional condition of this file (cgroup-v2.rst)
        let events = crate::io::watch_changes(events).map_err(failed())?;
        let is_empty = || {
            let (mut file, mut text) = (events.get_ref(), String::new());
            file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(failed())?;
            Ok(text.contains("populated 0"))
        };
        if is_empty()? {
            return Ok(());
        }
        self.freeze(false)?;
        self.kill()?;
        while !is_empty()? {
            events.ready(Interest::PRIORITY).await.map_err(failed())?.clear_ready();
        }
        Ok(())
    }

    /// Every process in it, at once.
    pub(crate) fn kill(&self) -> Result<(), Error> {
        fs::write(self.path.join("cgroup.kill"), "1").map_err(Error::failed("cgroup.kill"))
    }

    /// Open for killing everything in it, by a `1`.
    pub(crate) fn killer(&self) -> Result<File, Error> {
        File::options().write(true).open(self.path.join("cgroup.kill")).map_err(Error::failed("cgroup.kill"))
    }

    pub(crate) fn memory_events(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    pub(crate) fn stats(&self) -> api::CgroupStats {
        let text = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let number = |file: &str| text(file).trim().parse::<u64>().unwrap_or_default();
        // "max" is no limit: the largest number, as runc shows it
        let limit = |file: &str| {
            let text = text(file);
            if text.trim() == "max" { u64::MAX } else { text.trim().parse().unwrap_or_default() }
        };
        let cpu = pairs(&text("cpu.stat"));
        let of = |name: &str| cpu.get(name).copied().unwrap_or_default();
        let mut memory = pairs(&text("memory.stat"));
        let events = pairs(&text("memory.events"));
        let huge = self.huge_page_sizes();
        // version 1's messages have no place for them
        memory.extend(events.iter().map(|(name, count)| (format!("events.{name}"), *count)));
        memory.extend(["nr_bursts", "burst_usec"].map(|name| (format!("cpu.{name}"), of(name))));
        memory.extend(huge.iter().map(|size| format!("hugetlb.{size}.max")).map(|file| (file.clone(), limit(&file))));
        api::CgroupStats {
            cpu_stats: Some(api::CpuStats {
                cpu_usage: Some(api::CpuUsage {
                    total_usage: of("usage_usec") * 1000,
                    usage_in_kernelmode: of("system_usec") * 1000,
                    usage_in_usermode: of("user_usec") * 1000,
                    ..Default::default()
                })
                .into(),
                throttling_data: Some(api::ThrottlingData {
                    periods: of("nr_periods"),
                    throttled_periods: of("nr_throttled"),
                    throttled_time: of("throttled_usec") * 1000,
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            memory_stats: Some(api::MemoryStats {
                cache: memory.get("file").copied().unwrap_or_default(),
                usage: Some(api::MemoryData {
                    usage: number("memory.current"),
                    max_usage: number("memory.peak"),
                    failcnt: events.get("max").copied().unwrap_or_default(),
                    limit: limit("memory.max"),
                    ..Default::default()
                })
                .into(),
                swap_usage: Some(api::MemoryData {
                    usage: number("memory.swap.current"),
                    max_usage: number("memory.swap.peak"),
                    failcnt: pairs(&text("memory.swap.events")).get("max").copied().unwrap_or_default(),
                    limit: limit("memory.swap.max"),
                    ..Default::default()
                })
                .into(),
                use_hierarchy: true,
                stats: memory,
                ..Default::default()
            })
            .into(),
            pids_stats: Some(api::PidsStats {
                current: number("pids.current"),
                limit: if text("pids.max").trim() == "max" { 0 } else { number("pids.max") },
                ..Default::default()
            })
            .into(),
            blkio_stats: Some(io_stats(&text("io.stat"))).into(),
            hugetlb_stats: huge
                .into_iter()
                .map(|size| {
                    let stats = api::HugetlbStats {
                        usage: number(&format!("hugetlb.{size}.current")),
                        failcnt: pairs(&text(&format!("hugetlb.{size}.events")))
                            .get("max")
                            .copied()
                            .unwrap_or_default(),
                        ..Default::default()
                    };
                    (size, stats)
                })
                .collect(),
            ..Default::default()
        }
    }

    /// Those that are counted here: none before somebody has set a limit of one.
    fn huge_page_sizes(&self) -> Vec<String> {
        let files = fs::read_dir(&self.path).into_iter().flatten().flatten();
        files.filter_map(|file| huge_page_size(file.file_name().to_str()?).map(str::to_owned)).collect()
    }
}

/// Whose use the file tells.
fn huge_page_size(file: &str) -> Option<&str> {
    let size = file.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
    (!size.contains('.')).then_some(size)
}

/// Not [`fs::write`]: to make a file in a cgroup is forbidden, which would hide that there is none.
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(value.as_bytes())
}

/// The last resort, for a container that was not made: its processes are dead and reaped by then.
impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.kill();
        match remove_tree(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                crate::log::warn(&format!("cannot remove cgroup {}: {error}", self.path.display()));
            }
            _ => {}
        }
    }
}

/// A privileged container may have made cgroups of its own below.
fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn pairs(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn io_stats(text: &str) -> api::BlkioStats {
    let mut stats = api::BlkioStats::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match name {
                "rbytes" => (&mut stats.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.io_service_bytes_recursive, "Write"),
                "rios" => (&mut stats.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.io_serviced_recursive, "Write"),
                _ => continue,
            };
            let value = value.parse().unwrap_or_default();
            list.push(api::BlkioStatsEntry { major, minor, op: op.into(), value, ..Default::default() });
        }
    }
    stats
}

/// Limits of the specification (version 1's terms) as files of version 2.
fn settings(resources: &LinuxResources) -> Result<Vec<(String, String)>, Error> {
    let mut out: Vec<(String, String)> = Vec::new();
    let mut set = |file: &str, value: String| out.push((file.to_owned(), value));
    let amount = |bytes: i64| if bytes < 0 { "max".to_owned() } else { bytes.to_string() };
    if let Some(memory) = resources.Memory.as_ref() {
        if memory.Limit != 0 {
            set("memory.max", amount(memory.Limit));
        }
        if memory.Reservation != 0 {
            set("memory.low", amount(memory.Reservation));
        }
        if memory.Swap != 0 {
            // version 1 counts memory and swap together
            let swap = if memory.Swap < 0 { -1 } else { memory.Swap.saturating_sub(memory.Limit.max(0)).max(0) };
            set("memory.swap.max", amount(swap));
        }
    }
    if let Some(cpu) = resources.CPU.as_ref() {
        if cpu.Shares != 0 {
            // 2..262144 onto 1..10000, as runc and systemd do
            let weight = 1 + (cpu.Shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
            set("cpu.weight", weight.to_string());
        }
        if cpu.Quota != 0 || cpu.Period != 0 {
            let quota = if cpu.Quota > 0 { cpu.Quota.to_string() } else { "max".to_owned() };
            let period = if cpu.Period == 0 { 100_000 } else { cpu.Period };
            set("cpu.max", format!("{quota} {period}"));
        }
        if cpu.RealtimeRuntime != 0 || cpu.RealtimePeriod != 0 {
            return Err(Error::Unsupported("a real-time CPU limit, which cgroup v2 does not have,".into()));
        }
        for (file, value) in [("cpuset.cpus", &cpu.Cpus), ("cpuset.mems", &cpu.Mems)] {
            if !value.is_empty() {
                set(file, value.clone());
            }
        }
    }
    if let Some(pids) = resources.Pids.as_ref()
        && pids.Limit != 0
    {
        set("pids.max", amount(pids.Limit));
    }
    for huge in &resources.HugepageLimits {
        if huge.Pagesize.contains(['/', '.']) {
            return Err(Error::Invalid(format!("invalid huge page size {:?}", huge.Pagesize)));
        }
        set(&format!("hugetlb.{}.max", huge.Pagesize), huge.Limit.to_string());
    }
    for (file, value) in &resources.Unified {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(Error::Invalid(format!("cgroup file {file:?} must not be set by a container")));
        }
        set(file, value.clone());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_api::oci::{LinuxCPU, LinuxMemory, LinuxPids};

    #[test]
    fn version_one_terms_become_files() {
        let resources = LinuxResources {
            Memory: Some(LinuxMemory { Limit: 64 << 20, Swap: 96 << 20, ..Default::default() }).into(),
            CPU: Some(LinuxCPU { Shares: 1024, Quota: 50_000, ..Default::default() }).into(),
            Pids: Some(LinuxPids { Limit: -1, ..Default::default() }).into(),
            ..Default::default()
        };
        let all: HashMap<_, _> = settings(&resources).expect("settings").into_iter().collect();
        assert_eq!(all["memory.max"], "67108864");
        assert_eq!(all["memory.swap.max"], "33554432");
        assert_eq!(all["cpu.weight"], "39");
        assert_eq!(all["cpu.max"], "50000 100000");
        assert_eq!(all["pids.max"], "max");
    }

    #[test]
    fn only_what_is_there_is_handed_down() {
        assert_eq!(present(TRANSLATED, "cpuset cpu io memory hugetlb pids\n"), "+memory +pids +io");
        assert_eq!(present(TRANSLATED, "cpu pids"), "+pids");
        assert_eq!(present(TRANSLATED, ""), "");
        assert_eq!((for_all(true), for_all(false)), (Some(TRANSLATED), None));
        let folder = std::env::temp_dir().join(format!("kata-cgroup-{}", std::process::id()));
        let missing = write_existing(&folder, "1").expect_err("nothing is made");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_weight_is_checked_before_it_counts() {
        assert!(is_weight("1") && is_weight("10000") && is_weight("100\n"));
        assert!(!is_weight("0") && !is_weight("10001") && !is_weight("-1") && !is_weight("idle"));
    }

    #[test]
    fn files_have_their_controllers() {
        assert_eq!(controller_of("cpu.weight"), Some("cpu"));
        assert_eq!(controller_of("cpuset.cpus"), Some("cpuset"));
        assert_eq!(controller_of("hugetlb.2MB.max"), Some("hugetlb"));
        assert_eq!(controller_of("memory.max"), None);
    }

    #[test]
    fn huge_pages_are_found_by_their_files() {
        assert_eq!(huge_page_size("hugetlb.2MB.current"), Some("2MB"));
        for other in ["hugetlb.2MB.rsvd.current", "hugetlb.2MB.max", "memory.current"] {
            assert_eq!(huge_page_size(other), None, "{other}");
        }
    }

    #[test]
    fn files_outside_are_refused() {
        for file in ["../x", "cgroup.procs", "x"] {
            let resources =
                LinuxResources { Unified: [(file.to_owned(), "1".to_owned())].into(), ..Default::default() };
            settings(&resources).expect_err(file);
        }
    }

    #[test]
    fn io_is_read() {
        let stats = io_stats("8:0 rbytes=5 wbytes=6 rios=7 wios=8 dbytes=0 dios=0\nnonsense\n");
        assert_eq!(stats.io_service_bytes_recursive.len(), 2);
        assert_eq!(stats.io_serviced_recursive[1].value, 8);
    }
}
