//! `start`: one server process a pod, listening before containerd is told where. `delete`: what a dead server left.
#![allow(unsafe_code, reason = "the inherited socket is taken over by its number")]

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp};
use runtime::pod::Role;
use runtime::{ContainerId, cleanup};
use sha2::{Digest, Sha256};

use crate::args::Args;
use crate::handshake;

/// Sandboxes' run folders: `<namespace>@<id>@<hash of containerd's address>`, by a sign that
/// neither may have.
pub(crate) const RUN_ROOT: &str = "/run/kata-containers/sandboxes";
/// Where containerd's shims have their sockets, unless containerd says otherwise.
const SOCKET_DIR: &str = "/run/containerd/s";
/// The server inherits its listening socket under this number.
const SOCKET_FD: i32 = 3;
/// And under this one a pipe to its `start`.
const READY_FD: i32 = 4;
/// Most that it tells of a failure, bytes.
const WORD_LIMIT: u64 = 4096;

/// The namespace and id as path-safe names, and the run folder that they make.
pub(crate) fn run_dir(args: &Args) -> Result<(ContainerId, PathBuf)> {
    let id = ContainerId::try_from(args.id.as_str())?;
    let namespace = ContainerId::try_from(args.namespace.as_str()).context("containerd's namespace (-namespace)")?;
    // two containerds may use the same names
    let node = &hex(&Sha256::digest(&args.address))[..8];
    let name = format!("{namespace}@{id}@{node}");
    Ok((id, Path::new(RUN_ROOT).join(name)))
}

/// Starts a server for the pod, or finds the one that serves it; writes the answer for containerd on stdout.
pub(crate) fn start(args: &Args) -> Result<()> {
    let (id, run_dir) = run_dir(args)?;
    let bundle = std::env::current_dir().context("reading the bundle's path")?;
    let handshake = handshake::read(&args.id, &args.namespace)?;
    let group = sandbox_of(&bundle)?.unwrap_or_else(|| id.as_str().to_owned());
    let place = handshake.socket_dir.as_deref().unwrap_or(Path::new(SOCKET_DIR));
    let mut path = place.join(socket_name(args, &group));
    if group == id.as_str() {
        make_room(&run_dir, &bundle)?;
        // before the socket is there, because `delete` finds it by this
        write_address(&path)?;
        let listener = listen(&path)?;
        let outcome = spawn_server(args, &listener, &handshake.ttrpc_address)
            .and_then(|pid| fs::write("shim.pid", pid.to_string()).context("writing shim.pid into the bundle"));
        if let Err(error) = outcome {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
    } else {
        // a container of a pod that runs: its server is the pod's, wherever sockets were wanted when that started
        path = bundle.parent().and_then(|all| read_address(&all.join(&group))).unwrap_or(path);
        UnixStream::connect(&path).with_context(|| format!("the shim of sandbox {group} does not answer"))?;
        write_address(&path)?;
    }
    let address = format!("unix://{}", path.display());
    let mut stdout = std::io::stdout();
    stdout.write_all(&handshake.answer(&address)?)?;
    stdout.flush().context("answering containerd")
}

/// After the server is gone: undoes what it left, and tells containerd an exit status.
pub(crate) fn delete(args: &Args) -> Result<()> {
    let (id, run_dir) = run_dir(args)?;
    let bundle = if args.bundle.is_empty() { std::env::current_dir()? } else { PathBuf::from(&args.bundle) };
    let group = sandbox_of(&bundle).ok().flatten().unwrap_or_else(|| id.as_str().to_owned());
    if group == id.as_str() {
        // containerd deletes only what it has given up; a server that still runs is stuck, or was never connected to
        cleanup::evict(&run_dir).with_context(|| format!("cleaning up {}", run_dir.display()))?;
        // by its name it is ours and no other pod's
        let name = socket_name(args, &group);
        let written = read_address(&bundle).filter(|path| path.file_name() == Some(name.as_ref()));
        let _ = fs::remove_file(written.unwrap_or_else(|| Path::new(SOCKET_DIR).join(name)));
    }
    after_a_crash(&id, &bundle);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let response = DeleteResponse {
        exit_status: 128 + 9,
        exited_at: MessageField::some(Timestamp {
            seconds: now.as_secs() as i64,
            nanos: now.subsec_nanos() as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    std::io::stdout().write_all(&response.write_to_bytes()?).context("answering containerd")
}

/// What its hooks were promised. A bundle that cannot be read has none that anybody knows of.
fn after_a_crash(id: &ContainerId, bundle: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    if let Ok(runtime) = runtime {
        let _ = runtime.block_on(runtime::hooks::after_a_crash(id, bundle));
    }
}

/// The listening socket that `start` made, and where it is told how the server's start went.
pub(crate) fn inherited() -> Result<(UnixListener, fs::File)> {
    // SAFETY: `start` put both there for this process alone, and this is called once, first of all.
    let (listener, ready) = unsafe { (UnixListener::from_raw_fd(SOCKET_FD), fs::File::from_raw_fd(READY_FD)) };
    listener.local_addr().context("no socket was inherited: this program is run by containerd, see -help")?;
    listener.set_nonblocking(true)?;
    for fd in [listener.as_fd(), ready.as_fd()] {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    Ok((listener, ready))
}

/// What the server says when it serves; anything else is why it does not.
pub(crate) const READY: &str = "ready";

/// Tells `start`, once.
pub(crate) fn tell(mut ready: fs::File, word: &str) -> Result<()> {
    ready.write_all(word.as_bytes()).context("reporting to `start`")
}

/// A start that follows a broken one finds a clean host; a sandbox that lives elsewhere is left alone.
fn make_room(run_dir: &Path, bundle: &Path) -> Result<()> {
    if !run_dir.exists() {
        return Ok(());
    }
    match cleanup::owner(run_dir) {
        Some(owner) if owner.bundle == bundle => cleanup::evict(run_dir),
        _ => cleanup::clean(run_dir),
    }
    .with_context(|| format!("removing what an earlier sandbox of this name left in {}", run_dir.display()))
}

fn listen(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        bail!("another shim listens at {}: delete its task first", path.display());
    }
    // nobody answers, so it is a dead shim's
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| path.display().to_string());
        }
        _ => {}
    }
    if let Some(place) = path.parent() {
        fs::create_dir_all(place)
            .with_context(|| format!("creating {}, the folder of the shims' sockets", place.display()))?;
    }
    let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(|| path.display().to_string())?;
    Ok(listener)
}

fn spawn_server(args: &Args, listener: &UnixListener, ttrpc_address: &str) -> Result<u32> {
    let mut command = Command::new(std::env::current_exe().context("reading the path of this program")?);
    command
        .args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address])
        .env("TTRPC_ADDRESS", ttrpc_address)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(crate::logger::open().map_or_else(|_| Stdio::null(), Stdio::from))
        .process_group(0);
    if args.debug {
        command.arg("-debug");
    }
    let (told, ready) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("creating a pipe to the shim's server")?;
    // out of the way of the numbers that they get
    let high = |fd: BorrowedFd<'_>| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(READY_FD + 1));
    let (socket, pipe) = (high(listener.as_fd())?, high(ready.as_fd())?);
    // SAFETY: both were just made and belong to nobody else.
    let (socket, pipe) = unsafe { (OwnedFd::from_raw_fd(socket), OwnedFd::from_raw_fd(pipe)) };
    let passed = [(socket.as_raw_fd(), SOCKET_FD), (pipe.as_raw_fd(), READY_FD)];
    // SAFETY: dup2 is async-signal-safe; the descriptors are open until the spawn returns.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in passed {
                if libc::dup2(from, to) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let pid = command.spawn().context("starting the shim's server")?.id();
    drop((socket, pipe, ready));
    let mut word = String::new();
    fs::File::from(told)
        .take(WORD_LIMIT)
        .read_to_string(&mut word)
        .context("reading the result of the server's start")?;
    match word.as_str() {
        READY => Ok(pid),
        "" => bail!("the shim's server exited during its start: see containerd's log"),
        why => bail!("starting the shim's server: {why}"),
    }
}

