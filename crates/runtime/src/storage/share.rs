//! The pod's shared folder and who serves it: virtiofsd, or QEMU itself by 9p.
//!
//! Two views of one folder: the shim mounts into `mounts`; what is served is `shared`, a read-only slave of it. So the
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

use agent_api::agent::Storage;
use agent_api::paths;
use config::SharedFs;
use hypervisor::helper::{Helper, Pages};
use hypervisor::{FileServer, SharedDir, VmExit};
use nix::mount::{MsFlags, mount};

use super::daemon::{self, Daemon};
use super::open_files;
use super::shelf::Shelf;
use super::watched::Watcher;
use crate::Error;
use crate::cleanup::{RunDir, Step};

/// A served folder, or none.
#[derive(Debug)]
pub(crate) struct Share {
    mounts: PathBuf,
    shelf: Mutex<Shelf>,
    watcher: Watcher,
    server: Server,
}

#[derive(Debug)]
enum Server {
    /// virtiofsd.
    VirtioFs(Helper),
    /// QEMU, in packets of so many bytes.
    NineP { msize: u32 },
    /// Nobody: only what comes by block devices reaches the guest.
    None,
}

impl Share {
    fn new(mounts: PathBuf, server: Server) -> Self {
        let (shelf, watcher) = Default::default();
        Self { mounts, shelf, watcher, server }
    }

    /// Makes the two views and starts the daemon, where one is needed; returns the VMM's part too.
    pub(crate) async fn start(
        config: &config::Hypervisor,
        run: &mut RunDir,
    ) -> Result<(Self, Option<SharedDir>), Error> {
        let mounts = run.path().join("mounts");
        if config.shared_fs == SharedFs::None {
            return Ok((Self::new(mounts, Server::None), None));
        }
        let daemon = choose(config.shared_fs, || daemon::find(config))?;
        let shared = views(&mounts, run)?;
        let Some(program) = daemon else {
            let server = Server::NineP { msize: config.msize_9p };
            return Ok((Self::new(mounts, server), Some(packets(&shared)?)));
        };
        let (helper, dir) = serve(program, config, &shared, run).await?;
        Ok((Self::new(mounts, Server::VirtioFs(helper)), Some(dir)))
    }

    /// What a VM has of one that is saved before there is a pod.
    pub(crate) fn of_template(config: &config::Hypervisor) -> Vec<SharedDir> {
        kept(match config.shared_fs {
            SharedFs::VirtioNineP => true,
            SharedFs::Auto => daemon::find(config).is_none(),
            SharedFs::VirtioFs | SharedFs::None => false,
        })
    }

    /// What the VM has of it that this pod's is a clone of. Not looked up again: virtiofsd may have come or gone since.
    pub(crate) fn in_template(&self) -> Vec<SharedDir> {
        kept(matches!(self.server, Server::NineP { .. }))
    }

    /// One that another process has made in `folder`.
    pub(crate) fn adopt(folder: &Path, daemon: Helper) -> Self {
        Self::new(folder.join("mounts"), Server::VirtioFs(daemon))
    }

    /// A daemon for another VMM, in the place of that whose VMM is gone; returns what that one is given.
    pub(crate) async fn serve_again(
        &mut self,
        config: &config::Hypervisor,
        run: &mut RunDir,
    ) -> Result<Option<SharedDir>, Error> {
        self.stop().await;
        let shared = run.path().join(SHARED);
        let daemon = match &mut self.server {
            Server::VirtioFs(daemon) => daemon,
            Server::NineP { .. } => return packets(&shared).map(Some),
            Server::None => return Ok(None),
        };
        let program = daemon::find(config).ok_or_else(daemon::missing)?;
        let (helper, dir) = serve(program, config, &shared, run).await?;
        *daemon = helper;
        Ok(Some(dir))
    }

    /// Somebody else than the VMM works in the guest's memory.
    pub(crate) fn shares_memory(&self) -> bool {
        matches!(self.server, Server::VirtioFs(_))
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

    /// Where the parts of a root file system are mounted that the guest does not see by themselves.
    pub(crate) fn layers_path(&self, name: &str) -> PathBuf {
        self.mounts.with_file_name("layers").join(name)
    }

    /// Where `name` is to be mounted on the host.
    pub(crate) fn host_path(&self, name: &str) -> PathBuf {
        self.mounts.join(name)
    }

    /// Refuses `what`, which only a shared file system brings into the guest, when there is none.
    pub(crate) fn must_serve(&self, what: &str) -> Result<(), Error> {
        match self.server {
            Server::None => Err(Error::Unsupported(format!(
                "shared_fs = \"none\" is set, and {what} reaches a virtual machine by a shared file system only: use a \
                 block device for it, or set shared_fs = \"virtio-fs\""
            ))),
            _ => Ok(()),
        }
    }

    /// What the guest mounts with the sandbox.
    pub(crate) fn storage(&self) -> Option<Storage> {
        let (driver, kind, options) = match &self.server {
            Server::None => return None,
            Server::VirtioFs(_) => ("virtio-fs", "virtiofs", Vec::new()),
            // reads and writes go to the host at once; only what is mapped is kept, until it is unmapped
            Server::NineP { msize } => {
                // the times of reading are the host's: a guest's own would be written nowhere, but makes work of them
                let fixed = ["trans=virtio", "version=9p2000.L", "cache=mmap", "directio", "posixacl", "noatime"];
                let msize = format!("msize={msize}");
                ("9p", "9p", fixed.iter().map(ToString::to_string).chain([msize]).collect())
            }
        };
        Some(Storage {
            driver: driver.into(),
            source: TAG.into(),
            fstype: kind.into(),
            mount_point: paths::SHARED.into(),
            options,
            ..Default::default()
        })
    }

    /// The daemon's process.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.daemon().map(Helper::pid)
    }

