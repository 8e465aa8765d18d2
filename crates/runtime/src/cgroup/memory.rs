//! How much memory the pod's cgroup on the host lets it have, and whether the host's kernel has killed for it.

use std::fs;
use std::path::{Path, PathBuf};

use super::{HostCgroup, Tree};

/// What a page counter of version 1 holds when there is no limit, and more than any host has.
const NO_LIMIT: u64 = 1 << 60;

/// The smallest limit on the way from the pod's cgroup to the root of its tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemoryLimit {
    pub(crate) bytes: u64,
    /// The file that says so.
    pub(crate) file: PathBuf,
}

impl HostCgroup {
    /// What holds for the whole VM. `None`: no limit, or one that does not count the VM's memory.
    pub(crate) fn memory_limit(&self) -> Option<MemoryLimit> {
        let (tree, folder) = self.memory_folder()?;
        let name = if tree.is_v2() { "memory.max" } else { "memory.limit_in_bytes" };
        let limits = folder.ancestors().take_while(|at| at.starts_with(&tree.root)).filter_map(|at| {
            let file = at.join(name);
            // "max" is none
            let bytes = fs::read_to_string(&file).ok()?.trim().parse().ok()?;
            (bytes < NO_LIMIT).then_some(MemoryLimit { bytes, file })
        });
        limits.min_by_key(|limit| limit.bytes)
    }

    /// How many of the pod's processes on the host were killed for want of memory. Zero where nobody counts.
    pub(crate) fn memory_kills(&self) -> u64 {
        let Some((tree, folder)) = self.memory_folder() else { return 0 };
        let file = if tree.is_v2() { "memory.events" } else { "memory.oom_control" };
        kills(&fs::read_to_string(folder.join(file)).unwrap_or_default())
    }

    /// Where the VM's memory counts for the pod.
    fn memory_folder(&self) -> Option<(&Tree, PathBuf)> {
        let tree = self.trees.iter().find(|tree| tree.is_v2() || tree.controls(&["memory"]))?;
        // version 1 has the VM's process, and with it all memory, elsewhere when only processors count
        let counts = tree.is_v2() || self.overhead.is_none();
        counts.then(|| (tree, Path::new(&tree.root).join(&self.pod)))
    }
}

/// Both versions have a line for it (cgroup-v1/memory.rst, cgroup-v2.rst).
fn kills(text: &str) -> u64 {
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
    count.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(root: &Path, controllers: &[&str], overhead: Option<PathBuf>) -> HostCgroup {
        let controllers = controllers.iter().map(|name| (*name).to_owned()).collect();
        let tree = Tree { root: root.join("tree"), controllers };
        fs::create_dir_all(tree.root.join("kubepods/pod1/c1")).expect("made");
        HostCgroup { trees: vec![tree], pod: "kubepods/pod1/c1".into(), overhead }
    }

    #[test]
    fn the_smallest_limit_above_the_pod_holds() {
        for (controllers, file, none) in
            [(&["memory"][..], "memory.limit_in_bytes", "9223372036854771712"), (&[][..], "memory.max", "max")]
        {
            let root = tempfile::tempdir().expect("a folder");
            let pod = pod(root.path(), controllers, None);
            let write = |at: &str, text: &str| fs::write(root.path().join(at).join(file), text).expect("written");
            // not of this tree
            write("", "1");
            assert_eq!(pod.memory_limit(), None);
            write("tree/kubepods/pod1/c1", none);
            assert_eq!(pod.memory_limit(), None, "{none}");
            write("tree/kubepods/pod1", "67108864\n");
            write("tree/kubepods", "1073741824\n");
            let limit = pod.memory_limit().expect("a limit");
            assert_eq!(limit.bytes, 64 << 20);
            assert!(limit.file.ends_with(format!("tree/kubepods/pod1/{file}")), "{limit:?}");
        }
    }

    #[test]
    fn what_does_not_count_for_the_pod_has_no_limit() {
        let root = tempfile::tempdir().expect("a folder");
        let pod = pod(root.path(), &["memory"], Some("kata_overhead/c1".into()));
        fs::write(root.path().join("tree/kubepods/pod1/memory.limit_in_bytes"), "67108864").expect("written");
        assert_eq!(pod.memory_limit(), None);
        assert_eq!(pod.memory_kills(), 0);
    }

    #[test]
    fn kills_are_counted() {
        let root = tempfile::tempdir().expect("a folder");
        let pod = pod(root.path(), &["memory"], None);
        assert_eq!(pod.memory_kills(), 0);
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n";
        fs::write(root.path().join("tree/kubepods/pod1/c1/memory.oom_control"), text).expect("written");
        assert_eq!(pod.memory_kills(), 2);
        assert_eq!(kills("low 0\noom 4\noom_kill 1\noom_group_kill 0\n"), 1);
    }
}