/// As containerd's own shims name theirs: a hash of everything that tells two pods apart.
fn socket_name(args: &Args, group: &str) -> String {
    hex(&Sha256::digest(format!("{}/{}/{group}", args.address, args.namespace)))
}

/// Into the bundle, which is our working folder, where containerd finds it after its restart.
fn write_address(path: &Path) -> Result<()> {
    fs::write("address", format!("unix://{}", path.display())).context("writing the address into the bundle")
}

/// The socket of a bundle's shim, where its `start` came as far as that.
fn read_address(bundle: &Path) -> Option<PathBuf> {
    const LIMIT: u64 = 4096;
    let mut text = String::new();
    fs::File::open(bundle.join("address")).ok()?.take(LIMIT).read_to_string(&mut text).ok()?;
    text.strip_prefix("unix://").map(PathBuf::from)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// The pod that the bundle's container belongs to, when it is not the pod's first (CRI annotations).
fn sandbox_of(bundle: &Path) -> Result<Option<String>> {
    /// All of `config.json` that counts here.
    #[derive(serde::Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    // a broken or overlong file gets its error from `Create`, which can tell the user
    let Ok(file) = fs::File::open(bundle.join("config.json")) else { return Ok(None) };
    let mut text = Vec::new();
    if file.take(runtime::CONFIG_LIMIT).read_to_end(&mut text).is_err() {
        return Ok(None);
    }
    let Ok(spec) = serde_json::from_slice::<Annotated>(&text) else { return Ok(None) };
    Ok(match Role::of(&spec.annotations)? {
        Role::Member(sandbox) => Some(sandbox.as_str().to_owned()),
        Role::Alone | Role::Sandbox => None,
    })
}
