//! The kernel's vsock (vsock(7)): the first connection to the agent of a guest with an address.
//!
//! What there is to wait for, in the order in which a start meets it (drivers/vhost/vsock.c, net/vmw_vsock):
//! 1. *The guest's driver.* A connection that is asked for before it runs is kept by the host's kernel and handed over
//!    when it starts, so the first dial is in time however long the guest takes.
//! 2. *The agent.* Until it listens the guest's kernel refuses. Our agent then makes a connection of its own, to a port
//!    that the kernel command line names: that is the event. Kata's agents do not, but they say on the console that they
//!    listen: so whatever the console says is a reason to dial again.
//! 3. *Nothing.* An agent that does neither is found by dialling at growing intervals, the one place where nobody tells.

use std::io::{self, ErrorKind};
use std::time::Duration;

use agent_api::ports;
use agent_api::ttrpc::r#async::transport::Socket;
use hypervisor::Console;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use super::STARTING;
use crate::Error;
use crate::agent_client::VmWatch;

/// `VMADDR_PORT_ANY`: the kernel takes a free one.
const ANY_PORT: u32 = u32::MAX;

/// Between two dials: at first, at most, and at least, so that a guest that floods its console gains nothing.
const PAUSE: Duration = Duration::from_millis(10);
const MOST_PAUSE: Duration = Duration::from_millis(200);
const LEAST_PAUSE: Duration = Duration::from_millis(5);

/// An address that is one guest's alone for as long as its VMM holds the device.
#[derive(Debug)]
pub(crate) struct Vsock {
    cid: u32,
    /// Where the guest's agent reports.
    ready: VsockListener,
    ready_port: u32,
}

impl Vsock {
    /// For a guest with this address.
    pub(super) fn listen(cid: u32) -> Result<Self, Error> {
        // this address of the host's is the one that guests reach, and nobody else
        let ready = VsockListener::bind(VsockAddr::new(VMADDR_CID_HOST, ANY_PORT));
        let ready = ready.map_err(Error::host("a vsock port of the host"))?;
        let ready_port = ready.local_addr().map_err(Error::host("a vsock port of the host"))?.port();
        Ok(Self { cid, ready, ready_port })
    }

    /// The host's port to which an agent may connect once it listens.
    pub(super) fn ready_port(&self) -> u32 {
        self.ready_port
    }

    /// Waits until the agent listens, and connects to it.
    pub(super) async fn connect(self, vm: &VmWatch) -> Result<Socket, Error> {
        let agent = VsockAddr::new(self.cid, ports::AGENT_VSOCK);
        match reach(|| VsockStream::connect(agent), || self.told(), vm.console()).await {
            Ok(stream) => Ok(Socket::new(stream)),
            Err(error) => {
                vm.broken(STARTING, &format!("vsock port {} of guest {}: {error}", ports::AGENT_VSOCK, self.cid)).await
            }
        }
    }

    /// Resolves when the guest's agent reports. The port is open to every guest of the host: others do not count.
    async fn told(&self) {
        loop {
            match self.ready.accept().await {
                Ok((_, from)) if from.cid() == self.cid => return,
                Ok((_, from)) => tracing::debug!(cid = from.cid(), "ignoring the ready message of another guest"),
                Err(error) => {
                    tracing::warn!(%error, "cannot receive the agent's ready message: polling its port instead");
                    return std::future::pending().await;
                }
            }
        }
    }
}

/// Dials until somebody listens: at once, then whenever something happens that may be the reason.
pub(super) async fn reach<T, D, W>(
    mut dial: impl FnMut() -> D,
    mut told: impl FnMut() -> W,
    console: &Console,
) -> io::Result<T>
where
    D: Future<Output = io::Result<T>>,
    W: Future<Output = ()>,
{
    let mut pause = PAUSE;
    loop {
        // from before the dial, so that nothing that is said while it is refused is missed
        let spoken = console.spoken();
        tokio::select! {
            biased;
            outcome = dial() => match outcome {
                Err(error) if is_early(&error) => {}
                outcome => return outcome,
            },
            // older guests' drivers lose a refusal while they start: the dial would wait for its end
            () = told() => continue,
        }
        tokio::select! {
            () = told() => {}
            () = async { tokio::time::sleep(LEAST_PAUSE).await; spoken.await } => {}
            () = tokio::time::sleep(pause) => pause = (pause * 3 / 2).min(MOST_PAUSE),
        }
    }
}

/// Whether somebody may listen later: nobody did, the driver did not answer within the kernel's time for a connection
/// (two seconds), or the kernel says at once that the driver does not run.
fn is_early(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::TimedOut | ErrorKind::HostUnreachable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use std::cell::Cell;
    use std::future::{Ready, pending, ready};
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;
    use tokio::time::Instant;

    /// A dial that is refused until `open`, and counts.
    fn guest<'a>(open: &'a Cell<bool>, dials: &'a Cell<u32>) -> impl FnMut() -> Ready<io::Result<()>> + 'a {
        || {
            dials.set(dials.get() + 1);
            ready(if open.get() { Ok(()) } else { Err(ErrorKind::ConnectionReset.into()) })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_agents_report_ends_the_wait() {
        let (open, dials, reported) = (Cell::new(false), Cell::new(0), Cell::new(false));
        let from = Instant::now();
        let told = || async {
            if reported.replace(true) {
                return pending().await;
            }
            tokio::time::sleep(PAUSE / 2).await;
            open.set(true);
        };
        reach(guest(&open, &dials), told, &Console::default()).await.expect("reached");
        assert_eq!((dials.get(), from.elapsed()), (2, PAUSE / 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_counts_while_a_dial_hangs() {
        let dials = Cell::new(0);
        let dial = || async {
            dials.set(dials.get() + 1);
            if dials.get() == 1 { pending().await } else { Ok(()) }
        };
        reach(dial, || tokio::time::sleep(PAUSE), &Console::default()).await.expect("reached");
        assert_eq!(dials.get(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_console_says_is_a_reason_to_dial() {
        let (open, dials) = (Cell::new(false), Cell::new(0));
        let console = Console::default();
        let (mut guest_end, host_end) = UnixStream::pair().expect("a pair");
        tokio::spawn(console.clone().follow(host_end, false));
        let boot = async {
            // by then the pauses are at their longest
            tokio::time::sleep(Duration::from_secs(3)).await;
            open.set(true);
            let before = dials.get();
            guest_end.write_all(b"agent: listening\n").await.expect("written");
            (before, Instant::now())
        };
        let reached = async {
            reach(guest(&open, &dials), pending, &console).await.expect("reached");
            Instant::now()
        };
        let ((before, said), at) = tokio::join!(boot, reached);
        assert!(at - said <= LEAST_PAUSE, "{:?} after it was said", at - said);
        // three seconds at growing intervals
        assert!((15..40).contains(&before), "{before} dials");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_agent_is_found_and_other_errors_end_the_wait() {
        let (open, dials) = (Cell::new(false), Cell::new(0));
        let from = Instant::now();
        let opened = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            open.set(true);
        };
        let console = Console::default();
        let (reached, ()) = tokio::join!(reach(guest(&open, &dials), pending, &console), opened);
        reached.expect("reached");
        assert!(from.elapsed() <= Duration::from_secs(1) + MOST_PAUSE, "{:?}", from.elapsed());
        let gone = || ready(Err::<(), io::Error>(Errno::ENODEV.into()));
        let error = reach(gone, pending, &console).await.expect_err("no such guest");
        assert_eq!(error.raw_os_error(), Some(Errno::ENODEV as i32));
    }
}
