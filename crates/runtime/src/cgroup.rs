//! The pod's cgroup on the host: where its VM counts, and where the limits that kubelet sets on the pod reach it.
//!
//! The caller names the folder (`linux.cgroupsPath` of the first container), in the form of cgroupfs (`/a/b`) or of
//! systemd (`a-b.slice:prefix:name`). Version 1 has a tree for each controller, version 2 one for all
//! (kernel: Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst).

mod memory;

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::Error;
use crate::cleanup::{RunDir, Step};

pub(crate) use memory::MemoryLimit;

/// Where the parts of a VM count that are not its processors, when only those are to count for the pod (Kata's name).
const OVERHEAD: &str = "kata_overhead";
/// Trees of version 1 in which the threads of one process may be apart.
const THREADED: [&str; 3] = ["cpu", "cpuacct", "cpuset"];

/// One mounted tree.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tree {
    root: PathBuf,
    /// Version 1: what it controls. Empty for version 2.
    controllers: Vec<String>,
}

impl Tree {
    fn is_v2(&self) -> bool {
        self.controllers.is_empty()
    }

    fn controls(&self, names: &[&str]) -> bool {
        self.controllers.iter().any(|own| names.contains(&own.as_str()))
    }
}

/// The trees of version 1, or else that of version 2, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn trees(mounts: &str) -> Vec<Tree> {
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for line in mounts.lines() {
        let Some((fixed, tail)) = line.split_once(" - ") else { continue };
        let Some(root) = fixed.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut tail = tail.split(' ');
        let (kind, options) = (tail.next(), tail.nth(1).unwrap_or_default());
        match kind {
            Some("cgroup") => {
                let own = options.split(',').filter(|word| !["rw", "ro", "xattr", "noprefix"].contains(word));
                old.push(Tree { root, controllers: own.map(str::to_owned).collect() });
            }
            Some("cgroup2") => new.push(Tree { root, controllers: Vec::new() }),
            _ => {}
        }
    }
    if old.is_empty() { new } else { old }
}

/// The folder below each tree's root that a specification's path means.
fn folder(path: &str) -> Result<PathBuf, Error> {
    let refuse = |why: &str| Error::Invalid(format!("linux.cgroupsPath {path:.200?} {why}"));
    if let [slice, prefix, name] = path.split(':').collect::<Vec<_>>()[..] {
        if [slice, prefix, name].iter().any(|part| part.contains('/')) || name.is_empty() {
            return Err(refuse("is not SLICE:PREFIX:NAME"));
        }
        let scope = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        return slice_folder(slice)
            .map(|at| at.join(scope))
            .ok_or_else(|| refuse("has no valid slice: it must end with .slice"));
    }
    let mut out = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(part) => out.push(part),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(refuse("must not contain \"..\"")),
        }
    }
    if out.as_os_str().is_empty() { Err(refuse("is empty")) } else { Ok(out) }
}

/// `a-b.slice` is in `a.slice` (systemd.slice(5)).
fn slice_folder(slice: &str) -> Option<PathBuf> {
    let name = match slice {
        "" => "system",
        slice => slice.strip_suffix(".slice")?,
    };
    let mut out = PathBuf::new();
    if name == "-" {
        return Some(out);
    }
    let mut so_far = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far.push_str(part);
        out.push(format!("{so_far}.slice"));
    }
    Some(out)
}

/// The pod's place in every tree.
#[derive(Debug, Clone)]
pub(crate) struct HostCgroup {
    trees: Vec<Tree>,
    pod: PathBuf,
    /// `None`: everything counts for the pod.
    overhead: Option<PathBuf>,
}

/// Who is to be put there.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    pub(crate) processes: Vec<u32>,
    /// The threads that run the guest's processors.
    pub(crate) vcpus: Vec<u32>,
}

