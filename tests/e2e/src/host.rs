//! What the host of containers is like: its network, mounts, cgroups and files, as text, to be compared with what it was.

use crate::{
    ctr::Invocation,
    mounts,
    node::{CRI_NAMESPACE, NAMESPACE},
};
use anyhow::{Result, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, Instant},
};

/// How long things may take to go.
const SETTLE: Duration = Duration::from_secs(10);

/// What is asked, each by a program with arguments.
const QUESTIONS: [&str; 9] = [
    "ip -o -d link",
    "ip -o addr",
    "ip route show table all",
    "ip -6 route show table all",
    "ip rule",
    "ip -6 rule",
    "tc qdisc",
    "iptables-save",
    "ip6tables-save",
];

/// Folders whose files are looked at, and where nothing else on the machine writes meanwhile.
const FILES: [&str; 5] = ["/etc", "/run", "/root/.docker", "/var/lib/cni", "/var/lib/kubelet"];

/// What is kept of them is looked at by [`crate::leaks`].
const PRODUCT: &str = "/run/kata-containers";

/// Where clients put their containers' groups.
const CGROUPS: [&str; 4] = [NAMESPACE, CRI_NAMESPACE, "docker", "kubepods"];

/// How lines about them begin.
const FILES_TOPIC: &str = "files";

/// Values that change by themselves, with the word before them.
const RESTLESS: [&str; 6] = ["valid_lft", "preferred_lft", "expires", "hoplimit", "state", "gc_timer"];

/// A host at one moment, a set of lines a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host(BTreeMap<String, BTreeSet<String>>);

impl Host {
    /// Looks at the one that this thread is in. `daemons` are folders whose mounts and files are somebody's who stays.
    pub fn look(daemons: &[&Path]) -> Result<Self> {
        let mut topics = BTreeMap::new();
        for question in QUESTIONS {
            let mut words = question.split(' ');
            let told = Invocation::new(words.next().unwrap_or_default(), words).output()?.ok()?.text();
            topics.insert(question.to_owned(), told.lines().filter_map(steady).collect());
        }
        let is_of_daemons = |path: &Path| daemons.iter().any(|dir| path.starts_with(dir));
        let table = mounts::table();
        let lines = String::from_utf8_lossy(&table).into_owned();
        // without the numbers, which are given anew
        let lines = lines.lines().filter_map(|line| {
            let words: Vec<_> = line.split(' ').collect();
            (!is_of_daemons(Path::new(words.get(4)?))).then(|| words.get(3..6).map(|words| words.join(" ")))?
        });
        topics.insert("mounts".into(), lines.collect());
        let mut cgroups = BTreeSet::new();
        walk(Path::new("/sys/fs/cgroup"), &mut |path, meta| {
            if meta.is_dir() && !is_cgroup_of_others(path) {
                cgroups.insert(path.display().to_string());
            }
            true
        });
        topics.insert("cgroups".into(), cgroups);
        let mut files = BTreeSet::new();
        for folder in FILES {
            walk(Path::new(folder), &mut |path, meta| {
                if is_of_daemons(path) || path == Path::new(PRODUCT) {
                    return false;
                }
                let size = if meta.is_dir() { 0 } else { meta.size() };
                files.insert(format!("{} {:o} {size} {}", path.display(), meta.mode(), changed(meta)));
                true
            });
        }
        topics.insert(FILES_TOPIC.into(), files);
        Ok(Self(topics))
    }

    /// Looks until two looks in a row are the same: what was ended just before may still be going.
    pub fn settled(daemons: &[&Path]) -> Result<Self> {
        let end = Instant::now() + SETTLE;
        let mut seen = Self::look(daemons)?;
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let again = Self::look(daemons)?;
            if again == seen || Instant::now() > end {
                return Ok(again);
            }
            seen = again;
        }
    }

    /// What has become different since: lines that begin with the topic, and `-` or `+`.
    pub fn changes(&self, now: &Self) -> BTreeSet<String> {
        let mut changes = BTreeSet::new();
        for (topic, was) in &self.0 {
            let is = now.0.get(topic).cloned().unwrap_or_default();
            changes.extend(was.difference(&is).map(|line| format!("{topic}: - {line}")));
            changes.extend(is.difference(was).map(|line| format!("{topic}: + {line}")));
        }
        changes
    }

    /// Fails when the host is not what it was `before`, after giving it some time to be, but for `litter`: what a client
    /// leaves by itself, whatever runtime it has, in `changes`.
    pub fn expect_as(before: &Self, daemons: &[&Path], litter: &BTreeSet<String>) -> Result<()> {
        let litter: BTreeSet<_> = litter.iter().map(|line| nameless(line)).collect();
        let end = Instant::now() + SETTLE;
        loop {
            let changes = before.changes(&Self::look(daemons)?);
            let odd: Vec<_> = changes.into_iter().filter(|line| !litter.contains(&nameless(line))).collect();
            if odd.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the host has changed:\n  {}", odd.join("\n  "));
            }
            // things of so many kinds have no common event to wait for
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Without the numbers that tell one container from another, or one moment: those that have many digits.
fn nameless(line: &str) -> String {
    // of a file there is its path and its mode; what is in it is another each time
    let line = match line.strip_prefix(FILES_TOPIC) {
        Some(rest) => rest.split(' ').take(4).collect::<Vec<_>>().join(" "),
        None => line.to_owned(),
    };
    let mut text = String::new();
    for part in line.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let word = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let is_number = word.len() >= 8 && is_hex(word) && word.contains(|c: char| c.is_ascii_digit());
        text += if is_number { "#" } else { word };
        text += &part[word.len()..];
    }
    text
}

