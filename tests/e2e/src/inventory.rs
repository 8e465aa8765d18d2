//! How much of everything there is on the machine: numbers to look at before and after a long run.

use crate::{Node, leaks::Leaks, processes};
use anyhow::{Context as _, Result};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

/// How long things may take to go.
const SETTLE: Duration = Duration::from_secs(10);

const CONTAINERDS_FILES: &str = "open file of containerd";

/// What was there at one moment.
#[derive(Debug)]
pub struct Inventory {
    /// Things by their kind, which must not become more.
    things: BTreeMap<String, usize>,
    /// KiB, which come and go.
    memory: BTreeMap<&'static str, u64>,
}

impl Inventory {
    /// Counts.
    pub fn take(node: &Node) -> Result<Self> {
        let mut things = Leaks::look(node.tag(), node.dir()).counts();
        things.insert(CONTAINERDS_FILES.into(), node.open_files()?);
        let processes = processes::of_node(node.tag());
        let children = processes.iter().filter(|process| process.name != "containerd");
        let children = children.map(processes::Process::pss_kib).sum::<Result<u64>>()?;
        let kernel = fs::read_to_string("/proc/meminfo")?;
        let memory = BTreeMap::from([
            ("containerd's memory", node.memory_kib()?),
            ("memory of its children", children),
            ("the kernel's unreclaimable memory", field(&kernel, "SUnreclaim:").context("/proc/meminfo")?),
        ]);
        Ok(Self { things, memory })
    }

    /// Counts until it is as wished, or nothing more can be expected.
    pub fn take_when(node: &Node, wished: impl Fn(&Self) -> bool) -> Result<Self> {
        let end = Instant::now() + SETTLE;
        loop {
            let now = Self::take(node)?;
            if wished(&now) || Instant::now() > end {
                return Ok(now);
            }
            // things of so many kinds have no common event to wait for
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Counts when nothing has changed for a while.
    pub fn take_at_rest(node: &Node) -> Result<Self> {
        let last = std::cell::RefCell::new(None::<BTreeMap<String, usize>>);
        Self::take_when(node, |now| last.replace(Some(now.things.clone())).as_ref() == Some(&now.things))
    }

    /// Whether no kind of thing differs.
    pub fn same_things(&self, other: &Self) -> bool {
        self.things == other.things
    }

    /// The same but for the files of containerd, which has others open each time it is started.
    pub fn same_of_ours(&self, other: &Self) -> bool {
        let ours = |inventory: &Self| {
            let things = inventory.things.iter().filter(|(kind, _)| *kind != CONTAINERDS_FILES);
            things.map(|(kind, count)| (kind.clone(), *count)).collect::<Vec<_>>()
        };
        ours(self) == ours(other)
    }

    /// Both, a line a kind.
    pub fn beside(&self, after: &Self) -> String {
        let mut out = String::new();
        let kinds = self.things.keys().chain(after.things.keys().filter(|kind| !self.things.contains_key(*kind)));
        for kind in kinds {
            let of = |inventory: &Self| inventory.things.get(kind).copied().unwrap_or_default();
            let _ = writeln!(out, "  {kind:<36} {:>9} {:>9}", of(self), of(after));
        }
        for (name, before) in &self.memory {
            let _ = writeln!(
                out,
                "  {name:<36} {before:>9} {:>9} KiB",
                after.memory.get(name).copied().unwrap_or_default()
            );
        }
        out
    }
}

/// The number after a name in one of the kernel's tables.
pub(crate) fn field(table: &str, name: &str) -> Option<u64> {
    table.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}