impl HostCgroup {
    /// Makes it. A host that lets nobody write there gets a pod all the same, without one.
    pub(crate) fn create(path: &str, id: &str, everything: bool, run: &mut RunDir) -> Result<Option<Self>, Error> {
        // names of other mounts may be no text
        let mounts = fs::read("/proc/self/mountinfo").map_err(Error::host("/proc/self/mountinfo"))?;
        let mounts = String::from_utf8_lossy(&mounts);
        let overhead = (!everything).then(|| Path::new(OVERHEAD).join(id));
        let cgroup = Self { trees: trees(&mounts), pod: folder(path)?, overhead };
        match cgroup.make(run) {
            Ok(()) => Ok(Some(cgroup)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES | libc::EPERM)) => {
                tracing::warn!(path, %error, "cannot create the pod's cgroup on the host: the pod runs without its limits there");
                Ok(None)
            }
            Err(error) => Err(Error::host(format!("cgroup {path}"))(error)),
        }
    }

    fn make(&self, run: &mut RunDir) -> io::Result<()> {
        for tree in &self.trees {
            for folder in std::iter::once(&self.pod).chain(&self.overhead) {
                // another pod's end may take an empty parent away between two steps of ours
                let mut tries = 3;
                while let Err(error) = make(tree, folder, run) {
                    tries -= 1;
                    if error.kind() != io::ErrorKind::NotFound || tries == 0 {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// The processors' threads are to be apart from their process.
    pub(crate) fn parts_vcpus(&self) -> bool {
        self.overhead.is_some()
    }

    /// Puts the VM's processes there. Blocks: each move waits for the kernel.
    pub(crate) fn attach(&self, members: &Members) -> Result<(), Error> {
        for tree in &self.trees {
            let pod = tree.root.join(&self.pod);
            let whole = match &self.overhead {
                // version 2 does not part a process's threads between folders with controllers
                Some(overhead) if !tree.is_v2() => tree.root.join(overhead),
                _ => pod.clone(),
            };
            for pid in &members.processes {
                write_id(&whole.join("cgroup.procs"), *pid)?;
            }
            if whole != pod && tree.controls(&THREADED) {
                for thread in &members.vcpus {
                    write_id(&pod.join("tasks"), *thread)?;
                }
            }
        }
        Ok(())
    }
}

fn write_id(file: &Path, id: u32) -> Result<(), Error> {
    match fs::write(file, id.to_string()) {
        // it has ended, which its watcher tells
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other.map_err(Error::host(format!("{} = {id}", file.display()))),
    }
}

/// Makes a folder and what is missing above it, each written down first.
fn make(tree: &Tree, folder: &Path, run: &mut RunDir) -> io::Result<()> {
    let mut at = tree.root.clone();
    let mut parts = folder.components().peekable();
    while let Some(part) = parts.next() {
        if tree.is_v2() {
            hand_down(&at);
        }
        let parent = at.clone();
        at.push(part);
        if at.is_dir() {
            continue;
        }
        let last = parts.peek().is_none();
        run.push(if last { Step::Cgroup(at.clone()) } else { Step::CgroupParent(at.clone()) })?;
        match fs::create_dir(&at) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !last => {}
            other => other?,
        }
        if tree.controls(&["cpuset"]) {
            // a new one of version 1 has no processors and takes no process
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(at.join(file), fs::read(parent.join(file))?)?;
            }
        }
    }
    Ok(())
}

/// Version 2: what `at` controls shall be controlled below it. One at a time, since one that is refused (a controller in
/// use elsewhere) refuses its whole line; the root's own may be another's to set.
fn hand_down(at: &Path) {
    let all = fs::read_to_string(at.join("cgroup.controllers")).unwrap_or_default();
    for name in all.split_whitespace() {
        let _ = fs::write(at.join("cgroup.subtree_control"), format!("+{name}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V1: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:9 - cgroup cgroup rw,xattr,name=systemd\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn both_versions_are_found() {
        let old = trees(V1);
        assert_eq!(old.len(), 2);
        assert_eq!(old[0].controllers, ["cpu", "cpuacct"]);
        assert_eq!(old[1].controllers, ["name=systemd"]);
        let new = trees("29 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
        assert!(new.len() == 1 && new[0].is_v2() && new[0].root == Path::new("/sys/fs/cgroup"));
    }

    #[test]
    fn paths_of_both_forms() {
        for (path, wanted) in [
            ("/kubepods/pod1/c1", "kubepods/pod1/c1"),
            ("a//b/./c", "a/b/c"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:c1",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope",
            ),
            (":docker:c1", "system.slice/docker-c1.scope"),
            ("-.slice::c1", "c1.scope"),
        ] {
            assert_eq!(folder(path).expect(path), Path::new(wanted), "{path}");
        }
        for bad in ["", "/", "../x", "/a/../../x", "a.slice:x:y/../z", "a:b:c", "a--b.slice:x:y"] {
            let error = folder(bad).expect_err(bad).to_string();
            assert!(error.contains("cgroupsPath"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_path_leads_out(path in "\\PC*") {
            if let Ok(folder) = folder(&path) {
                prop_assert!(folder.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }

    /// A tree of plain folders stands for the kernel's.
    #[test]
    fn folders_come_and_go_with_the_pod() {
        let root = tempfile::tempdir().expect("a folder");
        let tree = |name: &str, controllers: &[&str]| {
            let path = root.path().join(name);
            fs::create_dir(&path).expect("made");
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(path.join(file), "0-1").expect("written");
            }
            Tree { root: path, controllers: controllers.iter().map(|name| (*name).to_owned()).collect() }
        };
        let trees = vec![tree("memory", &["memory"]), tree("cpu", &["cpu"])];
        let pod = HostCgroup { trees, pod: "k8s.io/s1".into(), overhead: Some("kata_overhead/s1".into()) };
        let mut run = RunDir::create(&root.path().join("ns@s1"), Path::new("/bundle")).expect("made");
        pod.make(&mut run).expect("made");
        pod.attach(&Members { processes: vec![7], vcpus: vec![8] }).expect("attached");
        let read = |path: &str| fs::read_to_string(root.path().join(path)).ok();
        assert_eq!(read("memory/kata_overhead/s1/cgroup.procs").as_deref(), Some("7"));
        assert_eq!(read("memory/k8s.io/s1/tasks"), None);
        assert_eq!(read("cpu/k8s.io/s1/tasks").as_deref(), Some("8"));
        // the kernel's files go with their folder, these do not
        for file in ["memory/kata_overhead/s1/cgroup.procs", "cpu/kata_overhead/s1/cgroup.procs", "cpu/k8s.io/s1/tasks"]
        {
            fs::remove_file(root.path().join(file)).expect("removed");
        }
        fs::create_dir(root.path().join("cpu/k8s.io/another")).expect("made");
        run.undo().expect("undone");
        assert!(!root.path().join("memory/k8s.io").exists());
        assert!(!root.path().join("cpu/k8s.io/s1").exists() && root.path().join("cpu/k8s.io/another").exists());
    }

    #[test]
    fn a_folder_that_was_there_stays() {
        let root = tempfile::tempdir().expect("a folder");
        let tree = Tree { root: root.path().join("memory"), controllers: vec!["memory".into()] };
        fs::create_dir_all(tree.root.join("mine")).expect("made");
        let pod = HostCgroup { trees: vec![tree], pod: "mine".into(), overhead: None };
        let mut run = RunDir::create(&root.path().join("ns@s1"), Path::new("/bundle")).expect("made");
        pod.make(&mut run).expect("made");
        run.undo().expect("undone");
        assert!(root.path().join("memory/mine").exists());
    }
}
