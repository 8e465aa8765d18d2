//! The life of a cloned child until it executes the container's program. Never returns.
#![allow(unsafe_code, reason = "descriptors are arranged by number; terminals by ioctl")]

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use agent_api::oci;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::error::words;

use super::{FAILED, Launch, READY, Streams, credentials, holder, hooks, lookup, rootfs, seccomp};

/// Words for the one who asked. The prefix is the launcher's.
pub(super) type Outcome<T> = Result<T, String>;

/// `map_err` with a name in front.
pub(super) fn named<E: std::fmt::Display + 'static>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {}", words(&error))
}

/// runc puts these words before what fails while the container's root is made.
fn in_init(words: &str) -> String {
    format!("error during container init: {words}")
}

pub(super) fn run(
    what: &Launch<'_>,
    streams: Option<Streams>,
    cgroup: Option<File>,
    report: OwnedFd,
    terminal: Option<OwnedFd>,
) -> ! {
    let words = match set_up(what, streams, cgroup, report, terminal) {
        Ok(never) => match never {},
        Err(words) => words,
    };
    // SAFETY: `arrange` put the report there, and only an exec closes it; should that have failed, the write fails too,
    // and the launcher is told by the end of this process.
    let report = unsafe { BorrowedFd::borrow_raw(REPORT_FD) };
    let _ = tell(report, FAILED, &words);
    // SAFETY: ends this copy of the process without running the agent's destructors.
    unsafe { libc::_exit(1) }
}

const REPORT_FD: RawFd = 3;
const FIRST_OTHER_FD: RawFd = 4;

fn set_up(
    what: &Launch<'_>,
    streams: Option<Streams>,
    cgroup: Option<File>,
    report: OwnedFd,
    terminal: Option<OwnedFd>,
) -> Outcome<Infallible> {
    if let Some(mut procs) = cgroup
        && let Err(error) = procs.write_all(b"0")
    {
        // nobody is told before the report is where `run` looks for it
        std::mem::forget(arrange(report, None, Vec::new())?);
        return Err(named("entering the cgroup")(error));
    }
    // everything of the agent that is open must not reach the container, nor keep others' streams open
    let mut keep: Vec<OwnedFd> = Vec::new();
    let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(named("descriptor"));
    match what {
        Launch::Container { go, .. } | Launch::Holder { go } => keep.push(duplicate(go.as_fd())?),
        Launch::Exec { namespaces, .. } => {
            for namespace in &namespaces.others {
                keep.push(duplicate(namespace.as_fd())?);
            }
        }
    }
    let has_terminal = terminal.is_some();
    keep.extend(terminal);
    let mut kept = arrange(report, streams, keep)?;
    // it is never dropped: the report must stay open until the end
    let report = std::mem::ManuallyDrop::new(kept.remove(0));
    let terminal = if has_terminal { kept.pop() } else { None };
    restore_signals();
    nix::unistd::setsid().map_err(named("setsid"))?;

    match what {
        Launch::Container { id, spec, own_hostname, submounts, .. } => {
            let go = kept.remove(0);
            let ends = Ends { report: report.as_fd(), terminal };
            container(id, spec, submounts, *own_hostname, ends, File::from(go))
        }
        Launch::Holder { .. } => {
            let go = kept.remove(0);
            tell(report.as_fd(), READY, "").map_err(named("report"))?;
            holder::hold(File::from(go))
        }
        Launch::Exec { spec, process, .. } => exec(spec, process, terminal, kept),
    }
}

/// Puts the streams at 0 to 2, the report at 3, the rest after it, and closes everything else.
fn arrange(report: OwnedFd, streams: Option<Streams>, rest: Vec<OwnedFd>) -> Outcome<Vec<OwnedFd>> {
    let mut wanted: Vec<(OwnedFd, RawFd)> = Vec::new();
    if let Some(streams) = streams {
        wanted.extend([(streams.stdin, 0), (streams.stdout, 1), (streams.stderr, 2)]);
    }
    wanted.push((report, REPORT_FD));
    for (fd, target) in rest.into_iter().zip(FIRST_OTHER_FD..) {
        wanted.push((fd, target));
    }
    let last = FIRST_OTHER_FD + wanted.len() as RawFd;
    // first out of the way of the targets, then to them
    let mut high = Vec::new();
    for (fd, target) in wanted {
        // SAFETY: a valid descriptor; F_DUPFD makes a new one at or above the given number.
        let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, last.max(64)) };
        if copy < 0 {
            return Err(named("descriptor")(io::Error::last_os_error()));
        }
        high.push((copy, target));
        std::mem::forget(fd);
    }
    let mut out = Vec::new();
    let mut top = REPORT_FD;
    for (copy, target) in high {
        let flags = if target <= 2 { 0 } else { libc::O_CLOEXEC };
        // SAFETY: `copy` is ours and differs from `target`; what was at `target` belonged to the agent's copy.
        if unsafe { libc::dup3(copy, target, flags) } < 0 {
            return Err(named("descriptor")(io::Error::last_os_error()));
        }
        top = top.max(target);
        if target >= REPORT_FD {
            // SAFETY: dup3 has just made it and nobody else owns it.
            out.push(unsafe { OwnedFd::from_raw_fd(target) });
        }
    }
    // SAFETY: closes descriptors of this process only; the owners in the agent's copy are never dropped here.
    unsafe { libc::close_range((top + 1) as u32, u32::MAX, 0) };
    Ok(out)
}

