//! KVM or TCG: decided by running a guest, because a `/dev/kvm` that opens is no proof.
//!
//! Some hosts (nested, para-virtual) have a `/dev/kvm` on which an ordinary kernel dies or hangs. So the first start
//! after a boot of the host lets the configured kernel and initrd run under KVM until the guest speaks; the answer is
//! kept for as long as host, QEMU and kernel are the same.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::tcg;
use crate::Boot;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// Its name in messages and on QEMU's command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// QEMU's name of the processor model.
    pub(super) fn cpu_model(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => tcg::CPU_MODEL,
        }
    }
}

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AcceleratorChoice {
    /// KVM where it works.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// TCG, no questions.
    Tcg,
}

/// The kept answer of a probe.
#[derive(Debug, Clone)]
pub(super) struct KeptAnswer {
    /// Named by everything that the answer depends on, so that two guests of one host do not take turns.
    file: PathBuf,
}

impl KeptAnswer {
    /// Below `dir`, for this host boot, this QEMU and this guest.
    pub(super) fn new(dir: &Path, qemu: &Path, boot: &Boot) -> Self {
        let mut hash = Sha256::new();
        hash.update(fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default());
        for path in [qemu, &boot.kernel, boot.root.path(), Path::new("/dev/kvm")] {
            hash.update(path.as_os_str().as_encoded_bytes());
            if let Ok(meta) = fs::metadata(path) {
                hash.update(format!(" {} {} {}\n", meta.ino(), meta.size(), meta.mtime_nsec()));
            }
        }
        let digest = hash.finalize();
        let key = digest.iter().take(12).fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        Self { file: dir.join("kvm-probe").join(key) }
    }

    /// The answer, when there is one for this host and guest, with the reason that was found.
    pub(super) fn recall(&self) -> Option<(Accelerator, String)> {
        let text = fs::read_to_string(&self.file).ok()?;
        let mut parts = text.trim_end().splitn(2, ' ');
        let accelerator = match parts.next()? {
            "kvm" => Accelerator::Kvm,
            "tcg" => Accelerator::Tcg,
            _ => return None,
        };
        Some((accelerator, parts.next().unwrap_or_default().to_owned()))
    }

    /// Keeps the answer; a host that cannot keep it probes again next time.
    pub(super) fn store(&self, accelerator: Accelerator, reason: &str) {
        let reason = reason.lines().next().unwrap_or_default();
        let text = format!("{} {reason}\n", accelerator.name());
        let written = self.file.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| {
            // written whole beside it and renamed: another start never reads a half line
            let draft = self.file.with_extension(std::process::id().to_string());
            fs::File::create(&draft)?.write_all(text.as_bytes())?;
            fs::rename(&draft, &self.file)?;
            self.file.parent().map_or(Ok(()), forget_old)
        });
        if let Err(error) = written {
            tracing::warn!(file = %self.file.display(), %error, "cannot cache the result of the accelerator probe");
        }
    }
}

/// Answers that are kept: for guests that were replaced nobody asks any more.
const KEPT: usize = 16;

fn forget_old(dir: &Path) -> std::io::Result<()> {
    let dated = |entry: fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
    let mut all: Vec<_> = fs::read_dir(dir)?.flatten().filter_map(dated).collect();
    all.sort_unstable();
    for (_, path) in all.iter().rev().skip(KEPT) {
        // another start may have been quicker
        let _ = fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Root;

    #[test]
    fn answers_do_not_pile_up() {
        let dir = tempfile::tempdir().expect("a folder");
        let memory = |number: usize| {
            let boot = Boot {
                kernel: format!("/k{number}").into(),
                root: Root::Initrd("/i".into()),
                kernel_params: String::new(),
                hello: None,
            };
            KeptAnswer::new(dir.path(), Path::new("/q"), &boot)
        };
        for number in 0..KEPT + 5 {
            memory(number).store(Accelerator::Tcg, "no KVM");
        }
        let left = fs::read_dir(dir.path().join("kvm-probe")).expect("made").count();
        assert_eq!(left, KEPT);
        assert!(memory(KEPT + 4).recall().is_some(), "the last one");
    }

    #[test]
    fn an_answer_is_kept_for_the_same_guest_only() {
        let dir = tempfile::tempdir().expect("a folder");
        let boot = |kernel: &str| Boot {
            kernel: kernel.into(),
            root: Root::Initrd("/i".into()),
            kernel_params: String::new(),
            hello: None,
        };
        let kept = KeptAnswer::new(dir.path(), Path::new("/q"), &boot("/k"));
        assert_eq!(kept.recall(), None);
        kept.store(Accelerator::Tcg, "QEMU ended\nmore");
        assert_eq!(kept.recall(), Some((Accelerator::Tcg, "QEMU ended".into())));
        assert_eq!(KeptAnswer::new(dir.path(), Path::new("/q"), &boot("/other")).recall(), None);
        let kept = fs::read_dir(dir.path().join("kvm-probe")).expect("listed");
        assert_eq!(kept.count(), 1, "no draft is left");
    }
}
