//! A child process of ours (a VMM, virtiofsd): spawned with file descriptors, its standard error kept, its end watched.
//!
//! A helper never outlives the shim: the kernel kills it when the thread that spawned it ends. Spawn helpers on the
//! runtime's main thread, never on a blocking thread, which may end earlier.
#![allow(unsafe_code, reason = "pre_exec: prctl and fcntl between fork and exec")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, BufReader, Interest};
use tokio::process::Command;
use tokio::sync::{oneshot, watch};

use crate::{Error, Fault, VmExit, pidfd};

/// What a map of a file cannot tell otherwise.
pub(crate) const SHORTER: &str = "a file that is memory of the virtual machine, as a disk by virtio-pmem is, became \
    shorter, or the host had no room for what was written there";
/// Kept of a helper's standard error, bytes.
const STDERR_KEPT: usize = 8 << 10;
/// After the end of a process of another parent, that one's word on it is waited for so long.
const WORD: Duration = Duration::from_millis(250);

/// A killed process that only waits in the kernel is looked for after so long, and again.
const HANGS_AFTER: Duration = Duration::from_secs(1);

/// Of what size a helper's memory may be given to it at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Huge where it asks for them (`MADV_HUGEPAGE`) or the host gives them unasked.
    AsHost,
    /// Never huge ones: only what is touched takes memory.
    Small,
}

/// What a helper is started with.
#[derive(Debug)]
pub struct Program<'a> {
    /// What it is for, in errors.
    pub what: &'static str,
    /// The configuration's key of its path, in errors.
    pub key: &'static str,
    /// Its path.
    pub path: &'a Path,
    /// After its name.
    pub args: &'a [String],
    /// Beside our own environment.
    pub env: &'a [(&'a str, &'a str)],
    /// They stay open in it under the same numbers.
    pub fds: &'a [OwnedFd],
    /// Holds for what it starts itself, too.
    pub pages: Pages,
    /// Finds the cause of a failure in what it wrote on its standard error.
    pub fault: fn(&str) -> Option<Fault>,
}

impl<'a> Program<'a> {
    /// Without descriptors or anything of its own in the environment.
    pub fn new(what: &'static str, key: &'static str, path: &'a Path, args: &'a [String]) -> Self {
        Self { what, key, path, args, env: &[], fds: &[], pages: Pages::AsHost, fault: |_| None }
    }
}

/// A running helper process. Dropping it kills the process.
#[derive(Debug)]
pub struct Helper {
    pid: u32,
    exit: watch::Receiver<Option<VmExit>>,
    kill: Mutex<Option<oneshot::Sender<()>>>,
}

