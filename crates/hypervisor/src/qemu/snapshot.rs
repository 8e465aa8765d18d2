//! Saving a guest that has just booted, and going on from there in another QEMU.
//!
//! The memory is a file that QEMU does not write out again (`x-ignore-shared`); the rest, the state of the processor and
//! the devices, is some 200 KB. A clone may have more devices than the saved VM: QEMU leaves those as they are after a
//! reset, and the guest finds them by looking at its bus anew. That takes long, so the saved VM has what it can: a folder
//! that QEMU serves has a state that can be saved until it is mounted. A virtio-fs has none.

use std::fs::{File, read};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use async_trait::async_trait;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::sendfile::sendfile64;
use nix::unistd::{Whence, lseek64};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

use super::cmdline::{self, Inherited, Memory};
use super::device::Options;
use super::disk::Disks;
use super::qmp::Qmp;
use super::root::RootArguments;
use super::{Accelerator, Bridge, QemuSettings, QemuVm};
use crate::{Begin, Channel, CloneMemory, Error, SharedDir, Snapshot, Snapshots, VmSpec, next_data};

/// What must be done before a clone can go on.
pub(super) struct Restore {
    state: OwnedFd,
    copying: Option<JoinHandle<io::Result<()>>>,
}

impl Restore {
    /// Returns the memory for QEMU to inherit, and whether it can be shared, too. Begins to copy it where that is the way:
    /// QEMU needs it only after it has got ready itself.
    pub(super) fn begin(from: Snapshot) -> io::Result<(OwnedFd, bool, Self)> {
        let Snapshot { memory, state, mode } = from;
        if mode == CloneMemory::Private {
            return Ok((memory, false, Self { state, copying: None }));
        }
        let copy = File::from(memfd_create(c"clone", MFdFlags::MFD_CLOEXEC)?);
        let original = File::from(memory);
        copy.set_len(original.metadata()?.len())?;
        let to = copy.try_clone()?;
        let copying = tokio::task::spawn_blocking(move || copy_used(&original, &to));
        Ok((copy.into(), true, Self { state, copying: Some(copying) }))
    }

    /// Lets the guest go on, with `later` besides: devices that QEMU does not have while it reads a state.
    pub(super) async fn finish(self, qmp: &Qmp, later: Vec<Options>) -> Result<(), Error> {
        let failed = |why: String| Error::Snapshot { what: "restoring", why };
        prepare(qmp).await?;
        if let Some(copying) = self.copying {
            let copied = copying.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            copied.map_err(|error| failed(format!("copying the memory of the VM: {error}")))?;
        }
        qmp.give("state", self.state.as_fd()).await?;
        let read = qmp.migration()?;
        qmp.execute("migrate-incoming", json!({"uri": "fd:state"})).await?;
        read.await.map_err(|_| Error::Gone)?.map_err(failed)?;
        for device in later {
            qmp.execute("device_add", device.object()).await?;
        }
        qmp.execute("cont", json!({})).await.map(drop)
    }
}

#[async_trait]
impl Snapshots for QemuVm {
    async fn save(&self, to: OwnedFd) -> Result<(), Error> {
        let qmp = &self.qmp;
        qmp.execute("stop", json!({})).await?;
        prepare(qmp).await?;
        qmp.give("state", to.as_fd()).await?;
        let written = qmp.migration()?;
        qmp.execute("migrate", json!({"uri": "fd:state"})).await?;
        // a maker that hangs would hold the template's lock for good
        let limit = qmp.deadline();
        let written = tokio::time::timeout(limit, written);
        let outcome = written.await.map_err(|_| Error::Timeout { call: "migrate".into(), after: limit })?;
        outcome.map_err(|_| Error::Gone)?.map_err(|why| Error::Snapshot { what: "saving", why })
    }
}

async fn prepare(qmp: &Qmp) -> Result<(), Error> {
    let on = ["x-ignore-shared", "events"].map(|name| json!({"capability": name, "state": true}));
    qmp.execute("migrate-set-capabilities", json!({"capabilities": on})).await.map(drop)
}

