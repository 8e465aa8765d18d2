//! `startContainer` hooks: programs of the container, run in it right before its own (runtime-spec, config.md).
#![allow(unsafe_code, reason = "pidfd_open has no safe wrapper")]

use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use agent_api::oci;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};
use serde_json::json;

use super::child::Outcome;
use crate::error::words;

/// Runs all, in order; called in the process that becomes the container's. The first that fails ends it.
pub(super) fn start_container(id: &str, spec: &oci::Spec) -> Outcome<()> {
    let Some(hooks) = spec.Hooks.as_ref() else { return Ok(()) };
    let state = json!({
        "ociVersion": spec.Version,
        "id": id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "/",
        "annotations": spec.Annotations,
    })
    .to_string();
    // a hook that does not read its state must not end us; it gets the default itself (std::process)
    let broken_pipe = |handler| {
        // SAFETY: neither disposition is a handler.
        unsafe { signal(Signal::SIGPIPE, handler) }.map_err(|errno| words(&errno))
    };
    broken_pipe(SigHandler::SigIgn)?;
    for hook in &hooks.StartContainer {
        run(hook, &state).map_err(|why| format!("startContainer hook {}: {why}", hook.Path))?;
    }
    broken_pipe(SigHandler::SigDfl).map(drop)
}

fn run(hook: &oci::Hook, state: &str) -> Outcome<()> {
    let mut command = Command::new(&hook.Path);
    if let Some((arg0, rest)) = hook.Args.split_first() {
        command.arg0(arg0).args(rest);
    }
    command.env_clear().envs(hook.Env.iter().filter_map(|pair| pair.split_once('=')));
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().map_err(|error: io::Error| words(&error))?;
    if let Some(mut stdin) = child.stdin.take() {
        // a hook need not read it
        let _ = stdin.write_all(state.as_bytes());
    }
    let status = wait(&mut child, hook.Timeout).map_err(|error| words(&error))?;
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(status.to_string()),
        None => {
            let _ = child.kill();
            let _ = child.wait();
            Err(format!("timed out after {} s", hook.Timeout))
        }
    }
}

/// `None` after `timeout` seconds; zero is for ever.
fn wait(child: &mut Child, timeout: i64) -> io::Result<Option<ExitStatus>> {
    if timeout > 0 {
        // SAFETY: pidfd_open(2) takes a process id and flags; the child is not reaped yet.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made it and nobody else owns it.
        let ended = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let limit = PollTimeout::try_from(timeout.saturating_mul(1000)).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(ended.as_fd(), PollFlags::POLLIN)], limit)? == 0 {
            return Ok(None);
        }
    }
    child.wait().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(script: &str, timeout: i64) -> Outcome<()> {
        let args = ["sh", "-c", script].map(String::from).to_vec();
        let hook = oci::Hook { Path: "/bin/sh".into(), Args: args, Timeout: timeout, ..Default::default() };
        run(&hook, "{}")
    }

    #[test]
    fn ends_as_the_program_does() {
        assert_eq!(outcome("read state; test \"$state\" = {}", 5), Ok(()));
        assert_eq!(outcome("exit 3", 0), Err("exit status: 3".into()));
        assert_eq!(outcome("exec sleep 1000", 1), Err("timed out after 1 s".into()));
    }
}