impl Helper {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::Spawn`] when it cannot be executed.
    pub fn spawn(program: &Program<'_>) -> Result<Self, Error> {
        let Program { what, key, path, args, env, fds, pages, fault } = *program;
        let passed: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let parent = std::process::id();
        let mut command = Command::new(path);
        command
            .args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // SAFETY: the closure runs between fork and exec and calls only prctl, getppid, fcntl, getrlimit, setrlimit and
        // signal functions, which are async-signal-safe or plain system calls; it allocates nothing.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // the parent may have died before the line above
                if libc::getppid() as u32 != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                for fd in &passed {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                if pages == Pages::Small {
                    // kept across execve(2): PR_SET_THP_DISABLE(2const); where it is refused the helper takes some MiB more
                    let none: libc::c_ulong = 0;
                    libc::prctl(libc::PR_SET_THP_DISABLE, 1 as libc::c_ulong, none, none, none);
                }
                raise_open_files();
                Ok(())
            });
        }
        let mut child =
            command.spawn().map_err(|source| Error::Spawn { what, binary: path.to_owned(), key, source })?;
        let pid = child.id().unwrap_or_default();
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stderr.take().map(|pipe| tokio::spawn(keep_tail(what, pipe, Arc::clone(&stderr))));

        let (exit_to, exit) = watch::channel(None);
        let (kill, mut killed) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let status = tokio::select! {
                status = child.wait() => status,
                // an explicit kill, or the Helper was dropped
                _ = &mut killed => {
                    let _ = child.start_kill();
                    child.wait().await
                }
            };
            // grandchildren may hold the pipe, so its end is not waited for beyond what is already there
            if let Some(reader) = reader {
                let _ = tokio::time::timeout(Duration::from_millis(50), reader).await;
            }
            let stderr = String::from_utf8_lossy(&stderr.lock().unwrap_or_else(PoisonError::into_inner)).into_owned();
            let is_success = status.as_ref().is_ok_and(std::process::ExitStatus::success);
            let reason = match status {
                Ok(status) if status.signal() == Some(libc::SIGBUS) => format!("{what} ended ({status}): {SHORTER}"),
                Ok(status) => format!("{what} ended ({status})"),
                Err(error) => format!("{what} cannot be waited for ({error})"),
            };
            let fault = if is_success { None } else { fault(&stderr) };
            let _ = exit_to.send(Some(VmExit { reason, is_success, stderr, fault }));
        });
        Ok(Self { pid, exit, kill: Mutex::new(Some(kill)) })
    }

    /// A process whose parent is another of ours, which says why it has ended in `told`. Its life is this one's all the
    /// same: dropping this kills it.
    ///
    /// # Errors
    /// The descriptor is none of a process.
    pub fn adopt(what: &'static str, pid: u32, process: OwnedFd, told: oneshot::Receiver<VmExit>) -> io::Result<Self> {
        let process = watch(process)?;
        let (exit_to, exit) = watch::channel(None);
        let (kill, mut killed) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let is_killed = tokio::select! {
                _ = process.readable() => false,
                _ = &mut killed => {
                    let _ = pidfd::kill(process.get_ref().as_fd());
                    let _ = process.readable().await;
                    true
                }
            };
            // who kills it knows why
            let word = if is_killed { None } else { tokio::time::timeout(WORD, told).await.ok().and_then(Result::ok) };
            let reason = if is_killed { format!("{what} was killed") } else { format!("{what} ended, and its keeper") };
            let exit = word.unwrap_or(VmExit { reason, is_success: false, stderr: String::new(), fault: None });
            let _ = exit_to.send(Some(exit));
        });
        Ok(Self { pid, exit, kill: Mutex::new(Some(kill)) })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes `Some` once, when it has ended.
    pub fn exit(&self) -> watch::Receiver<Option<VmExit>> {
        self.exit.clone()
    }

    /// Waits `grace` for it to end, then kills it and waits until it is gone, or hangs: one that waits for a file system of
    /// the host's that does not answer does nothing more, and ends with that.
    pub async fn stop(&self, grace: Duration) {
        let mut exit = self.exit.clone();
        if !grace.is_zero() && tokio::time::timeout(grace, exit.wait_for(Option::is_some)).await.is_ok() {
            return;
        }
        self.kill.lock().unwrap_or_else(PoisonError::into_inner).take();
        while tokio::time::timeout(HANGS_AFTER, exit.wait_for(Option::is_some)).await.is_err() {
            if pidfd::hangs(self.pid) {
                tracing::warn!(pid = self.pid, "a killed process ends when the file system that it waits for answers");
                return;
            }
        }
    }
}

/// Lets this process have as many files open as may be allowed to it: a file that the guest knows is an open one of
/// whoever serves its shared folder, and what containerd hands on is the low limit for programs that use select(2).
fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls are async-signal-safe and read or write one `rlimit` of ours.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            // one that cannot be raised stays as it is
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

fn watch(process: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives, which is what is asked for.
    unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }.map_err(io::Error::from)
}

async fn keep_tail(what: &'static str, pipe: tokio::process::ChildStderr, tail: Arc<Mutex<Vec<u8>>>) {
    let mut pipe = BufReader::with_capacity(4096, pipe);
    let mut chunk = [0; 4096];
    while let Ok(count) = pipe.read(&mut chunk).await {
        if count == 0 {
            break;
        }
        tracing::debug!(helper = what, "{}", String::from_utf8_lossy(&chunk[..count]).trim_end());
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&chunk[..count]);
        let excess = tail.len().saturating_sub(STDERR_KEPT);
        tail.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(args: &[String]) -> Helper {
        Helper::spawn(&Program::new("shell", "path", Path::new("/bin/sh"), args)).expect("spawned")
    }

    #[tokio::test]
    async fn a_failure_has_the_cause_that_its_words_tell() {
        let cause = |words: &str| words.contains("disk7").then(|| Fault::DiskInUse { id: "disk7".into() });
        for (script, told) in [("echo disk7 >&2; exit 1", true), ("echo disk7 >&2", false)] {
            let args = ["-c".to_owned(), script.to_owned()];
            let program = Program { fault: cause, ..Program::new("shell", "path", Path::new("/bin/sh"), &args) };
            let helper = Helper::spawn(&program).expect("spawned");
            let mut exit = helper.exit();
            let seen = exit.wait_for(Option::is_some).await.expect("an exit").clone().expect("some");
            assert_eq!(seen.fault.is_some(), told, "{script}");
        }
    }

    #[tokio::test]
    async fn reports_exit_and_stderr() {
        let args = ["-c".to_owned(), "echo broken >&2; exit 3".to_owned()];
        let helper = shell(&args);
        let mut exit = helper.exit();
        let seen = exit.wait_for(Option::is_some).await.expect("an exit").clone().expect("some");
        assert_eq!(seen.stderr, "broken\n");
        assert!(seen.reason.contains("exit status: 3"), "{seen}");
    }

    #[tokio::test]
    async fn passes_descriptors_under_the_same_number() {
        let file = tempfile::tempfile().expect("a file");
        let fd = OwnedFd::from(file);
        let args = ["-c".to_owned(), format!("test -e /proc/self/fd/{}", fd.as_raw_fd())];
        let program = Program { fds: &[fd], ..Program::new("shell", "path", Path::new("/bin/sh"), &args) };
        let helper = Helper::spawn(&program).expect("spawned");
        let mut exit = helper.exit();
        let seen = exit.wait_for(Option::is_some).await.expect("an exit").clone().expect("some");
        assert!(seen.reason.contains("exit status: 0"), "{seen}");
    }

    #[tokio::test]
    async fn may_open_as_many_files_as_is_allowed() {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: reads and writes one `rlimit` of ours; 512 files are enough for the other tests of this process.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
            limit.rlim_cur = 512.min(limit.rlim_max);
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
        }
        let args = ["-c".to_owned(), format!("test $(ulimit -Sn) = {}", limit.rlim_max)];
        let helper = shell(&args);
        let mut exit = helper.exit();
        let seen = exit.wait_for(Option::is_some).await.expect("an exit").clone().expect("some");
        assert!(seen.is_success, "{seen}");
    }

    #[tokio::test]
    async fn has_huge_pages_or_none() {
        for (pages, word) in [(Pages::Small, "0"), (Pages::AsHost, "1")] {
            let args = ["-c".to_owned(), format!("grep -q '^THP_enabled:.*{word}$' /proc/self/status")];
            let program = Program { pages, ..Program::new("shell", "path", Path::new("/bin/sh"), &args) };
            let helper = Helper::spawn(&program).expect("spawned");
            let mut exit = helper.exit();
            let seen = exit.wait_for(Option::is_some).await.expect("an exit").clone().expect("some");
            assert!(seen.is_success, "{pages:?}: {seen}");
        }
    }

    /// As in a container whose seccomp profile does not know the call.
    #[test]
    fn runs_where_huge_pages_cannot_be_switched_off() {
        // a filter is the thread's, and its children's
        let tried = std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                refuse_prctl(libc::PR_SET_THP_DISABLE);
                let args = ["-c".to_owned(), "grep -q '^THP_enabled:.*1$' /proc/self/status".to_owned()];
                let shell = Program::new("shell", "path", Path::new("/bin/sh"), &args);
                let helper = Helper::spawn(&Program { pages: Pages::Small, ..shell }).expect("spawned");
                helper.exit().wait_for(Option::is_some).await.expect("an exit").clone().expect("some")
            })
        });
        let seen = tried.join().expect("no panic");
        assert!(seen.is_success, "{seen}");
    }

    fn refuse_prctl(option: libc::c_int) {
        let when = |code, k, jf| libc::sock_filter { code: code as u16, jt: 0, jf, k };
        let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        // seccomp(2): struct seccomp_data has the call's number at 0 and its first argument at 16
        let mut filter = [
            when(load, 0, 0),
            when(equal, libc::SYS_prctl as u32, 3),
            when(load, 16, 0),
            when(equal, option as u32, 1),
            when(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0),
            when(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: `program` and what it points to live until the call that copies them has returned.
        unsafe {
            let (yes, no): (libc::c_ulong, libc::c_ulong) = (1, 0);
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, yes, no, no, no), 0);
            let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
        }
    }

    #[tokio::test]
    async fn stop_kills() {
        let args = ["1000".to_owned()];
        let sleep = Program::new("sleep", "path", Path::new("/bin/sleep"), &args);
        let helper = Helper::spawn(&sleep).expect("spawned");
        helper.stop(Duration::ZERO).await;
        assert!(!Path::new(&format!("/proc/{}", helper.pid())).exists());
    }

    #[tokio::test]
    async fn a_child_of_another_is_watched_and_killed() {
        let spawn = || std::process::Command::new("sleep").arg("1000").spawn().expect("spawned");
        let adopt = |pid, told| Helper::adopt("sleep", pid, pidfd::open(pid).expect("runs"), told).expect("adopted");
        let (mut child, (_silent, told)) = (spawn(), oneshot::channel());
        let helper = adopt(child.id(), told);
        helper.stop(Duration::ZERO).await;
        assert!(!child.wait().expect("waited").success());

        let (mut child, (say, told)) = (spawn(), oneshot::channel());
        let helper = adopt(child.id(), told);
        let word = VmExit { reason: "of old age".into(), is_success: true, stderr: String::new(), fault: None };
        say.send(word.clone()).expect("heard");
        assert_eq!(*helper.exit().borrow(), None, "it runs");
        child.kill().expect("killed");
        let mut exit = helper.exit();
        assert_eq!(*exit.wait_for(Option::is_some).await.expect("an end"), Some(word));
        child.wait().expect("waited");
    }

    #[tokio::test]
    async fn missing_program_names_the_key() {
        let program = Program::new("helper", "path", Path::new("/no/helper"), &[]);
        let error = Helper::spawn(&program).expect_err("missing");
        assert!(error.to_string().contains("/no/helper") && error.to_string().contains("`path`"), "{error}");
    }
}
