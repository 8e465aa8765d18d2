//! A pool of ready VMs: a pod takes one that runs already, with its folder mounted and its code warm.
//!
//! Three kinds of processes: the `server` holds the endpoint and keeps the pool full; a `keeper` for each VM is the parent of
//! its processes, before and after it is handed out; the shim `take`s it. `make` and `warm` are how a keeper gets it
//! ready, `wire` is how they talk.

mod keeper;
mod make;
mod server;
mod take;
mod warm;
mod wire;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hypervisor::{Size, VmExit};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use self::keeper::keep;
pub use self::server::serve;
pub(crate) use self::take::{Remains, Taken, take};
use self::wire::Wire;
use crate::Error;
use crate::machine::{Env, plain_spec};

/// Keepers' run folders are beside those of sandboxes: what a guest may write is all below one folder.
const ROOT: &str = "/run/kata-containers/sandboxes";
/// They begin so, and the keeper's process id follows; a sandbox' has one such sign more.
const NAME: &str = "pool@";
/// How long another process of the pool may take for an answer that it has at hand.
const ANSWER: Duration = Duration::from_secs(5);

/// Asked of the server, once a connection.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// A VM of this kind, for a process that has this mount namespace.
    Take { key: String, mounts: u64 },
    /// What there is.
    List,
    /// End; the connection is closed when it has.
    End,
}

/// To the one who asked: by the server, or by the keeper that the connection was passed to.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// There is none, and why.
    None(String),
    /// To `List`.
    List(Vec<Info>),
    /// Here it is; with the agent's channel, the two processes, and the VMM's sockets.
    Handed(Handed),
    /// One of its processes has ended.
    Ended { part: Part, exit: VmExit },
}

/// A VM that is handed out.
#[derive(Debug, Serialize, Deserialize)]
struct Handed {
    /// The keeper's run folder.
    folder: PathBuf,
    /// Process ids.
    vmm: u32,
    daemon: u32,
    /// Children of the daemon.
    others: Vec<u32>,
    /// See [`hypervisor::Lent`].
    about: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Part {
    Vmm,
    Daemon,
}

/// From the server to a keeper.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// The VM goes to the one at the other end of the connection that comes with this.
    Serve,
}

/// From a keeper to the server.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// The VM can be taken.
    Ready {
        vmm: u32,
        /// It is a clone of a template.
        is_clone: bool,
    },
    /// The last word.
    Failed(String),
}

/// A VM that waits, as people are shown it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    /// The keeper's process.
    pub keeper: u32,
    /// The VMM's; `None` while it is being made.
    pub vmm: Option<u32>,
    /// It is a clone of a template.
    pub is_clone: bool,
    /// Since when it is what it is, seconds.
    pub age: u64,
}

/// The driver cannot have one.
fn no_hand_over(env: &Env) -> Error {
    let driver = env.hypervisor.name();
    Error::Unsupported(format!("vm_cache_number is set, but hypervisor {driver} cannot hand over VMs: set it to 0"))
}

/// The run folder of a keeper that lives, or that nobody has waited for: named by its start too, because the number may
/// be another's one day, while a pod still has this folder in its journal.
fn folder(keeper: u32) -> PathBuf {
    let started = crate::cleanup::start_time(keeper).unwrap_or_default();
    Path::new(ROOT).join(format!("{NAME}{keeper}-{started}"))
}

/// What kind of VM a pod of this size (or the configured one) needs: what shapes the VM, and how its folder is served.
async fn key(env: &Env, size: Option<Size>) -> Result<String, Error> {
    let vm = env.hypervisor.fingerprint(&plain_spec(env, size, Vec::new())).await?;
    let config = &env.config.hypervisor;
    let served = format!(
        "{} {:?} {:?} {:?} {} {:?}",
        env!("CARGO_PKG_VERSION"),
        config.shared_fs,
        config.virtio_fs_daemon,
        config.virtio_fs_cache,
        config.virtio_fs_queue_size,
        config.virtio_fs_extra_args
    );
    let digest = Sha256::digest(served);
    Ok(digest.iter().take(4).fold(vm + "-", |text, byte| text + &format!("{byte:02x}")))
}

/// Which mount namespace this process is in.
fn mount_namespace() -> io::Result<u64> {
    Ok(std::fs::metadata("/proc/self/ns/mnt")?.ino())
}

/// The VMs that wait in the pool; `None` when there is no pool.
///
/// # Errors
/// It does not answer.
pub async fn list(endpoint: &Path) -> Result<Option<Vec<Info>>, Error> {
    let Some(wire) = reach(endpoint)? else { return Ok(None) };
    let answer = async {
        wire.send(&Ask::List, &[]).await?;
        match wire.receive().await? {
            Some((Answer::List(all), _)) => Ok(all),
            _ => Err(io::Error::other("unexpected answer")),
        }
    };
    let answer = tokio::time::timeout(ANSWER, answer).await.unwrap_or_else(|late| Err(late.into()));
    answer.map(Some).map_err(failed(endpoint))
}

/// Ends the pool and returns when it has; `false` when there is none.
///
/// # Errors
/// It does not end.
pub async fn end(endpoint: &Path) -> Result<bool, Error> {
    let Some(wire) = reach(endpoint)? else {
        // of a server that was killed
        let _ = std::fs::remove_file(endpoint);
        server::sweep();
        return Ok(false);
    };
    let ended = async {
        wire.send(&Ask::End, &[]).await?;
        while wire.receive::<Answer>().await?.is_some() {}
        Ok::<_, io::Error>(())
    };
    let ended = tokio::time::timeout(ANSWER * 6, ended).await.unwrap_or_else(|late| Err(late.into()));
    ended.map(|()| true).map_err(failed(endpoint))
}

/// A connection to the pool's server; `None` when there is none.
fn reach(endpoint: &Path) -> Result<Option<Wire>, Error> {
    match Wire::connect(endpoint) {
        Ok(wire) => Ok(Some(wire)),
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) => Ok(None),
        Err(error) => Err(failed(endpoint)(error)),
    }
}

fn failed(endpoint: &Path) -> impl FnOnce(io::Error) -> Error {
    Error::host(format!("connecting to the pool at {}", endpoint.display()))
}
