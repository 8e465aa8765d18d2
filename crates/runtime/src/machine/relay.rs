//! A serial channel that goes on to another process.

use std::os::fd::OwnedFd;

use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// Between the guest's channel and a client of ours, so that nothing of that reads from the channel once it is another's.
#[derive(Debug)]
pub(super) struct Relay(JoinHandle<()>);

impl Relay {
    /// Returns the client's end.
    pub(super) fn start(channel: &OwnedFd) -> std::io::Result<(Self, OwnedFd)> {
        use std::os::unix::net::UnixStream as Blocking;
        let open = |stream: Blocking| {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        };
        let (ours, theirs) = Blocking::pair()?;
        let (mut client, mut guest) = (open(ours)?, open(channel.try_clone()?.into())?);
        let copy = async move {
            let _ = tokio::io::copy_bidirectional(&mut client, &mut guest).await;
        };
        Ok((Self(tokio::spawn(copy)), theirs.into()))
    }

    /// Nothing of the channel is read afterwards.
    pub(super) async fn end(self) {
        self.0.abort();
        let _ = self.0.await;
    }
}
