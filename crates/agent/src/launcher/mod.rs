//! From a specification to a running process.
//!
//! The agent has one thread, so a plain clone of it is a whole process that may allocate, open and mount; no helper
//! binary is executed. The child sets itself up and reports through a pipe: an error in words, or that it is ready.
#![allow(unsafe_code, reason = "clone, setns and the child's first steps")]

mod caps;
mod child;
mod copy_up;
mod credentials;
mod enosys;
#[cfg(test)]
mod features;
mod holder;
mod hooks;
mod lookup;
pub(crate) mod options;
mod peers;
mod rootfs;
mod seccomp;

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use agent_api::oci;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair};
use nix::unistd::pipe2;
use tokio::sync::watch;

pub(crate) use child::set_size;

use crate::cgroup;
use crate::error::Error;
use crate::reaper::Reaper;

/// Of clone3(2), in the version of Linux 5.7: the child begins in a cgroup. To move it there afterwards would lock all of the
/// machine's processes out of moving, and wait until each has been seen to be.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// linux/sched.h.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Longest report, bytes: what a pipe takes at once (`PIPE_BUF` of pipe(7)).
const REPORT: usize = libc::PIPE_BUF;
/// Begins the report of one that waits for its start.
const READY: u8 = b'R';
/// Begins that of one that failed, in words.
const FAILED: u8 = b'E';

/// The child's ends of a process's streams. `None` for a terminal, which the child makes itself.
pub(crate) struct Streams {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// Where processes begin.
pub(crate) struct Place<'a> {
    /// The container's cgroup.
    pub(crate) folder: &'a File,
    /// Its first process, when there is one.
    pub(crate) of_first: Option<i32>,
}

impl Place<'_> {
    fn procs(&self) -> io::Result<File> {
        File::options().write(true).open(format!("/proc/self/fd/{}/cgroup.procs", self.folder.as_raw_fd()))
    }
}

/// What to launch.
pub(crate) enum Launch<'a> {
    /// A container's first process. It waits for a byte on `go`. `pids` is the PID namespace that it joins.
    Container {
        id: &'a str,
        spec: &'a oci::Spec,
        go: OwnedFd,
        own_hostname: bool,
        pids: Option<File>,
        submounts: &'a [String],
    },
    /// A copy of this process that does nothing but be there, as the first of a PID namespace.
    Holder { go: OwnedFd },
    /// A further process, beside a running one of which `namespaces` were opened.
    Exec { spec: &'a oci::Spec, process: &'a oci::Process, namespaces: Namespaces },
}

/// A running process's namespaces, in the order in which they are joined.
pub(crate) struct Namespaces {
    pid: File,
    others: Vec<File>,
}

impl Namespaces {
    pub(crate) fn of(pid: i32) -> Result<Self, Error> {
        let open = |name: &str| File::open(format!("/proc/{pid}/ns/{name}"));
        let gone = |error: io::Error| {
            if error.kind() == io::ErrorKind::NotFound {
                Error::State("cannot exec in a stopped container".into())
            } else {
                Error::Failed(format!("namespaces of process {pid}: {error}"))
            }
        };
        Ok(Self {
            pid: open("pid").map_err(gone)?,
            others: ["cgroup", "ipc", "uts", "mnt"]
                .iter()
                .map(|name| open(name))
                .collect::<io::Result<_>>()
                .map_err(gone)?,
        })
    }
}

/// A process that was launched.
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) exit: watch::Receiver<Option<i32>>,
    /// The agent's end of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Launches in `cgroup` and waits for the report: for a container that it is ready to execute, for an exec that it has executed.
pub(crate) async fn launch(
    what: Launch<'_>,
    streams: Option<Streams>,
    cgroup: Place<'_>,
    reaper: &Reaper,
) -> Result<Launched, Error> {
    let (report, report_child) = pipe2(OFlag::O_CLOEXEC).map_err(Error::failed("report pipe"))?;
    let (terminal, terminal_child) = has_terminal(&what).then(terminal_socket).transpose()?.unzip();
    let is_exec = matches!(what, Launch::Exec { .. });
    let clone_flags = clone_flags(&what)?;
    let joined = match &what {
        Launch::Exec { namespaces, .. } => Some(&namespaces.pid),
        Launch::Container { pids, .. } => pids.as_ref(),
        Launch::Holder { .. } => None,
    };
    let joins = joined.is_some();
    if let Some(namespace) = joined {
        // affects children only (setns(2)); taken back below
        set_pid_namespace(namespace)?;
    }
    let begun = match begin(clone_flags, &cgroup) {
        Ok((0, late)) => child::run(&what, streams, late, report_child, terminal_child),
        begun => begun,
    };
    if joins {
        let own = File::open("/proc/self/ns/pid").map_err(Error::failed("opening the agent's PID namespace"))?;
        set_pid_namespace(&own)?;
    }
    let (pid, _) =
        begun.map_err(|failed| Error::Failed(format!("unable to start container process: clone: {failed}")))?;
    let pid = i32::try_from(pid).map_err(Error::failed("process id"))?;
    let exit = reaper.follow(pid);
    drop((report_child, terminal_child, streams, what));

    let text = read_report(report).await.map_err(Error::failed("reading the status of the new process"))?;
    match text.split_first() {
        // the container's process waits before its exec
        Some((&READY, _)) if !is_exec => {}
        Some((_, words)) => {
            let words = String::from_utf8_lossy(words);
            return Err(Error::Failed(format!("unable to start container process: {words}")));
        }
        // closed by the exec, or by a death without a word
        None if is_exec => {}
        None => {
            let words = "unable to start container process: it exited during its set-up (memory limit too low?)";
            return Err(Error::Failed(words.into()));
        }
    }
    let terminal = match terminal {
        Some(socket) => receive(&socket).map_err(Error::failed("receiving the terminal of the new process"))?,
        None => None,
    };
    Ok(Launched { pid, exit, terminal })
}

