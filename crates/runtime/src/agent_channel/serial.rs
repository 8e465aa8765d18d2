//! A virtio-serial port. It has no connections, so the agent's first line stands for one: it is there once the agent is.

use std::os::fd::OwnedFd;

use agent_api::ports;
use agent_api::ttrpc::r#async::transport::Socket;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::STARTING;
use crate::Error;
use crate::agent_client::VmWatch;

fn stream(port: OwnedFd) -> Result<UnixStream, Error> {
    let failed = || Error::host("opening the serial channel to the agent");
    let stream = std::os::unix::net::UnixStream::from(port);
    stream.set_nonblocking(true).map_err(failed())?;
    UnixStream::from_std(stream).map_err(failed())
}

/// The port of a guest that has said its first line to somebody else.
pub(super) fn resume(port: OwnedFd) -> Result<Socket, Error> {
    stream(port).map(Socket::new)
}

/// Waits for the agent's first line.
pub(super) async fn connect(port: OwnedFd, vm: &VmWatch) -> Result<Socket, Error> {
    let mut stream = stream(port)?;
    let mut hello = [0; ports::SERIAL_HELLO.len()];
    match stream.read_exact(&mut hello).await {
        Ok(_) if hello == ports::SERIAL_HELLO => Ok(Socket::new(stream)),
        Ok(_) => Err(Error::Unsupported(
            "the agent in the guest has another protocol version on its serial port: use the initrd that was installed with this shim".into(),
        )),
        // the socket ends a moment before the process does; the process knows why
        Err(_) => Err(vm.gone(STARTING).await),
    }
}
