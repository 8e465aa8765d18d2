//! vsock that the VMM ends in a Unix socket: who connects to it asks for a port of the guest's in a line, and is answered in one.
//!
//! What the guest connects to arrives at sockets beside it, named by the port; there the agent reports, as in [`super::vsock`].

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use agent_api::ports;
use agent_api::ttrpc::r#async::transport::Socket;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::STARTING;
use super::vsock::reach;
use crate::Error;
use crate::agent_client::VmWatch;

/// The port at which the agent reports; the socket is this VM's alone.
pub(super) const READY_PORT: u32 = 5000;
/// Longest answer, bytes: `OK` and a port.
const LONGEST: usize = 32;

/// The VMM's socket, and the one beside it.
#[derive(Debug)]
pub(crate) struct Hybrid {
    socket: PathBuf,
    ready: UnixListener,
}

impl Hybrid {
    /// Listens for the agent's report at a VM's socket that is not there yet.
    pub(super) fn listen(socket: &Path) -> Result<Self, Error> {
        let beside = format!("{}_{READY_PORT}", socket.display());
        // of a VM that did not come up
        if std::fs::symlink_metadata(&beside).is_ok_and(|meta| meta.file_type().is_socket()) {
            let _ = std::fs::remove_file(&beside);
        }
        let ready = UnixListener::bind(&beside).map_err(Error::host(beside))?;
        Ok(Self { socket: socket.to_owned(), ready })
    }

    /// Waits until the agent listens, and connects to it.
    pub(super) async fn connect(self, vm: &VmWatch) -> Result<Socket, Error> {
        let told = || async {
            if let Err(error) = self.ready.accept().await {
                tracing::warn!(%error, "cannot receive the agent's ready message: polling its port instead");
                std::future::pending::<()>().await;
            }
        };
        match reach(|| dial(&self.socket, ports::AGENT_VSOCK), told, vm.console()).await {
            Ok(stream) => Ok(Socket::new(stream)),
            Err(error) => {
                let reason = format!("port {} by {}: {error}", ports::AGENT_VSOCK, self.socket.display());
                vm.broken(STARTING, &reason).await
            }
        }
    }
}

/// One connection to a port of the guest. Before somebody listens there the socket is closed without an answer.
async fn dial(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let early = |_| io::Error::from(ErrorKind::ConnectionReset);
    // before the VMM listens there is no socket, or nobody behind it
    let mut stream = UnixStream::connect(socket).await.map_err(early)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(early)?;
    let mut answer = Vec::new();
    // a byte at a time: what follows the line is the agent's
    while answer.last() != Some(&b'\n') {
        if answer.len() == LONGEST {
            return Err(io::Error::new(ErrorKind::InvalidData, "the VMM's answer to CONNECT is too long"));
        }
        answer.push(stream.read_u8().await.map_err(early)?);
    }
    if !answer.starts_with(b"OK ") {
        let answer = String::from_utf8_lossy(&answer).trim_end().to_owned();
        return Err(io::Error::new(ErrorKind::InvalidData, format!("the VMM answers {answer:?} to CONNECT")));
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A VMM's socket that takes one connection and gives `answer`, then what it was asked.
    async fn dialled(answer: &'static [u8]) -> (io::Result<UnixStream>, String) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v");
        let listener = UnixListener::bind(&path).expect("bound");
        let vmm = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut asked = vec![0; 13];
            stream.read_exact(&mut asked).await.expect("a question");
            stream.write_all(answer).await.expect("written");
            String::from_utf8(asked).expect("text")
        };
        tokio::join!(dial(&path, 1024), vmm)
    }

    #[tokio::test]
    async fn a_port_is_asked_for_and_what_follows_is_the_agents() {
        let (stream, asked) = dialled(b"OK 1073741824\nhello").await;
        assert_eq!(asked, "CONNECT 1024\n");
        let mut said = String::new();
        stream.expect("connected").read_to_string(&mut said).await.expect("read");
        assert_eq!(said, "hello");
    }

    #[tokio::test]
    async fn nonsense_is_no_connection_and_silence_is_early() {
        let (nonsense, _) = dialled(b"NO\n").await;
        assert!(nonsense.expect_err("refused").to_string().contains("\"NO\""));
        let (long, _) = dialled(&[b'x'; 100]).await;
        assert_eq!(long.expect_err("refused").kind(), ErrorKind::InvalidData);
        let (closed, _) = dialled(b"").await;
        assert_eq!(closed.expect_err("early").kind(), ErrorKind::ConnectionReset);
        let missing = dial(Path::new("/no/such/socket"), 1).await.expect_err("early");
        assert_eq!(missing.kind(), ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn the_report_comes_to_the_socket_beside() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("v");
        drop(Hybrid::listen(&socket).expect("listens"));
        let again = Hybrid::listen(&socket).expect("again, over what is left");
        let beside = folder.path().join(format!("v_{READY_PORT}"));
        let (accepted, connected) = tokio::join!(again.ready.accept(), UnixStream::connect(beside));
        accepted.expect("heard");
        connected.expect("told");
    }
}
