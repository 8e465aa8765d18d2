//! How the host reaches the agent: vsock, or a virtio-serial port.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use agent_api::ports;
use agent_api::ttrpc::r#async::transport::{Listener, Socket};
use futures_core::Stream;
use futures_util::StreamExt;
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::broadcast::error::RecvError;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::params::{Address, Params};

/// Opens the listener that the command line asks for.
pub(crate) fn listen(params: &Params) -> io::Result<Listener> {
    match &params.address {
        Address::Vsock { port } => Ok(Listener::new(FromHost::listen(*port)?)),
        Address::Serial { port } => {
            let file = open_port(port)?;
            // the host is listening from the start; a blocking write waits until the device knows
            (&file).write_all(ports::SERIAL_HELLO)?;
            nonblocking(&file)?;
            let port = SerialPort(crate::io::watch(file.into())?);
            Ok(Listener::new(Once(Some(Socket::new(port)))))
        }
    }
}

/// Tells the host that the vsock server listens.
pub(crate) fn tell_ready(params: &Params) {
    if params.ready_vport != 0 {
        let port = params.ready_vport;
        tokio::spawn(async move {
            // a host that has found us already does not listen any more
            if let Err(error) = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await {
                crate::log::debug(&format!("cannot report to the host on port {port}: {error}"));
            }
        });
    }
}

/// Gives the log to every connection that the host makes to the log port; the first gets what was said before it too.
pub(crate) fn serve_log(params: &Params) {
    if params.log_vport == 0 {
        return;
    }
    let mut listener = match FromHost::listen(params.log_vport) {
        Ok(listener) => listener,
        Err(error) => return crate::log::warn(&format!("listening on log port {}: {error}", params.log_vport)),
    };
    let mut early = Some(crate::log::follow());
    tokio::spawn(async move {
        while let Some(Ok(mut stream)) = listener.next().await {
            let mut lines = early.take().unwrap_or_else(crate::log::follow);
            tokio::spawn(async move {
                loop {
                    let line = match lines.recv().await {
                        Ok(line) => line,
                        Err(RecvError::Lagged(count)) => format!("agent: {count} log lines were dropped\n"),
                        Err(RecvError::Closed) => return,
                    };
                    if AsyncWriteExt::write_all(&mut stream, line.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// The host's connections. A container must not speak to the agent, which kernels with vsock's loopback would let it.
struct FromHost(VsockListener);

impl FromHost {
    fn listen(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self)
    }
}

impl Stream for FromHost {
    type Item = io::Result<VsockStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match ready!(self.0.poll_accept(context)) {
                Ok((stream, from)) if from.cid() == VMADDR_CID_HOST => return Poll::Ready(Some(Ok(stream))),
                Ok((_, from)) => crate::log::debug(&format!("refused a connection from {from}, which is not the host")),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }
}

/// One connection, for ever.
struct Once(Option<Socket>);

impl Stream for Once {
    type Item = io::Result<Socket>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.take() {
            Some(socket) => Poll::Ready(Some(Ok(socket))),
            None => Poll::Pending,
        }
    }
}

/// Finds the port by its name; the kernel adds ports some time after the device.
fn open_port(name: &str) -> io::Result<File> {
    // first listen, then look: nothing can come in between
    let events = uevents()?;
    loop {
        if let Some(path) = find_port(name) {
            return File::options().read(true).write(true).open(path);
        }
        let mut event = [0; 4096];
        recv(events.as_raw_fd(), &mut event, nix::sys::socket::MsgFlags::empty())?;
    }
}

fn find_port(name: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("name")).ok()?;
        let node = PathBuf::from("/dev").join(entry.file_name());
        (found.trim_end() == name && node.exists()).then_some(node)
    })
}

/// The kernel's messages about devices (netlink(7), NETLINK_KOBJECT_UEVENT).
fn uevents() -> io::Result<OwnedFd> {
    let fd =
        socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkKObjectUEvent)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    Ok(fd)
}

fn nonblocking(file: &File) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(file, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A character device as a stream.
struct SerialPort(AsyncFd<OwnedFd>);

impl AsyncRead for SerialPort {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let space = buffer.initialize_unfilled();
            match guard.try_io(|port| nix::unistd::read(port.get_ref(), space).map_err(io::Error::from)) {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for SerialPort {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(outcome) = guard.try_io(|port| nix::unistd::write(port.get_ref(), data).map_err(io::Error::from))
            {
                return Poll::Ready(outcome);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