/// Whether a group below `/sys/fs/cgroup/CONTROLLER` is that of a service of this machine: it is neither where clients have
/// their containers, nor named after a container, nor a new folder of its own beside the others.
fn is_cgroup_of_others(path: &Path) -> bool {
    let mut names = path.iter().skip(5).map(|name| name.to_string_lossy());
    let Some(first) = names.next() else { return false };
    let is_id = |name: &str| name.split(['-', '.']).any(|part| part.len() == 64 && is_hex(part));
    !first.is_empty()
        && names.next().is_some()
        && !CGROUPS.contains(&&*first)
        && !path.iter().any(|name| is_id(&name.to_string_lossy()))
}

fn is_hex(word: &str) -> bool {
    word.chars().all(|c| c.is_ascii_hexdigit())
}

/// A folder's time changes with what comes and goes in it.
fn changed(meta: &fs::Metadata) -> i64 {
    if meta.is_file() { meta.mtime() } else { 0 }
}

/// A line without what changes by itself and without the comments of `iptables-save`, which have the time.
fn steady(line: &str) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    // a chain's counters are in brackets
    let words = line.split_whitespace().filter(|word| !word.starts_with('['));
    let mut words = words.collect::<Vec<_>>().into_iter();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        if RESTLESS.contains(&word) {
            words.next();
        } else {
            kept.push(word);
        }
    }
    // a bridge that lost its last port has no carrier, which the kernel says a second later, of its routes too
    kept.retain(|word| *word != "linkdown");
    let line = kept.join(" ").replace("<NO-CARRIER,", "<").replace(",LOWER_UP>", ">");
    (!line.contains("fe80:")).then_some(line)
}

/// Everything below a folder, and it; not below what `each` does not want.
fn walk(path: &Path, each: &mut impl FnMut(&Path, &fs::Metadata) -> bool) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    if each(path, &meta) && meta.is_dir() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            walk(&entry.path(), each);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{is_cgroup_of_others, nameless, steady};
    use std::path::Path;

    #[test]
    fn groups_of_services_are_theirs() {
        let id = "ab".repeat(32);
        for (path, others) in [
            ("/sys/fs/cgroup/memory", false),
            ("/sys/fs/cgroup/memory/new", false),
            ("/sys/fs/cgroup/memory/docker/one", false),
            ("/sys/fs/cgroup/memory/kata-e2e/one/two", false),
            ("/sys/fs/cgroup/memory/some.service/501506ddb0b0a9d65d9ff99fe39244cd", true),
            (&*format!("/sys/fs/cgroup/memory/system.slice/docker-{id}.scope"), false),
        ] {
            assert_eq!(is_cgroup_of_others(Path::new(path)), others, "{path}");
        }
    }

    #[test]
    fn only_long_numbers_are_names() {
        let line = "files: + /run/nerdctl/ff14596e5b67085d348425d8 100644 8 1796033683";
        assert_eq!(nameless(line), ": + /run/nerdctl/# 100644");
        assert_eq!(nameless("iptables-save: + -A CNI-ca6078e1546c991cf0d7c743 eth0"), "iptables-save: + -A CNI-# eth0");
    }

    #[test]
    fn only_what_stays_is_compared() {
        for (line, kept) in [
            ("# Generated by iptables-save on Mon", None),
            (":INPUT ACCEPT [12:345]", Some(":INPUT ACCEPT")),
            ("2: eth0 inet 10.0.0.1/24 valid_lft 10sec preferred_lft forever", Some("2: eth0 inet 10.0.0.1/24")),
            ("2: eth0 inet6 fe80::1/64 scope link", None),
            ("172.17.0.0/16 dev docker0 src 172.17.0.1 linkdown", Some("172.17.0.0/16 dev docker0 src 172.17.0.1")),
        ] {
            assert_eq!(steady(line).as_deref(), kept, "{line}");
        }
    }
}
