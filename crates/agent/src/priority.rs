//! The agent before its containers: with thousands of processes that want to run, each would wait for seconds until it is
//! its turn, and so would who shall end them.
#![allow(unsafe_code, reason = "sched_setscheduler has no safe wrapper")]

use std::io;

/// Puts this process before all ordinary ones. What it makes is ordinary again: no container inherits that. The kernel
/// leaves a twentieth of the time to the others whatever we do (`sched_rt_runtime_us`).
pub(crate) fn raise() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: a pointer to a parameter that lives through the call (sched_setscheduler(2)).
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &raw const param) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field 41 of `/proc/self/stat` (proc_pid_stat(5)): 0 is an ordinary process.
    #[test]
    fn what_is_made_is_ordinary() {
        // the policy is this thread's alone
        if raise().is_err() {
            // not root: nothing to be seen
            return;
        }
        let script = "read -r text </proc/self/stat; set -- ${text##*) }; shift 38; echo $1";
        let child = std::process::Command::new("/bin/sh").args(["-c", script]).output().expect("ran");
        assert_eq!(String::from_utf8_lossy(&child.stdout), "0\n");
        // SAFETY: takes a number and returns one.
        let own = unsafe { libc::sched_getscheduler(0) };
        assert_eq!(own, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK);
    }
}
