//! What is on the machine that the product could have left behind, before and after.

mod others;

use crate::processes;
use anyhow::{Result, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::FileTypeExt as _,
    path::Path,
    time::{Duration, Instant},
};

use others::Owner;

/// Folders and files that are shared by all sandboxes and stay until the next boot.
const LASTING: [&str; 10] = [
    "/run/kata-containers",
    "/run/kata-containers/kvm-probe",
    "/run/kata-containers/tsc-khz",
    "/run/kata-containers/virtiofsd",
    "/run/kata-containers/sandboxes",
    "/run/kata-containers/shared",
    "/run/kata-containers/shared/direct-volumes",
    "/run/kata-containers/shared/sandboxes",
    "/run/vc",
    "/run/containerd/s",
];

/// Where sandboxes and shims keep their files.
const PLACES: [&str; 3] = ["/run/kata-containers", "/run/vc", "/run/containerd/s"];

/// The one kind whose name is of two words.
const NAMESPACE: &str = "network namespace";

/// Where they have names.
const NAMESPACES: &str = "/run/netns";

/// Everything found at one moment.
#[derive(Debug, Clone, Default)]
pub struct Leaks {
    found: BTreeSet<String>,
    /// What others have. It does not count, nor does it begin to when they leave it.
    of_others: BTreeSet<String>,
}

impl Leaks {
    /// Looks around, for a node whose processes have the mark `tag`, and whose containerd has everything in `dir`. What
    /// is another containerd's does not count, nor do sockets that are served.
    pub fn look(tag: &str, dir: &Path) -> Self {
        let sandboxes = crate::node::sandboxes_end(&crate::node::address(dir));
        let owner = Owner { tag, dir, sandboxes: &sandboxes };
        let (mut found, mut of_others) = (BTreeSet::new(), BTreeSet::new());
        for process in processes::all() {
            if process.may_be_of(tag) {
                let shown: String = process.command.chars().take(200).collect();
                found.insert(format!("process {} {shown}", process.pid));
            }
        }
        let mut namespaces_of_others = BTreeSet::new();
        for name in names(Path::new(NAMESPACES)) {
            let path = Path::new(NAMESPACES).join(&name);
            let thing = format!("{NAMESPACE} {name}");
            if owner.is_namespace_of_others(&path) {
                namespaces_of_others.insert(path);
                of_others.insert(thing);
            } else {
                found.insert(thing);
            }
        }
        for line in String::from_utf8_lossy(&crate::mounts::table()).lines() {
            let point = line.split(' ').nth(4).unwrap_or(line);
            // iproute2 makes it with the first `ip netns add` after a boot
            if point == NAMESPACES {
                continue;
            }
            let theirs = owner.is_of_others(Path::new(point)) || namespaces_of_others.contains(Path::new(point));
            let set = if theirs { &mut of_others } else { &mut found };
            set.insert(format!("mount {point}"));
        }
        for name in names(Path::new("/sys/class/net")) {
            let set = if Owner::is_link_of_others(&name) { &mut of_others } else { &mut found };
            set.insert(format!("link {name}"));
        }
        for name in names(Path::new("/sys/block")) {
            // those that nothing is behind are the kernel's
            if let Ok(file) = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")) {
                let set = if owner.is_of_others(Path::new(file.trim())) { &mut of_others } else { &mut found };
                set.insert(format!("loop-device {name} {}", file.trim()));
            }
        }
        cgroups(Path::new("/sys/fs/cgroup"), owner, &mut found, &mut of_others);
        for place in PLACES {
            files(Path::new(place), owner, &mut found);
        }
        Self { found, of_others }
    }

    /// How many of each kind.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for thing in &self.found {
            let two_words = Some(NAMESPACE).filter(|kind| thing.starts_with(kind));
            let kind = two_words.or_else(|| thing.split(' ').next()).unwrap_or_default();
            *counts.entry(kind.to_owned()).or_default() += 1;
        }
        counts
    }

    /// Fails when there is something that was not there `before`, after giving it `limit` to go.
    pub fn expect_none_since(before: &Self, tag: &str, dir: &Path, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let now = Self::look(tag, dir);
            let is_new = |thing: &&String| !before.found.contains(*thing) && !before.of_others.contains(*thing);
            let left: Vec<_> = now.found.iter().filter(is_new).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("left behind after {} s:\n  {}", limit.as_secs(), left.join("\n  "));
            }
            // things of so many kinds have no common event to wait for
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn cgroups(dir: &Path, owner: Owner<'_>, found: &mut BTreeSet<String>, of_others: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        let path = entry.path();
        // runc leaves the folder of containerd's namespace for the next container, with nothing in it
        let lasts = [crate::node::NAMESPACE, crate::node::CRI_NAMESPACE].iter().any(|name| path.ends_with(name));
        if !lasts {
            let set = if owner.is_cgroup_of_others(&path) { &mut *of_others } else { &mut *found };
            set.insert(format!("cgroup {}", path.display()));
        }
        // whoever is in it, what is below counts for itself
        cgroups(&path, owner, found, of_others);
    }
}

fn files(path: &Path, owner: Owner<'_>, found: &mut BTreeSet<String>) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    // templates are made to stay, and others' are others'
    if path.ends_with("vc/vm") || owner.is_of_others(path) {
        return;
    }
    let shown = path.display().to_string();
    // a served socket counts as its process
    let served = meta.file_type().is_socket()
        && fs::read_to_string("/proc/thread-self/net/unix").is_ok_and(|u| u.contains(&shown));
    // a probe's answer for each guest of this machine, and for each virtiofsd
    let answers = ["kata-containers/kvm-probe", "kata-containers/virtiofsd"];
    let answer = path.parent().is_some_and(|parent| answers.iter().any(|one| parent.ends_with(one)));
    if !served && !answer && !LASTING.contains(&shown.as_str()) {
        found.insert(format!("file {shown}"));
    }
    if meta.is_dir() {
        for name in names(path) {
            files(&path.join(name), owner, found);
        }
    }
}
