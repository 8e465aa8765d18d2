//! A cgroup of the host's for what is measured beside a pod, where containerd puts a pod: below its namespace, in every
//! hierarchy.

use anyhow::{Context as _, Result};
use e2e::node::NAMESPACE;
use std::{fs, path::PathBuf};

/// One folder a hierarchy. Goes when dropped, by when nothing may be in it.
pub(crate) struct Cgroup(Vec<PathBuf>);

impl Cgroup {
    pub(crate) fn create(name: &str) -> Result<Self> {
        let all = fs::read_to_string("/proc/self/mountinfo")?;
        let mut cgroup = Self(Vec::new());
        for line in all.lines().filter(|line| line.contains(" - cgroup")) {
            let root = line.split(' ').nth(4).context("a mount point in mountinfo")?;
            let folder = PathBuf::from(root).join(NAMESPACE).join(name);
            fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
            cgroup.0.push(folder);
        }
        // version 1: a processor set is empty at first (cpuset(7)), and nobody can enter then
        for folder in &cgroup.0 {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                for path in [folder.with_file_name(file), folder.join(file)] {
                    let above = path.parent().and_then(|here| here.parent()).map(|above| above.join(file));
                    if let Some(value) = above.and_then(|above| fs::read_to_string(above).ok())
                        && fs::read_to_string(&path).is_ok_and(|now| now.trim().is_empty())
                    {
                        fs::write(&path, value.trim()).with_context(|| path.display().to_string())?;
                    }
                }
            }
        }
        Ok(cgroup)
    }

    pub(crate) fn add(&self, pid: u32) -> Result<()> {
        for folder in &self.0 {
            let path = folder.join("cgroup.procs");
            fs::write(&path, pid.to_string()).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = fs::remove_dir(folder);
        }
    }
}
