//! Volumes below which a container's mounts are to be seen by the pod's other containers (`shared`, Kubernetes'
//! `Bidirectional`). The agent's own mount of such a volume is shared; what a container gets must be its peer, not a copy
//! that only follows it, so it is taken before everything that the container has of the agent's becomes a follower.
#![allow(unsafe_code, reason = "open_tree and move_mount")]

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use agent_api::oci;

use super::child::{Outcome, named};
use crate::storage;

/// Mounts that are nowhere yet, by their destinations.
#[derive(Debug, Default)]
pub(super) struct Peers(HashMap<String, OwnedFd>);

impl Peers {
    pub(super) fn of(spec: &oci::Spec) -> Outcome<Self> {
        let mut peers = HashMap::new();
        for mount in &spec.Mounts {
            if storage::is_shareable(&mount.source)
                && mount.options.iter().any(|option| option == "shared" || option == "rshared")
            {
                let tree = open(&mount.source).map_err(named(format!("bind source {}", mount.source)))?;
                peers.insert(mount.destination.clone(), tree);
            }
        }
        Ok(Self(peers))
    }

    /// Puts the one for `mount` on `target`; `false` when there is none.
    pub(super) fn attach(&self, mount: &oci::Mount, target: &OwnedFd) -> io::Result<bool> {
        let Some(tree) = self.0.get(&mount.destination) else { return Ok(false) };
        let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
        // SAFETY: two open descriptors and empty paths.
        let done = unsafe {
            libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), c"".as_ptr(), target.as_raw_fd(), c"".as_ptr(), flags)
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(true) }
    }
}

fn open(path: &str) -> io::Result<OwnedFd> {
    let path = CString::new(path)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: a path that ends with zero.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
}
