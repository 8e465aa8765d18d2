//! The pod's shared folder and who serves it: virtiofsd, or the VMM itself by 9p.
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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::agent::Storage;
use agent_api::paths;
use config::SharedFs;
use hypervisor::helper::{Helper, Program};
use hypervisor::{DaemonEnd, DaemonSocket, FileServer, Hypervisor, SharedDir, SharingKind, VmExit};
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
    folder: Arc<PodFolder>,
    server: Server,
}

/// Where the files of a pod's containers are on the host, and what of them is where. Jobs that make containers have it, so it
/// may live longer than who serves it.
#[derive(Debug)]
pub(crate) struct PodFolder {
    mounts: PathBuf,
    shelf: Mutex<Shelf>,
    watcher: Watcher,
    is_served: bool,
}

#[derive(Debug)]
enum Server {
    /// virtiofsd.
    VirtioFs(Helper, DaemonSocket),
    /// The VMM, in packets of so many bytes.
    NineP { msize: u32 },
    /// Nobody: only what comes by block devices reaches the guest.
    None,
}

impl Share {
    fn new(mounts: PathBuf, server: Server) -> Self {
        let (shelf, watcher) = Default::default();
        let is_served = !matches!(server, Server::None);
        Self { folder: Arc::new(PodFolder { mounts, shelf, watcher, is_served }), server }
    }

    /// Makes the two views and starts the daemon, where one is needed; returns the VMM's part too.
    pub(crate) async fn start(
        driver: &dyn Hypervisor,
        config: &config::Hypervisor,
        run: &mut RunDir,
    ) -> Result<(Self, Option<SharedDir>), Error> {
        let mounts = run.path().join("mounts");
        if config.shared_fs == SharedFs::None {
            return Ok((Self::new(mounts, Server::None), None));
        }
        let sharing = driver.capabilities().sharing;
        let daemon = match choose(driver.name(), sharing, config.shared_fs, || daemon::find(config))? {
            Served::ByDaemon(program, end) => Some((program, end)),
            Served::ByVmm => None,
            Served::Not => return Ok((Self::new(mounts, Server::None), None)),
        };
        let shared = views(&mounts, run)?;
        let Some((program, end)) = daemon else {
            let server = Server::NineP { msize: config.msize_9p };
            return Ok((Self::new(mounts, server), Some(packets(&shared)?)));
        };
        let (helper, dir) = serve(program, end, config, &shared, run).await?;
        Ok((Self::new(mounts, Server::VirtioFs(helper, end)), Some(dir)))
    }

    /// What a VM has of one that is saved before there is a pod.
    pub(crate) fn of_template(driver: &dyn Hypervisor, config: &config::Hypervisor) -> Vec<SharedDir> {
        let sharing = driver.capabilities().sharing;
        let served = choose(driver.name(), sharing, config.shared_fs, || daemon::find(config));
        kept(matches!(served, Ok(Served::ByVmm)))
    }

    /// What the VM has of it that this pod's is a clone of. Not looked up again: virtiofsd may have come or gone since.
    pub(crate) fn in_template(&self) -> Vec<SharedDir> {
        kept(matches!(self.server, Server::NineP { .. }))
    }

    /// One that another process has made in `folder`.
    pub(crate) fn adopt(folder: &Path, daemon: Helper) -> Self {
        // no other VMM comes in the place of one that was handed over
        Self::new(folder.join("mounts"), Server::VirtioFs(daemon, DaemonSocket::Connection))
    }

    /// A daemon for another VMM, in the place of that whose VMM is gone; returns what that one is given.
    pub(crate) async fn serve_again(
        &mut self,
        config: &config::Hypervisor,
        run: &mut RunDir,
    ) -> Result<Option<SharedDir>, Error> {
        self.stop().await;
        let shared = run.path().join(SHARED);
        let (daemon, end) = match &mut self.server {
            Server::VirtioFs(daemon, end) => (daemon, *end),
            Server::NineP { .. } => return packets(&shared).map(Some),
            Server::None => return Ok(None),
        };
        let program = daemon::find(config).ok_or_else(daemon::missing)?;
        let (helper, dir) = serve(program, end, config, &shared, run).await?;
        *daemon = helper;
        Ok(Some(dir))
    }

    /// Somebody else than the VMM works in the guest's memory.
    pub(crate) fn shares_memory(&self) -> bool {
        matches!(self.server, Server::VirtioFs(..))
    }

    /// Where the containers' files are.
    pub(crate) fn folder(&self) -> &Arc<PodFolder> {
        &self.folder
    }

