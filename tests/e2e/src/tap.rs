//! The other end of a tap: a program of the host that carries frames between two of them, as slirp4netns and VPNs do.
#![expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

use anyhow::{Context as _, Result, ensure};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

/// Carries frames until dropped; its taps go with it.
#[derive(Debug)]
pub struct Carrier {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Carrier {
    /// Makes the tap `inner` in the network namespace of that name and `outer` in our own, and carries between them.
    pub fn start(namespace: &str, inner: &str, outer: &str) -> Result<Self> {
        let (path, name) = (format!("/run/netns/{namespace}"), inner.to_owned());
        let there = std::thread::spawn(move || -> Result<File> {
            setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
            tap(&name)
        });
        let mut inner = there.join().ok().context("the thread in the namespace")??;
        let mut outer = tap(outer)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut frame = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                let mut both = [&inner, &outer].map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
                // the flag is looked at now and then
                if poll(&mut both, PollTimeout::from(100_u8)).is_err() {
                    return;
                }
                let ready = both.map(|one| one.any() == Some(true));
                carry(ready[0], &mut inner, &mut outer, &mut frame);
                carry(ready[1], &mut outer, &mut inner, &mut frame);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A tap that is down loses what it gets.
fn carry(ready: bool, from: &mut File, to: &mut File, frame: &mut [u8]) {
    if ready && let Ok(length) = from.read(frame) {
        let _ = to.write(&frame[..length]);
    }
}

fn tap(name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    // SAFETY: ifreq is plain data, all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ensure!(name.len() < request.ifr_name.len(), "{name} is too long");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: a valid descriptor and a pointer to an ifreq that lives through the call.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(made == 0, "tap {name}: {}", std::io::Error::last_os_error());
    Ok(file)
}
