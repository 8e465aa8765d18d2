//! Whose a thing is: on a host that is in use, pods of other containerds come and go while a test runs. What can be told
//! to be theirs is not ours, by who is in it, or by the names that their programs give; everything else counts.

use crate::processes;
use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Component, Path},
};

/// Where Docker, kubelet and others keep what their containers are made of. A node of ours is elsewhere.
const PLACES: [&str; 10] = [
    "/run/docker",
    "/run/containers",
    "/run/crio",
    "/run/user",
    "/run/credentials",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lib/containers",
    "/var/lib/kubelet",
    "/var/lib/rancher",
];

/// In the folders of every containerd: what its plugins have.
const PLUGINS: &str = "/io.containerd.";

/// How the links of their networks begin; ours begin otherwise, and the product's are in the pods' namespaces.
const LINKS: [&str; 11] =
    ["veth", "cni", "docker", "br-", "flannel", "cali", "lxc", "cilium", "nerdctl", "virbr", "podman"];

/// Where the product has a folder for each sandbox, named `<namespace>@<id>@<a hash of containerd's address>`.
const SANDBOXES: [&str; 2] = ["/run/kata-containers", "/run/vc"];

/// One node, and everybody else.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner<'a> {
    /// The mark of the node's processes.
    pub(super) tag: &'a str,
    /// Where its containerd has everything.
    pub(super) dir: &'a Path,
    /// How the names of the node's sandboxes end.
    pub(super) sandboxes: &'a str,
}

impl Owner<'_> {
    /// Whether a path, of a file or a mount, is something of another containerd's.
    pub(super) fn is_of_others(self, path: &Path) -> bool {
        if path.starts_with(self.dir) {
            return false;
        }
        if PLACES.iter().any(|place| path.starts_with(place)) || path.display().to_string().contains(PLUGINS) {
            return true;
        }
        SANDBOXES.iter().any(|place| path.starts_with(place)) && path.components().any(|part| self.is_sandbox(part))
    }

    fn is_sandbox(self, part: Component<'_>) -> bool {
        let name = part.as_os_str().to_string_lossy();
        name.matches('@').count() >= 2 && !name.ends_with(self.sandboxes)
    }

    /// Whether a link of the host's has a name that others give theirs.
    pub(super) fn is_link_of_others(name: &str) -> bool {
        LINKS.iter().any(|begin| name.starts_with(begin))
    }

    /// Whether somebody who is not of the node lives in that network namespace.
    pub(super) fn is_namespace_of_others(self, path: &Path) -> bool {
        let Ok(own) = fs::metadata(path) else { return false };
        let of = |pid: i32| fs::metadata(format!("/proc/{pid}/ns/net")).ok();
        let lives = |pid: &i32| of(*pid).is_some_and(|meta| (meta.dev(), meta.ino()) == (own.dev(), own.ino()));
        pids().filter(lives).any(|pid| !self.is_ours(pid))
    }

    /// Whether what is in a cgroup, or below it, is of others alone.
    pub(super) fn is_cgroup_of_others(self, path: &Path) -> bool {
        let has = |file: &str| path.join(file).exists();
        // cgroups(7): version 1 has this file in roots alone, version 2 the last one in all others
        if has("release_agent") || (has("cgroup.controllers") && !has("cgroup.events")) {
            return true;
        }
        let mut pids = Vec::new();
        members(path, &mut pids);
        !pids.is_empty() && !pids.into_iter().any(|pid| self.is_ours(pid))
    }

    fn is_ours(self, pid: i32) -> bool {
        match processes::look(pid) {
            Some(process) => process.may_be_of(self.tag),
            None => processes::mark(pid).is_some_and(|node| node == self.tag),
        }
    }
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn members(cgroup: &Path, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            members(&entry.path(), pids);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Owner;
    use std::path::Path;

    #[test]
    fn paths_tell_whose_they_are() {
        let owner = Owner { tag: "1-2", dir: Path::new("/var/tmp/keX"), sandboxes: "@00c0ffee" };
        for (path, others) in [
            ("/run/kata-containers/sandboxes/kata-e2e@one@00c0ffee/shared", false),
            ("/run/kata-containers/sandboxes/k8s.io@one@12345678/shared", true),
            ("/run/kata-containers/sandboxes/default@one@12345678", true),
            ("/run/kata-containers/odd", false),
            ("/run/containerd/io.containerd.runtime.v2.task/k8s.io/one/rootfs", true),
            ("/var/tmp/keX/state/io.containerd.runtime.v2.task/kata-e2e/one/rootfs", false),
            ("/var/tmp/keY/state/io.containerd.runtime.v2.task/kata-e2e/one/rootfs", true),
            ("/var/lib/kubelet/pods/one/volumes", true),
            ("/tmp/a@b@c", false),
        ] {
            assert_eq!(owner.is_of_others(Path::new(path)), others, "{path}");
        }
    }

    #[test]
    fn links_tell_whose_they_are() {
        for (name, others) in [("veth12ab", true), ("kebr1", false), ("tap0_kata", false), ("docker0", true)] {
            assert_eq!(Owner::is_link_of_others(name), others, "{name}");
        }
    }
}