    /// Resolves when the daemon has ended, with how; never without one.
    pub(crate) fn ended(&self) -> impl Future<Output = Option<VmExit>> + Send + use<> {
        let exit = self.daemon().map(Helper::exit);
        async move {
            match exit {
                Some(mut exit) => exit.wait_for(Option::is_some).await.ok().and_then(|end| end.clone()),
                None => std::future::pending().await,
            }
        }
    }

    /// Ends the daemon.
    pub(crate) async fn stop(&self) {
        if let Some(daemon) = self.daemon() {
            daemon.stop(Duration::ZERO).await;
        }
    }

    fn daemon(&self) -> Option<&Helper> {
        match &self.server {
            Server::VirtioFs(helper) => Some(helper),
            _ => None,
        }
    }
}

/// The daemon's program where virtio-fs is to be had and wanted; `None` is 9p.
fn choose(wanted: SharedFs, find: impl FnOnce() -> Option<PathBuf>) -> Result<Option<PathBuf>, Error> {
    match wanted {
        SharedFs::VirtioFs => find().map(Some).ok_or_else(daemon::missing),
        SharedFs::Auto => Ok(find().or_else(|| {
            tracing::warn!("{}; the guest has its files by virtio-9p, which is slower", daemon::missing());
            None
        })),
        SharedFs::VirtioNineP | SharedFs::None => Ok(None),
    }
}

/// Makes `mounts` and the view of it that is served.
fn views(mounts: &Path, run: &mut RunDir) -> Result<PathBuf, Error> {
    let shared = run.path().join(SHARED);
    for folder in [mounts, &shared] {
        for step in [Step::Staging(folder.to_owned()), Step::Mounts(folder.to_owned())] {
            run.push(step).map_err(Error::host("the undo journal"))?;
        }
        fs::DirBuilder::new().mode(0o755).create(folder).map_err(Error::host(folder.display().to_string()))?;
    }
    bind(mounts, mounts)?;
    flags(mounts, MsFlags::MS_PRIVATE)?;
    flags(mounts, MsFlags::MS_SHARED)?;
    bind(mounts, &shared)?;
    flags(&shared, MsFlags::MS_SLAVE)?;
    flags(&shared, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY)?;
    Ok(shared)
}

/// What is served, in the pod's folder.
const SHARED: &str = "shared";

/// The guest's name for it.
const TAG: &str = paths::SHARE_TAG;

async fn serve(
    program: PathBuf,
    config: &config::Hypervisor,
    shared: &Path,
    run: &mut RunDir,
) -> Result<(Helper, SharedDir), Error> {
    let daemon = Daemon::new(program).await?;
    let (listener, connection) = socket(run.path()).map_err(Error::host("virtiofsd's socket"))?;
    let listener = OwnedFd::from(listener);
    let args = daemon.arguments(config, shared, &listener)?;
    let helper =
        Helper::spawn("virtiofsd", "virtio_fs_daemon", &daemon.program, &args, &[], &[listener], Pages::AsHost)?;
    run.push(Step::process(helper.pid())).map_err(Error::host("the undo journal"))?;
    open_files::tell(config);
    let server = FileServer::VirtioFs { socket: connection.into(), queue_size: config.virtio_fs_queue_size };
    Ok((helper, SharedDir { tag: TAG, server }))
}

fn kept(is_served_by_qemu: bool) -> Vec<SharedDir> {
    let folder = SharedDir { tag: TAG, server: FileServer::NineP { folder: None } };
    is_served_by_qemu.then_some(folder).into_iter().collect()
}

/// The folder for QEMU's own server.
fn packets(shared: &Path) -> Result<SharedDir, Error> {
    let folder = File::open(shared).map_err(Error::host(shared.display().to_string()))?;
    Ok(SharedDir { tag: TAG, server: FileServer::NineP { folder: Some(folder.into()) } })
}

/// Where the guest finds it.
pub(crate) fn guest_path(name: &str) -> String {
    format!("{}/{name}", paths::SHARED)
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

    #[test]
    fn a_host_without_virtiofsd_has_9p_unless_virtio_fs_was_asked_for() {
        let found = || Some(PathBuf::from("/virtiofsd"));
        assert_eq!(choose(SharedFs::Auto, found).expect("fine"), found());
        assert_eq!(choose(SharedFs::Auto, || None).expect("fine"), None);
        assert_eq!(choose(SharedFs::VirtioNineP, found).expect("fine"), None);
        let error = choose(SharedFs::VirtioFs, || None).expect_err("refused").to_string();
        assert!(error.starts_with("virtiofsd not found in /usr/libexec/virtiofsd, "), "{error}");
    }

    #[test]
    fn without_a_server_what_needs_one_is_refused() {
        let share = Share::new("/m".into(), Server::None);
        let error = share.must_serve("the mount on /data").expect_err("refused").to_string();
        assert!(error.contains("shared_fs = \"none\"") && error.contains("the mount on /data"), "{error}");
        assert_eq!((share.storage(), share.pid()), (None, None));
        assert!(share.in_template().is_empty());
        let share = Share::new("/m".into(), Server::NineP { msize: 8192 });
        assert!(matches!(share.in_template()[..], [SharedDir { server: FileServer::NineP { folder: None }, .. }]));
        share.must_serve("anything").expect("served");
        let storage = share.storage().expect("some");
        assert_eq!((storage.driver.as_str(), storage.options.last().map(String::as_str)), ("9p", Some("msize=8192")));
    }
}
