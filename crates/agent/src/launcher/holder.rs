//! The process that holds a pod's PID namespace: it takes in orphans and ends when it is told to, nothing else.
//!
//! Kubernetes' pause program does the same. This one is a copy of the agent, so no image is needed and no page is read.
#![allow(unsafe_code, reason = "waiting for children and ending without destructors")]

use std::fs::File;
use std::io::Read;

use nix::sys::signal::{SigSet, Signal};

/// Waits for its start, then until it is told to end. As the pause program it answers TERM and INT with code 0.
pub(super) fn hold(mut go: File) -> ! {
    let mut wanted = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        wanted.add(signal);
    }
    // blocked ones wait for `sigwait`; the first process of a namespace would not get them otherwise
    let _ = wanted.thread_block();
    let _ = nix::sys::prctl::set_name(c"pause");
    for stream in 0..=2 {
        // SAFETY: its streams, which nobody else in this process uses; their readers get the end.
        unsafe { libc::close(stream) };
    }
    let mut byte = [0];
    if matches!(go.read(&mut byte), Ok(1)) {
        drop(go);
        while !matches!(wanted.wait(), Ok(Signal::SIGTERM | Signal::SIGINT)) {
            reap();
        }
    }
    // SAFETY: ends this copy of the agent without running the agent's destructors.
    unsafe { libc::_exit(0) }
}

fn reap() {
    // SAFETY: no status is asked for (waitpid(2)).
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}
