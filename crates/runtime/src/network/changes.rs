//! Notices that something changed in the pod's network namespace; what it was is found by looking (`scan`).
//!
//! So a message that was lost, because the kernel's buffer was full, does no harm, and nothing is kept of what an
//! unreasonable neighbour can make the kernel tell.
#![allow(unsafe_code, reason = "AsyncFd wants a promise")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// A change seldom comes alone: whoever adds an interface gives it addresses and routes in the next moments. So one look is
/// taken when nothing more has come for this long …
const QUIET: Duration = Duration::from_millis(30);
/// … or after this long, when it does not stop.
const LONGEST: Duration = Duration::from_millis(300);

/// Links, neighbours, and both families' addresses and routes (rtnetlink(7)).
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_NEIGH
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE;

/// Opens the socket; it belongs to the calling thread's namespace for ever (network_namespaces(7)).
pub(super) fn subscribe() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS as u32))?;
    Ok(fd)
}

/// The changes of one namespace.
#[derive(Debug)]
pub(super) struct Changes {
    socket: AsyncFd<OwnedFd>,
    /// Some were seen that nobody has been told of yet: who waited for them went away.
    are_untold: AtomicBool,
}

impl Changes {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives, which is what is asked for.
        let watched = unsafe { AsyncFd::register_with_interest(socket, tokio::io::Interest::READABLE) };
        let socket = watched.map_err(io::Error::from)?;
        Ok(Self { socket, are_untold: AtomicBool::new(false) })
    }

    /// Waits until something changed, and until that is over.
    pub(super) async fn next(&self) -> io::Result<()> {
        if !self.are_untold.load(Ordering::Relaxed) {
            self.one().await?;
            self.are_untold.store(true, Ordering::Relaxed);
        }
        let end = Instant::now() + LONGEST;
        loop {
            let quiet = (Instant::now() + QUIET).min(end);
            let Ok(more) = timeout_at(quiet, self.one()).await else {
                self.are_untold.store(false, Ordering::Relaxed);
                return Ok(());
            };
            more?;
        }
    }

    /// Whether something has changed that nobody has been told of; that is told by this.
    pub(super) fn are_there(&self) -> bool {
        // an error is as much reason to look as a change
        let new = match drain(self.socket.get_ref()) {
            Ok(changed) => changed,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        self.are_untold.swap(false, Ordering::Relaxed) || new
    }

    async fn one(&self) -> io::Result<()> {
        loop {
            let mut guard = self.socket.readable().await?;
            match guard.try_io(|fd| drain(fd.get_ref())) {
                Ok(Ok(true)) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(false)) | Err(_) => {}
            }
        }
    }
}

/// Takes what is there; whether it says that something changed. `WouldBlock` when there is nothing.
fn drain(socket: &OwnedFd) -> io::Result<bool> {
    let mut changed = false;
    let mut taken = 0;
    loop {
        let mut head = [0; 32];
        match recv(socket.as_raw_fd(), &mut head, MsgFlags::MSG_TRUNC) {
            Ok(_) => changed |= !is_noise(&head),
            // some were lost
            Err(Errno::ENOBUFS) => changed = true,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if taken == 0 => return Err(Errno::EAGAIN.into()),
            Err(Errno::EAGAIN) => return Ok(changed),
            Err(errno) => return Err(errno.into()),
        }
        taken += 1;
    }
}

/// The life of a neighbour that was found by asking: a message begins with `nlmsghdr`, then `ndmsg`.
fn is_noise(head: &[u8; 32]) -> bool {
    const NEW_NEIGHBOUR: u16 = libc::RTM_NEWNEIGH;
    // incomplete, reachable, stale, delay, probe
    const PASSING: u16 = 0x01 | 0x02 | 0x04 | 0x08 | 0x10;
    let kind = u16::from_ne_bytes([head[4], head[5]]);
    let state = u16::from_ne_bytes([head[24], head[25]]);
    kind == NEW_NEIGHBOUR && state & PASSING != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a namespace of its own, where the machine lets us make one.
    #[test]
    fn a_burst_is_one_change() {
        let thread = std::thread::spawn(|| -> Option<()> {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let changes = Changes::new(subscribe().expect("a socket")).expect("watched");
                let quiet = tokio::time::timeout(QUIET * 2, changes.next()).await;
                assert!(quiet.is_err(), "nothing changed");
                let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
                tokio::spawn(connection);
                for address in ["127.0.0.2", "127.0.0.3", "127.0.0.4"] {
                    let address = address.parse().expect("an address");
                    handle.address().add(1, address, 8).execute().await.expect("added");
                }
                changes.next().await.expect("told");
                let quiet = tokio::time::timeout(QUIET * 2, changes.next()).await;
                assert!(quiet.is_err(), "all of it was one change");
            });
            Some(())
        });
        if thread.join().expect("ended").is_none() {
            eprintln!("skipped: network namespaces need root");
        }
    }

    #[test]
    fn only_passing_neighbours_are_noise() {
        let message = |kind: u16, state: u16| {
            let mut head = [0; 32];
            head[4..6].copy_from_slice(&kind.to_ne_bytes());
            head[24..26].copy_from_slice(&state.to_ne_bytes());
            head
        };
        assert!(is_noise(&message(libc::RTM_NEWNEIGH, 4)));
        assert!(!is_noise(&message(libc::RTM_NEWNEIGH, 0x80)), "permanent");
        assert!(!is_noise(&message(libc::RTM_DELNEIGH, 4)));
        assert!(!is_noise(&message(libc::RTM_NEWADDR, 4)));
    }
}