/// Copies what is not a hole; the rest of a new file is one.
fn copy_used(from: &File, to: &File) -> io::Result<()> {
    let mut at = 0;
    while let Some((begin, end)) = next_data(from, at)? {
        lseek64(to, begin, Whence::SeekSet)?;
        at = begin;
        while at < end {
            let count = usize::try_from(end - at).map_err(io::Error::other)?;
            if sendfile64(to, from, Some(&mut at), count)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file of the saved memory was truncated"));
            }
        }
    }
    Ok(())
}

/// The spec of a VM that is saved to be cloned for such as `spec`.
pub(super) fn plain(spec: &VmSpec) -> VmSpec {
    VmSpec {
        id: String::new(),
        begin: Begin::Boot,
        boot: spec.boot.clone(),
        size: spec.size,
        channel: match &spec.channel {
            Channel::Serial { port } => Channel::Serial { port },
            // has no state that can be saved
            Channel::Vsock { .. } | Channel::HybridVsock { .. } => Channel::Serial { port: "" },
        },
        shared_dirs: spec.shared_dirs.iter().filter_map(SharedDir::of_template).collect(),
        devices: Vec::new(),
        pluggable: spec.pluggable,
        reclaim: spec.reclaim,
        merge: spec.merge,
        entropy_source: spec.entropy_source.clone(),
        debug: spec.debug,
    }
}

/// See [`crate::Hypervisor::fingerprint`]; `spec` is [`plain`].
pub(super) fn fingerprint(
    settings: &QemuSettings,
    accelerator: Accelerator,
    spec: &VmSpec,
    bridge: &Bridge,
    disks: &Disks,
    tsc_khz: Option<u64>,
) -> String {
    let inherited = Inherited {
        tsc_khz,
        boot: Some((String::new(), RootArguments::new(&spec.boot.root, "", 0))),
        memory: Memory::Anonymous,
        qmp: 0,
        console: 0,
        channel: Some(0),
    };
    let mut hash = Sha256::new();
    for argument in cmdline::arguments(settings, accelerator, spec, bridge, disks, &inherited) {
        hash.update(argument.as_bytes());
        hash.update([0]);
    }
    // the same files, on the same boot of the host: its processor and its kernel shape the guest too
    hash.update(read("/proc/sys/kernel/random/boot_id").unwrap_or_default());
    let firmware = settings.firmware.as_deref().unwrap_or(Path::new(""));
    for path in [&settings.path, &spec.boot.kernel, spec.boot.root.path(), firmware] {
        hash.update(path.as_os_str().as_encoded_bytes());
        if let Ok(meta) = std::fs::metadata(path) {
            hash.update(format!(" {} {} {} {}\n", meta.dev(), meta.ino(), meta.size(), meta.mtime_nsec()));
            hash.update(meta.mtime().to_le_bytes());
        }
    }
    hash.finalize().iter().take(16).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Where a child that inherits this opens it.
pub(super) fn path_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_template_has_the_device_of_a_folder_that_qemu_serves() {
        let open = || OwnedFd::from(tempfile::tempfile().expect("a file"));
        let kept = |server| SharedDir { tag: "files", server }.of_template();
        let device = kept(crate::FileServer::NineP { folder: Some(open()) }).expect("the device");
        assert!(matches!(device.server, crate::FileServer::NineP { folder: None }), "and not the folder: {device:?}");
        assert!(
            kept(crate::FileServer::VirtioFs { socket: crate::DaemonEnd::Connection(open()), queue_size: 8 }).is_none()
        );
    }

    #[test]
    fn only_what_is_used_is_copied() {
        let from = tempfile::tempfile().expect("a file");
        from.set_len(64 << 20).expect("long");
        from.write_all_at(&[7; 5000], 1 << 20).expect("written");
        from.write_all_at(&[9; 10], (64 << 20) - 10).expect("written");
        let to = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        to.set_len(64 << 20).expect("long");
        copy_used(&from, &to).expect("copied");
        let mut seen = [0; 5002];
        to.read_exact_at(&mut seen, (1 << 20) - 1).expect("read");
        assert!(seen[0] == 0 && seen[1..5001].iter().all(|byte| *byte == 7) && seen[5001] == 0);
        to.read_exact_at(&mut seen[..10], (64 << 20) - 10).expect("read");
        assert_eq!(seen[..10], [9; 10]);
        assert!(to.metadata().expect("meta").blocks() * 512 < 1 << 20, "the holes are holes");
    }
}
