//! The pod's shared folder and the virtiofsd that serves it.
//!
//! Two views of one folder: the shim mounts into `mounts`; virtiofsd serves `shared`, a read-only slave of it. So the
//! guest cannot make anything between the mount points, where the shim works by path, and what is mounted later appears
//! by propagation (mount_namespaces(7)).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hypervisor::helper::Helper;
use nix::mount::{MsFlags, mount};

use super::shelf::Shelf;
use super::watched::Watcher;
use crate::Error;
use crate::cleanup::{RunDir, Step};

/// A served folder.
#[derive(Debug)]
pub(crate) struct Share {
    mounts: PathBuf,
    shelf: Mutex<Shelf>,
    watcher: Watcher,
    /// The daemon.
    pub(crate) daemon: Helper,
}

impl Share {
    /// Makes the two views and starts the daemon; returns the VMM's connection to it too.
    pub(crate) fn start(config: &config::Hypervisor, run: &mut RunDir) -> Result<(Self, OwnedFd), Error> {
        let mounts = run.path().join("mounts");
        let shared = run.path().join(SHARED);
        for folder in [&mounts, &shared] {
            for step in [Step::Staging(folder.clone()), Step::Mounts(folder.clone())] {
                run.push(step).map_err(Error::host("the undo journal"))?;
            }
            fs::DirBuilder::new().mode(0o755).create(folder).map_err(Error::host(folder.display().to_string()))?;
        }
        bind(&mounts, &mounts)?;
        flags(&mounts, MsFlags::MS_PRIVATE)?;
        flags(&mounts, MsFlags::MS_SHARED)?;
        bind(&mounts, &shared)?;
        flags(&shared, MsFlags::MS_SLAVE)?;
        flags(&shared, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY)?;

        let (daemon, connection) = serve(config, &shared, run)?;
        let (shelf, watcher) = Default::default();
        Ok((Self { mounts, shelf, watcher, daemon }, connection))
    }

    /// A daemon for another VMM, in the place of that whose VMM is gone; returns the connection to it.
    pub(crate) async fn serve_again(
        &mut self,
        config: &config::Hypervisor,
        run: &mut RunDir,
    ) -> Result<OwnedFd, Error> {
        self.daemon.stop(Duration::ZERO).await;
        let (daemon, connection) = serve(config, &run.path().join(SHARED), run)?;
        self.daemon = daemon;
        Ok(connection)
    }

    /// The run folders of all sandboxes of this host.
    pub(crate) fn sandboxes(&self) -> &Path {
        self.mounts.parent().and_then(Path::parent).unwrap_or(&self.mounts)
    }

    /// What of the pod is where.
    pub(crate) fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who keeps the guest's copies of volumes up to date.
    pub(crate) fn watcher(&self) -> &Watcher {
        &self.watcher
    }

    /// Where `name` is to be mounted on the host.
    pub(crate) fn host_path(&self, name: &str) -> PathBuf {
        self.mounts.join(name)
    }
}

/// What is served, in the pod's folder.
const SHARED: &str = "shared";

fn serve(config: &config::Hypervisor, shared: &Path, run: &mut RunDir) -> Result<(Helper, OwnedFd), Error> {
    let (listener, connection) = socket(run.path()).map_err(Error::host("virtiofsd's socket"))?;
    let program = daemon_path(config)?;
    let listener = OwnedFd::from(listener);
    let args = arguments(&program, config, shared, &listener);
    let daemon = Helper::spawn("virtiofsd", "virtio_fs_daemon", &program, &args, &[listener])?;
    run.push(Step::process(daemon.pid())).map_err(Error::host("the undo journal"))?;
    Ok((daemon, connection.into()))
}

/// Where the guest finds it.
pub(crate) fn guest_path(name: &str) -> String {
    format!("{}/{name}", agent_api::paths::SHARED)
}

/// A listening socket and a connection to it, nameless by the time it returns. It listens before the daemon exists, so
/// nobody waits for a path to appear.
fn socket(folder: &Path) -> io::Result<(UnixListener, UnixStream)> {
    // a socket's path has room for 107 bytes (unix(7)), and a pod's folder alone may need more
    let folder = File::open(folder)?;
    let path = format!("/proc/self/fd/{}/virtiofsd.sock", folder.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    let connection = UnixStream::connect(&path);
    fs::remove_file(&path)?;
    Ok((listener, connection?))
}

fn daemon_path(config: &config::Hypervisor) -> Result<PathBuf, Error> {
    const USUAL: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];
    if let Some(path) = &config.virtio_fs_daemon {
        return Ok(path.clone());
    }
    USUAL.iter().map(PathBuf::from).find(|path| path.is_file()).ok_or_else(|| {
        Error::Unsupported(format!(
            "virtiofsd not found in {}: install qemu-system-common or virtiofsd, or set `virtio_fs_daemon` in \
             configuration.toml",
            USUAL.join(", ")
        ))
    })
}

/// QEMU's own C daemon takes `-o` lists, the Rust one long options; they are told apart by where they come from.
fn arguments(program: &Path, config: &config::Hypervisor, shared: &Path, listener: &OwnedFd) -> Vec<String> {
    let cache = config.virtio_fs_cache.as_str();
    let fd = listener.as_raw_fd();
    // where Kata's default path is only a link to it
    let program = program.canonicalize().unwrap_or_else(|_| program.to_owned());
    let is_c = program.components().any(|part| part.as_os_str() == "qemu");
    let mut args = if is_c {
        // the C daemon has no "never" and "metadata"
        let cache = match cache {
            "never" | "metadata" => "none",
            other => other,
        };
        let options = format!("source={},cache={cache},sandbox=namespace,announce_submounts,xattr", shared.display());
        vec![format!("--fd={fd}"), "-f".into(), "-o".into(), options]
    } else {
        vec![
            format!("--fd={fd}"),
            format!("--shared-dir={}", shared.display()),
            format!("--cache={cache}"),
            "--sandbox=namespace".into(),
            "--announce-submounts".into(),
            "--xattr".into(),
        ]
    };
    args.extend(config.virtio_fs_extra_args.iter().cloned());
    args
}

fn bind(from: &Path, to: &Path) -> Result<(), Error> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(Error::host(format!(
        "bind mount of {} on {}",
        from.display(),
        to.display()
    )))
}

fn flags(at: &Path, flags: MsFlags) -> Result<(), Error> {
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>)
        .map_err(Error::host(format!("mount flags {flags:?} of {}", at.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_may_have_a_long_name() {
        let root = tempfile::tempdir().expect("a folder");
        let folder = root.path().join("k8s.io@".to_owned() + &"a".repeat(128));
        fs::create_dir(&folder).expect("made");
        let (listener, _connection) = socket(&folder).expect("made");
        listener.accept().expect("connected");
        assert_eq!(fs::read_dir(&folder).expect("listed").count(), 0);
    }
}