/// The agent's runtime has handlers and a mask; a program expects neither.
fn restore_signals() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in Signal::iterator() {
        // SAFETY: the default disposition is no handler.
        let _ = unsafe { sigaction(signal, &default) };
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

fn tell(report: BorrowedFd<'_>, kind: u8, words: &str) -> io::Result<()> {
    let mut text = vec![kind];
    text.extend(words.bytes().take(super::REPORT - 1));
    nix::unistd::write(report, &text)?;
    Ok(())
}

/// Gives the agent's end of a terminal away, where there is one.
fn send(terminal: Option<OwnedFd>, socket: Option<OwnedFd>) -> Outcome<()> {
    let (Some(terminal), Some(socket)) = (terminal, socket) else { return Ok(()) };
    let fds = [terminal.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"t")], &control, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
        .map_err(named("terminal"))
}

/// What leads back to the agent.
struct Ends<'a> {
    report: BorrowedFd<'a>,
    /// For a terminal.
    terminal: Option<OwnedFd>,
}

fn container(
    id: &str,
    spec: &oci::Spec,
    submounts: &[String],
    own_hostname: bool,
    ends: Ends<'_>,
    mut go: File,
) -> Outcome<Infallible> {
    unshare(CloneFlags::CLONE_NEWCGROUP).map_err(named("cgroup namespace"))?;
    let process = &*spec.Process;
    credentials::check_environment(process).map_err(|words| in_init(&words))?;
    rootfs::build(id, spec, submounts).map_err(|words| in_init(&words))?;
    send(terminal(process, true)?, ends.terminal)?;
    if own_hostname && !spec.Hostname.is_empty() {
        nix::unistd::sethostname(&spec.Hostname).map_err(named("hostname"))?;
    }
    rootfs::finish(spec).map_err(|words| in_init(&words))?;
    let program = prepare(process, spec.Linux.Seccomp.as_ref())?;
    tell(ends.report, READY, "").map_err(named("report"))?;
    let mut byte = [0];
    // no byte: the container is removed before its start
    if !matches!(go.read(&mut byte), Ok(1)) {
        // SAFETY: as in `run`.
        unsafe { libc::_exit(0) }
    }
    let failed = match hooks::start_container(id, spec) {
        Ok(()) => format!("exec {}: {}", process.Args.first().map_or("", String::as_str), execute(program)),
        Err(failed) => failed,
    };
    // nobody listens to the report any more: as runc, on the standard error
    let _ = writeln!(io::stderr(), "{failed}");
    // SAFETY: as in `run`.
    unsafe { libc::_exit(255) }
}

fn exec(
    spec: &oci::Spec,
    process: &oci::Process,
    socket: Option<OwnedFd>,
    namespaces: Vec<OwnedFd>,
) -> Outcome<Infallible> {
    for namespace in namespaces {
        setns(namespace, CloneFlags::empty()).map_err(named("joining the container's namespaces"))?;
    }
    send(terminal(process, false)?, socket)?;
    let program = prepare(process, spec.Linux.Seccomp.as_ref())?;
    let name = process.Args.first().cloned().unwrap_or_default();
    let failed = execute(program);
    Err(format!("exec {name}: {failed}"))
}

/// Ready to be executed.
struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    filter: Option<seccomp::Filter>,
}

/// Limits, identity, directory, program: in runc's order, so that what fails first there fails first here.
fn prepare(process: &oci::Process, profile: Option<&oci::LinuxSeccomp>) -> Outcome<Program> {
    own_null(process)?;
    credentials::own_streams(process)?;
    // made before the limits, which may leave no descriptor for it
    let mut filter = profile.map(seccomp::Filter::new).transpose()?;
    credentials::limits(process)?;
    if !process.NoNewPrivileges
        && let Some(filter) = filter.take()
    {
        // loading needs a privilege that is about to be dropped
        filter.load()?;
    }
    let env = credentials::environment(process)?;
    // as root first: the user may begin in a folder that it may not enter
    let entered = enter(&process.Cwd);
    credentials::become_user(process)?;
    match entered {
        // a folder of the user's on a file system that knows no root, such as FUSE
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => enter(&process.Cwd),
        other => other,
    }
    .map_err(|error| format!("chdir to cwd ({:?}) set in config.json failed: {}", process.Cwd, words(&error)))?;
    credentials::finish(process)?;
    let name = process.Args.first().ok_or("process.args must not be empty")?;
    let path = lookup::find(name, &env)?;
    let c = |text: &str| CString::new(text).map_err(|_| format!("{text:?} has a zero byte"));
    let environment = env.iter().map(|pair| c(pair)).collect::<Outcome<Vec<_>>>()?;
    Ok(Program {
        path: c(&path)?,
        args: process.Args.iter().map(|arg| c(arg)).collect::<Outcome<_>>()?,
        env: environment,
        filter,
    })
}

