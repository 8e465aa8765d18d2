//! Messages between the pool's processes, each whole and with its descriptors: JSON over `SOCK_SEQPACKET` (unix(7)).
#![allow(unsafe_code, reason = "descriptors that came over a socket, and registering them with the runtime")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, listen, recvmsg, sendmsg, socket, socketpair,
};
use nix::sys::stat::{Mode, fchmod};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest message, bytes: the last words of a helper, 8 KiB, may be six times as long in JSON.
const LONGEST: usize = 64 << 10;
/// Most descriptors with one.
const MOST_FDS: usize = 8;
const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Wire(AsyncFd<OwnedFd>);

/// Where connections are made.
#[derive(Debug)]
pub(super) struct Listener(AsyncFd<OwnedFd>);

fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives, which is what is asked for.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

impl Listener {
    /// At a path where nothing is; for this user alone.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, FLAGS, None)?;
        // before it has a name: nobody else ever finds it open
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(64)?)?;
        watch(fd).map(Self)
    }

    pub(super) async fn accept(&self) -> io::Result<Wire> {
        let accept = |fd: &OwnedFd| accept4(fd.as_raw_fd(), FLAGS).map_err(io::Error::from);
        let fd = self.0.async_io(Interest::READABLE, accept).await?;
        // SAFETY: accept4 has just made it for us.
        Wire::new(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Wire {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        watch(fd).map(Self)
    }

    /// Two ends, the second for another process.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, FLAGS)?;
        Ok((Self::new(ours)?, theirs))
    }

    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, FLAGS, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::new(fd)
    }

    pub(super) async fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        if text.len() > LONGEST || fds.len() > MOST_FDS {
            return Err(io::Error::other("the message to send is too long"));
        }
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        let send = |fd: &OwnedFd| {
            sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(&text)], rights, MsgFlags::MSG_NOSIGNAL, None)
                .map_err(io::Error::from)
        };
        self.0.async_io(Interest::WRITABLE, send).await.map(drop)
    }

    /// The next message, or `None` when the other end is closed.
    pub(super) async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let (text, fds) = match self.0.async_io(Interest::READABLE, packet).await {
            Ok(whole) => whole,
            // it ended with something unread
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error),
        };
        if text.is_empty() {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&text)?, fds)))
    }

    /// For passing it on.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

fn packet(fd: &OwnedFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut text = vec![0; LONGEST];
    let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
    let mut parts = [IoSliceMut::new(&mut text)];
    let got = recvmsg::<()>(fd.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: recvmsg has just made them for us.
            fds.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let is_whole = !got.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    let count = got.bytes;
    if !is_whole {
        return Err(io::Error::other("a received message is too long"));
    }
    text.truncate(count);
    Ok((text, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn a_message_comes_whole_with_its_descriptors_and_the_end_is_seen() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("s");
        let listener = Listener::bind(&path).expect("bound");
        let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().expect("there").permissions());
        assert_eq!(mode & 0o777, 0o600);
        let client = Wire::connect(&path).expect("connected");
        let server = listener.accept().await.expect("accepted");
        let (reader, mut writer) = io::pipe().expect("a pipe");
        client.send(&("words", 7), &[reader.as_fd()]).await.expect("sent");
        client.send(&"more", &[]).await.expect("sent");
        let ((words, number), mut fds): ((String, u32), _) = server.receive().await.expect("got").expect("open");
        assert_eq!((words.as_str(), number, fds.len()), ("words", 7, 1));
        drop(reader);
        writer.write_all(b"through").expect("written");
        drop(writer);
        let mut said = String::new();
        std::fs::File::from(fds.remove(0)).read_to_string(&mut said).expect("read");
        assert_eq!(said, "through");
        assert_eq!(server.receive::<String>().await.expect("got").expect("open").0, "more");
        client.send(&"x".repeat(LONGEST), &[]).await.expect_err("too long");
        drop(client);
        assert!(server.receive::<String>().await.expect("its end").is_none());
    }
}