fn has_terminal(what: &Launch<'_>) -> bool {
    match what {
        Launch::Container { spec, .. } => spec.Process.Terminal,
        Launch::Holder { .. } => false,
        Launch::Exec { process, .. } => process.Terminal,
    }
}

/// By which a terminal comes, which the child makes: only a socket carries descriptors.
fn terminal_socket() -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(Error::failed("terminal socket"))
}

/// Clones: 0 in the child. What the child is to enter by itself comes with it.
fn begin(flags: libc::c_int, cgroup: &Place<'_>) -> io::Result<(libc::c_long, Option<File>)> {
    let clone = |flags: u64, cgroup: u64| {
        let exit_signal = libc::SIGCHLD as u64;
        let begin = CloneArgs { flags, exit_signal, cgroup, ..CloneArgs::default() };
        // SAFETY: one thread (main.rs), so the child's copy of the process is whole; it never returns from `child::run`. The
        // argument is what clone3(2) asks for, with its size.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const begin, size_of::<CloneArgs>()) };
        if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) }
    };
    let into = |folder: &File| clone(CLONE_INTO_CGROUP | flags as u64, folder.as_raw_fd() as u64);
    match into(cgroup.folder) {
        Ok(pid) => Ok((pid, None)),
        // the container has divided its cgroup, and processes are in the parts only: there its first process is
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let folder = cgroup.of_first.and_then(cgroup::of_process).ok_or(error)?;
            into(&folder).map(|pid| (pid, None))
        }
        // as many processes as are allowed; who comes from elsewhere is not refused
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            let procs = cgroup.procs().map_err(|_| error)?;
            clone(flags as u64, 0).map(|pid| (pid, Some(procs)))
        }
        Err(error) => Err(error),
    }
}

fn clone_flags(what: &Launch<'_>) -> Result<libc::c_int, Error> {
    let (spec, own_hostname, joins) = match what {
        Launch::Exec { .. } => return Ok(0),
        Launch::Holder { .. } => return Ok(libc::CLONE_NEWPID),
        Launch::Container { spec, own_hostname, pids, .. } => (spec, own_hostname, pids.is_some()),
    };
    let mut flags = libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP;
    for namespace in &spec.Linux.Namespaces {
        match namespace.Type.as_str() {
            "pid" if joins => {}
            "pid" => flags |= libc::CLONE_NEWPID,
            "uts" if *own_hostname => flags |= libc::CLONE_NEWUTS,
            // mount and cgroup are always made; the VM is the pod: what its containers share is the VM's own
            "mount" | "mnt" | "cgroup" | "network" | "ipc" | "uts" => {}
            other => return Err(Error::Unsupported(format!("namespace {other:?}"))),
        }
    }
    // made by the child in its cgroup, so that the cgroup is its root
    Ok(flags & !libc::CLONE_NEWCGROUP)
}

/// No process may have more open files than the kernel's own limit says, whatever else it may. Our guest has one for each
/// machine, and the specification speaks of the host's.
pub(crate) fn allow_descriptors(process: &oci::Process) -> Result<(), Error> {
    const BOUND: &str = "/proc/sys/fs/nr_open";
    /// The kernel's, of what can be written there (fs/file.c).
    const MOST: u64 = i32::MAX as u64 & !63;
    let wanted = process.Rlimits.iter().filter(|limit| limit.Type == "RLIMIT_NOFILE").map(|limit| limit.Hard).max();
    // no limit at all is refused by every kernel, as it is by the host's
    let Some(wanted) = wanted.filter(|wanted| *wanted <= MOST) else { return Ok(()) };
    let now = std::fs::read_to_string(BOUND).map_err(Error::failed(BOUND))?;
    if now.trim().parse().is_ok_and(|now: u64| now < wanted) {
        std::fs::write(BOUND, wanted.to_string()).map_err(Error::failed(format!("{BOUND}: {wanted}")))?;
    }
    Ok(())
}

/// The PID namespace of a running process.
pub(crate) fn pid_namespace(pid: i32) -> Result<File, Error> {
    File::open(format!("/proc/{pid}/ns/pid"))
        .map_err(|_| Error::State("the pod's PID namespace is gone: its sandbox container has exited".into()))
}

/// The mounts of a process, for as long as this is open.
pub(crate) fn mount_namespace(pid: i32) -> Result<File, Error> {
    File::open(format!("/proc/{pid}/ns/mnt")).map_err(Error::failed("opening the container's mount namespace"))
}

fn set_pid_namespace(namespace: &File) -> Result<(), Error> {
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWPID).map_err(Error::failed("pid namespace"))
}

fn nonblocking(fd: OwnedFd) -> nix::Result<OwnedFd> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}

/// What the child writes at once, or nothing when its end is closed.
async fn read_report(report: OwnedFd) -> io::Result<Vec<u8>> {
    let report = crate::io::watch(nonblocking(report)?)?;
    loop {
        let mut ready = report.readable().await?;
        let outcome = ready.try_io(|fd| {
            let mut buffer = [0; REPORT];
            let count = nix::unistd::read(fd, &mut buffer)?;
            Ok(buffer[..count].to_vec())
        });
        if let Ok(outcome) = outcome {
            return outcome;
        }
    }
}

/// The terminal, which was sent before the report.
fn receive(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let (mut buffer, mut control) = ([0], nix::cmsg_space!(RawFd));
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for us.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(fds.into_iter().next())
}
