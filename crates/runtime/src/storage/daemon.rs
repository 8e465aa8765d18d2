//! virtiofsd: which program it is, which of its two makes, and what either is told.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use config::{FsCache, Word as _};
use tokio::process::Command;

use crate::Error;

const USUAL: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];
/// Answers of programs that were asked, until the host's next boot.
const ANSWERS: &str = "/run/kata-containers/virtiofsd";
/// How long a program may take to print its help.
const LIMIT: Duration = Duration::from_secs(5);

/// A program and its make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Daemon {
    pub(super) program: PathBuf,
    make: Make,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Make {
    /// The one in C: takes `-o` lists.
    C,
    /// The one of Rust: takes long options.
    Rust,
}

/// The program that the configuration names, or one at a usual place; `None` when there is none.
pub(super) fn find(config: &config::Hypervisor) -> Option<PathBuf> {
    match &config.virtio_fs_daemon {
        Some(path) => Some(path.clone()),
        None => USUAL.iter().map(PathBuf::from).find(|path| path.is_file()),
    }
}

/// What to say when there is none.
pub(super) fn missing() -> Error {
    Error::Unsupported(format!(
        "virtiofsd not found in {}: install qemu-system-common or virtiofsd, or set `virtio_fs_daemon` in \
         configuration.toml, or shared_fs = \"virtio-9p\"",
        USUAL.join(", ")
    ))
}

impl Daemon {
    /// Asks the program for its make, once for as long as host and program are the same: the path says nothing, since
    /// Kata's default path is a link to either.
    pub(super) async fn new(program: PathBuf) -> Result<Self, Error> {
        let known = answer_file(&program);
        let remembered = known.as_ref().and_then(|file| fs::read_to_string(file).ok());
        let make = match remembered.as_deref() {
            Some("C") => Make::C,
            Some("Rust") => Make::Rust,
            _ => {
                let make = ask(&program).await?;
                if let Some(Err(error)) = known.map(|file| remember(&file, make)) {
                    tracing::warn!(%error, "cannot cache which kind of virtiofsd this is");
                }
                make
            }
        };
        Ok(Self { program, make })
    }

    /// Serves `shared` to whoever connects to `listener`.
    pub(super) fn arguments(
        &self,
        config: &config::Hypervisor,
        shared: &Path,
        listener: &OwnedFd,
    ) -> Result<Vec<String>, Error> {
        let (fd, shared) = (listener.as_raw_fd(), shared.display());
        let mut args = match self.make {
            Make::C => {
                let cache = match config.virtio_fs_cache {
                    FsCache::Never => "none",
                    FsCache::Auto => "auto",
                    FsCache::Always => "always",
                    FsCache::Metadata => return Err(self.no_metadata()),
                };
                let options =
                    format!("source={shared},cache={cache},sandbox=namespace,announce_submounts,xattr,posix_acl");
                vec![format!("--fd={fd}"), "-f".into(), "-o".into(), options]
            }
            Make::Rust => vec![
                format!("--fd={fd}"),
                format!("--shared-dir={shared}"),
                format!("--cache={}", config.virtio_fs_cache.as_str()),
                "--sandbox=namespace".into(),
                "--announce-submounts".into(),
                "--xattr".into(),
                "--posix-acl".into(),
            ],
        };
        args.extend(config.virtio_fs_extra_args.iter().cloned());
        Ok(args)
    }

    fn no_metadata(&self) -> Error {
        Error::Unsupported(format!(
            "virtio_fs_cache = \"metadata\": {} is the C virtiofsd, which does not have it: set \"never\", \"auto\" or \
             \"always\", or set `virtio_fs_daemon` to the Rust virtiofsd",
            self.program.display()
        ))
    }
}

/// Named by everything that the answer depends on.
fn answer_file(program: &Path) -> Option<PathBuf> {
    let meta = fs::metadata(program).ok()?;
    let name = format!("{}-{}-{}-{}", meta.dev(), meta.ino(), meta.size(), meta.ctime_nsec());
    Some(Path::new(ANSWERS).join(name))
}

fn remember(file: &Path, make: Make) -> std::io::Result<()> {
    // written whole beside it and renamed: another start never reads a half word
    let draft = file.with_extension(std::process::id().to_string());
    fs::create_dir_all(ANSWERS)?;
    fs::write(&draft, if make == Make::C { "C" } else { "Rust" })?;
    fs::rename(&draft, file)
}

async fn ask(program: &Path) -> Result<Make, Error> {
    let refused = |why: String| {
        Error::Unsupported(format!("virtio_fs_daemon = {:?}: {why}: set the path of a virtiofsd", program.display()))
    };
    let mut command = Command::new(program);
    let asked = command.arg("--help").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(LIMIT, asked).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => return Err(refused("no such file".into())),
        Ok(Err(error)) => return Err(refused(format!("cannot be started ({error})"))),
        Err(_) => return Err(refused(format!("did not print its --help within {LIMIT:?}"))),
    };
    let said = [output.stdout, output.stderr].concat();
    make_of(&String::from_utf8_lossy(&said)).ok_or_else(|| refused("is not a virtiofsd, by its --help".into()))
}

/// By the options that each needs.
fn make_of(help: &str) -> Option<Make> {
    match (help.contains("--shared-dir"), help.contains("-o source=")) {
        (true, _) => Some(Make::Rust),
        (false, true) => Some(Make::C),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn config(toml: &str) -> config::Hypervisor {
        config::Config::parse(&format!("[hypervisor.qemu]\n{toml}"), Path::new("/c")).expect("right").hypervisor
    }

    fn arguments(make: Make, toml: &str) -> Result<String, Error> {
        let listener = OwnedFd::from(tempfile::tempfile().expect("a file"));
        let daemon = Daemon { program: "/d".into(), make };
        daemon.arguments(&config(toml), Path::new("/shared"), &listener).map(|args| args.join(" "))
    }

    #[test]
    fn each_make_has_its_own_words() {
        let c = arguments(Make::C, "virtio_fs_cache = \"never\"").expect("fine");
        assert!(c.contains("-f -o source=/shared,cache=none,") && c.ends_with(" --thread-pool-size=1"), "{c}");
        let extra = "virtio_fs_cache = \"metadata\"\nvirtio_fs_extra_args = [\"--allow-direct-io\"]";
        let rust = arguments(Make::Rust, extra).expect("fine");
        assert!(rust.contains("--shared-dir=/shared --cache=metadata "), "{rust}");
        assert!(rust.ends_with(" --announce-submounts --xattr --posix-acl --allow-direct-io"), "{rust}");
    }

    #[test]
    fn what_a_make_does_not_have_is_refused() {
        let error = arguments(Make::C, "virtio_fs_cache = \"metadata\"").expect_err("refused").to_string();
        assert!(error.contains("/d is the C virtiofsd"), "{error}");
    }

    #[tokio::test]
    async fn a_program_is_told_by_its_help() {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("virtiofsd");
        for (help, make) in [
            ("usage: virtiofsd [options]\n    -o source=PATH             shared directory tree", Some(Make::C)),
            ("Usage: virtiofsd [OPTIONS]\n      --shared-dir <SHARED_DIR>", Some(Make::Rust)),
            ("Usage: true", None),
        ] {
            fs::write(&program, format!("#!/bin/sh\ncat <<end\n{help}\nend\n")).expect("written");
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("changed");
            let asked = ask(&program).await;
            assert_eq!(asked.as_ref().ok(), make.as_ref(), "{asked:?}");
        }
        let error = ask(&folder.path().join("not")).await.expect_err("missing").to_string();
        assert!(error.contains("no such file"), "{error}");
    }
}