    /// What the guest mounts with the sandbox.
    pub(crate) fn storage(&self) -> Option<Storage> {
        let (driver, kind, options) = match &self.server {
            Server::None => return None,
            Server::VirtioFs(..) => ("virtio-fs", "virtiofs", Vec::new()),
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
            Server::VirtioFs(helper, _) => Some(helper),
            _ => None,
        }
    }
}

impl PodFolder {
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
        if self.is_served {
            return Ok(());
        }
        Err(Error::Unsupported(format!(
            "shared_fs = \"none\" is set, and {what} reaches a virtual machine by a shared file system only: use a \
             block device for it, or set shared_fs = \"virtio-fs\""
        )))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // a job that hangs may keep the folder
        self.folder.watcher.end();
    }
}

/// Who is to serve.
#[derive(Debug, PartialEq, Eq)]
enum Served {
    /// This program, which the VMM reaches so.
    ByDaemon(PathBuf, DaemonSocket),
    ByVmm,
    Not,
}

/// What is wanted, as far as the driver has it and the host has a daemon.
fn choose(
    name: &str,
    sharing: &[SharingKind],
    wanted: SharedFs,
    find: impl FnOnce() -> Option<PathBuf>,
) -> Result<Served, Error> {
    let daemon = sharing.iter().find_map(|kind| match kind {
        SharingKind::VirtioFs(end) => Some(*end),
        SharingKind::NineP => None,
    });
    let has_packets = sharing.contains(&SharingKind::NineP);
    let lacks = |value: &str| {
        Err(Error::Unsupported(format!(
            "shared_fs = \"{value}\" is set, and hypervisor {name} does not have it: leave it out, or set it to \"none\""
        )))
    };
    match (wanted, daemon) {
        (SharedFs::None, _) => Ok(Served::Not),
        (SharedFs::VirtioFs, None) => lacks("virtio-fs"),
        (SharedFs::VirtioFs, Some(end)) => {
            find().map(|program| Served::ByDaemon(program, end)).ok_or_else(daemon::missing)
        }
        (SharedFs::VirtioNineP, _) if !has_packets => lacks("virtio-9p"),
        (SharedFs::VirtioNineP, _) => Ok(Served::ByVmm),
        (SharedFs::Auto, Some(end)) => match find() {
            Some(program) => Ok(Served::ByDaemon(program, end)),
            None if has_packets => {
                tracing::warn!("{}; the guest has its files by virtio-9p, which is slower", daemon::missing());
                Ok(Served::ByVmm)
            }
            None => Err(daemon::missing()),
        },
        (SharedFs::Auto, None) if has_packets => Ok(Served::ByVmm),
        (SharedFs::Auto, None) => {
            tracing::warn!("hypervisor {name} shares no folder: only block devices reach the guest");
            Ok(Served::Not)
        }
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
    end: DaemonSocket,
    config: &config::Hypervisor,
    shared: &Path,
    run: &mut RunDir,
) -> Result<(Helper, SharedDir), Error> {
    let daemon = Daemon::new(program).await?;
    let (listener, socket) = socket(run.path(), end).map_err(Error::host("virtiofsd's socket"))?;
    let listener = OwnedFd::from(listener);
    let args = daemon.arguments(config, shared, &listener)?;
    let program = Program::new("virtiofsd", "virtio_fs_daemon", &daemon.program, &args);
    let helper = Helper::spawn(&Program { fds: &[listener], ..program })?;
    run.push(Step::process(helper.pid())).map_err(Error::host("the undo journal"))?;
    open_files::tell(config);
    let server = FileServer::VirtioFs { socket, queue_size: config.virtio_fs_queue_size };
    Ok((helper, SharedDir { tag: TAG, server }))
}

fn kept(is_served_by_vmm: bool) -> Vec<SharedDir> {
    let folder = SharedDir { tag: TAG, server: FileServer::NineP { folder: None } };
    is_served_by_vmm.then_some(folder).into_iter().collect()
}

/// The folder for the VMM's own server.
fn packets(shared: &Path) -> Result<SharedDir, Error> {
    let folder = File::open(shared).map_err(Error::host(shared.display().to_string()))?;
    Ok(SharedDir { tag: TAG, server: FileServer::NineP { folder: Some(folder.into()) } })
}

/// Where the guest finds it.
pub(crate) fn guest_path(name: &str) -> String {
    format!("{}/{name}", paths::SHARED)
}

/// A listening socket, and the VMM's end of the way to it: a connection, then the socket is nameless by the time this returns,
/// or its path. It listens before the daemon exists, so nobody waits for a path to appear.
fn socket(folder: &Path, end: DaemonSocket) -> io::Result<(UnixListener, DaemonEnd)> {
    const NAME: &str = "virtiofsd.sock";
    // a socket's path has room for 107 bytes (unix(7)), and a pod's folder alone may need more
    let opened = File::open(folder)?;
    let path = format!("/proc/self/fd/{}/{NAME}", opened.as_raw_fd());
    match fs::remove_file(&path) {
        // of a daemon that was started again
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    if end == DaemonSocket::Path {
        return Ok((listener, DaemonEnd::Path(folder.join(NAME))));
    }
    let connection = UnixStream::connect(&path);
    fs::remove_file(&path)?;
    Ok((listener, DaemonEnd::Connection(connection?.into())))
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
        let (listener, connection) = socket(&folder, DaemonSocket::Connection).expect("made");
        assert!(matches!(connection, DaemonEnd::Connection(_)));
        listener.accept().expect("connected");
        assert_eq!(fs::read_dir(&folder).expect("listed").count(), 0);
    }

    #[test]
    fn a_vmm_that_connects_by_itself_finds_the_path() {
        let folder = tempfile::tempdir().expect("a folder");
        // twice: the second is in the place of one that is gone
        for _ in 0..2 {
            let (listener, end) = socket(folder.path(), DaemonSocket::Path).expect("made");
            let DaemonEnd::Path(path) = end else { panic!("a path: {end:?}") };
            UnixStream::connect(path).expect("connected");
            listener.accept().expect("accepted");
        }
    }

    #[test]
    fn a_host_without_virtiofsd_has_9p_unless_virtio_fs_was_asked_for() {
        let found = || Some(PathBuf::from("/virtiofsd"));
        let by_daemon = || Served::ByDaemon("/virtiofsd".into(), DaemonSocket::Connection);
        let all = [SharingKind::VirtioFs(DaemonSocket::Connection), SharingKind::NineP];
        assert_eq!(choose("x", &all, SharedFs::Auto, found).expect("fine"), by_daemon());
        assert_eq!(choose("x", &all, SharedFs::Auto, || None).expect("fine"), Served::ByVmm);
        assert_eq!(choose("x", &all, SharedFs::VirtioNineP, found).expect("fine"), Served::ByVmm);
        assert_eq!(choose("x", &all, SharedFs::None, found).expect("fine"), Served::Not);
        let error = choose("x", &all, SharedFs::VirtioFs, || None).expect_err("refused").to_string();
        assert!(error.starts_with("virtiofsd not found in /usr/libexec/virtiofsd, "), "{error}");
    }

    #[test]
    fn what_the_driver_does_not_have_is_refused_by_name_or_done_without() {
        let found = || Some(PathBuf::from("/virtiofsd"));
        for (wanted, value) in [(SharedFs::VirtioFs, "virtio-fs"), (SharedFs::VirtioNineP, "virtio-9p")] {
            let error = choose("x", &[], wanted, found).expect_err("refused").to_string();
            assert!(error.contains(&format!("shared_fs = \"{value}\"")) && error.contains("hypervisor x"), "{error}");
        }
        assert_eq!(choose("x", &[], SharedFs::Auto, found).expect("fine"), Served::Not);
        assert_eq!(choose("x", &[SharingKind::NineP], SharedFs::Auto, found).expect("fine"), Served::ByVmm);
        let by_path = [SharingKind::VirtioFs(DaemonSocket::Path)];
        let served = choose("x", &by_path, SharedFs::Auto, found).expect("fine");
        assert_eq!(served, Served::ByDaemon("/virtiofsd".into(), DaemonSocket::Path));
        choose("x", &by_path, SharedFs::Auto, || None).expect_err("no daemon, and nothing else");
    }

    #[test]
    fn without_a_server_what_needs_one_is_refused() {
        let share = Share::new("/m".into(), Server::None);
        let error = share.folder().must_serve("the mount on /data").expect_err("refused").to_string();
        assert!(error.contains("shared_fs = \"none\"") && error.contains("the mount on /data"), "{error}");
        assert_eq!((share.storage(), share.pid()), (None, None));
        assert!(share.in_template().is_empty());
        let share = Share::new("/m".into(), Server::NineP { msize: 8192 });
        assert!(matches!(share.in_template()[..], [SharedDir { server: FileServer::NineP { folder: None }, .. }]));
        share.folder().must_serve("anything").expect("served");
        let storage = share.storage().expect("some");
        assert_eq!((storage.driver.as_str(), storage.options.last().map(String::as_str)), ("9p", Some("msize=8192")));
    }
}
