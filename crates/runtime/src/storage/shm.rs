//! The pod's `/dev/shm`: memory that its containers share, so it must be the guest's, not a folder of the host's.
//!
//! CRI servers and Docker mount a tmpfs of their own on the host, named `shm`, and bind it into every container of the
//! pod. Through virtio-fs each access would be a request; so the guest gets a tmpfs of the same size instead.

use std::path::{Path, PathBuf};

use agent_api::agent::Storage;
use agent_api::paths;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::Spec;

/// Where a container sees it.
pub(crate) const DESTINATION: &str = "/dev/shm";

/// The host's tmpfs that the guest's stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shm {
    source: PathBuf,
    /// Bytes.
    size: u64,
}

impl Shm {
    /// Of a pod's first container; `None` when it has one of its own or none. A tmpfs of another name is a volume that
    /// somebody wants there, and stays one.
    pub(crate) fn of(spec: &Spec) -> Option<Self> {
        let mount = spec.mounts().as_ref()?.iter().find(|mount| mount.destination() == Path::new(DESTINATION))?;
        let source = mount.source().as_ref()?;
        if source.file_name()? != "shm" {
            return None;
        }
        let stat = statfs(source).ok().filter(|stat| stat.filesystem_type() == TMPFS_MAGIC)?;
        let size = stat.blocks().checked_mul(u64::try_from(stat.block_size()).ok()?)?;
        Some(Self { source: source.clone(), size })
    }

    /// A mount with this source is it.
    pub(crate) fn is(&self, source: &Path) -> bool {
        self.source == source
    }

    /// What the guest mounts with the sandbox.
    pub(crate) fn storage(&self) -> Storage {
        Storage {
            driver: "ephemeral".into(),
            source: "shm".into(),
            fstype: "tmpfs".into(),
            options: ["nosuid", "nodev", "noexec", "mode=1777", &format!("size={}", self.size)]
                .map(str::to_owned)
                .into(),
            mount_point: paths::SANDBOX_SHM.into(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(source: &str) -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [{"destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind", "rw"]}],
        }))
        .expect("a specification")
    }

    #[test]
    fn only_a_tmpfs_named_shm() {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = folder.path().join("shm");
        std::fs::create_dir(&disk).expect("made");
        // the host's own is a tmpfs of that name
        let shm = Shm::of(&spec("/dev/shm")).expect("found");
        assert!(shm.is(Path::new("/dev/shm")) && shm.size > 0);
        assert!(shm.storage().options.contains(&format!("size={}", shm.size)));
        if statfs(&disk).is_ok_and(|stat| stat.filesystem_type() != TMPFS_MAGIC) {
            assert_eq!(Shm::of(&spec(&disk.display().to_string())), None);
        }
        assert_eq!(Shm::of(&spec("/dev")), None);
        assert_eq!(Shm::of(&spec("/not/there/shm")), None);
    }
}