/// Makes this the working folder. In a pod whose containers share their processes, root's `/proc/1/root` leads to another root:
/// what is not below the container's own is refused.
fn enter(folder: &str) -> io::Result<()> {
    if folder.is_empty() {
        return Ok(());
    }
    std::env::set_current_dir(folder)?;
    let mut path = [0_u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most so many bytes. The C library's function does not tell "(unreachable)" from "removed".
    let length = unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) };
    if length > 0 && path[0] != b'/' {
        std::env::set_current_dir("/")?;
        return Err(io::Error::other("it is outside of the container's root"));
    }
    Ok(())
}

/// An empty input is the container's `/dev/null`, where it has one, not that of the guest.
fn own_null(process: &oci::Process) -> Outcome<()> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
    const NULL: &str = "/dev/null";
    // looked at before it is opened: an image may have put anything there
    let is_null = |meta: std::fs::Metadata| meta.file_type().is_char_device() && meta.rdev() == libc::makedev(1, 3);
    if process.Terminal || !process.NoStdin || !std::fs::symlink_metadata(NULL).is_ok_and(is_null) {
        return Ok(());
    }
    let flags = libc::O_NOCTTY | libc::O_NOFOLLOW;
    let null = File::options().read(true).write(true).custom_flags(flags).open(NULL).map_err(named(NULL))?;
    // SAFETY: what is at 0 is this process's input, which is replaced as a whole (dup2(2)).
    if unsafe { libc::dup2(null.as_raw_fd(), 0) } < 0 { Err(named(NULL)(io::Error::last_os_error())) } else { Ok(()) }
}

/// Returns only when it failed.
fn execute(program: Program) -> String {
    if let Some(filter) = program.filter
        && let Err(error) = filter.load()
    {
        return error;
    }
    match nix::unistd::execve(&program.path, &program.args, &program.env) {
        Ok(never) => match never {},
        Err(errno) => words(&errno),
    }
}

/// Makes the process's terminal from the container's own devpts, when it has one; returns the agent's end.
fn terminal(process: &oci::Process, is_init: bool) -> Outcome<Option<OwnedFd>> {
    use nix::fcntl::OFlag;
    use nix::pty::{PtyMaster, grantpt, unlockpt};
    if !process.Terminal {
        return Ok(None);
    }
    let master = nix::fcntl::open(
        "/dev/ptmx",
        OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(named("opening /dev/ptmx"))?;
    // SAFETY: the descriptor was just opened on /dev/ptmx and is given away.
    let master = unsafe { PtyMaster::from_owned_fd(master) };
    grantpt(&master).map_err(named("terminal"))?;
    unlockpt(&master).map_err(named("terminal"))?;
    // SAFETY: TIOCGPTPEER opens the other end without a path, which the image could have replaced (ioctl_tty(2)).
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY) };
    if slave < 0 {
        return Err(named("terminal")(io::Error::last_os_error()));
    }
    // SAFETY: the call returned a new descriptor.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    if let Some(size) = process.ConsoleSize.as_ref() {
        set_size(master.as_fd(), size.Height, size.Width).map_err(named("terminal size"))?;
    }
    if is_init {
        rootfs::console(slave.as_fd())?;
    }
    // SAFETY: makes it the controlling terminal of the session that this process leads; then the three streams.
    unsafe {
        if libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) < 0 {
            return Err(named("controlling terminal")(io::Error::last_os_error()));
        }
        for stream in 0..=2 {
            if libc::dup2(slave.as_raw_fd(), stream) < 0 {
                return Err(named("terminal streams")(io::Error::last_os_error()));
            }
        }
        let user = &process.User;
        libc::fchown(slave.as_raw_fd(), user.UID, u32::MAX);
    }
    let copy = master.as_fd().try_clone_to_owned().map_err(named("terminal"))?;
    Ok(Some(copy))
}

/// Rows and columns of a terminal.
pub(crate) fn set_size(terminal: BorrowedFd<'_>, rows: u32, columns: u32) -> io::Result<()> {
    let clamp = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    let size = libc::winsize { ws_row: clamp(rows), ws_col: clamp(columns), ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: a terminal and a winsize that lives through the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
