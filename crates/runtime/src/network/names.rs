//! Name servers of the pod's network namespace, for the guest.
//!
//! Docker answers for the names of a user network at 127.0.0.11, inside the container's network namespace on the host. The
//! guest's loopback network is another one. So the agent listens at that address in the guest, and what is asked there is
//! asked again here, from inside the namespace.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::resolver::{AnswerRequest, ListenRequest, Question};
use oci_spec::runtime::Spec;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::Error;
use crate::agent_client::AgentClient;
use crate::host_network::NetworkNamespace;

/// Where Docker's name server is (moby, libnetwork): in every container's network namespace, and nowhere else. Any other
/// loopback address may be a server of the pod's own, in the guest.
const DOCKERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// RFC 1035, section 4.2.
const PORT: u16 = 53;
/// Questions at once, each with a thread in the namespace.
const MOST: usize = 32;
/// Largest message, bytes: what TCP's length can say.
const LARGEST: usize = u16::MAX as usize;
/// A resolver asks again after 5 s (resolv.conf(5)); a server that asks others takes about as long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most of a resolv.conf(5) that is read, bytes.
const FILE_LIMIT: u64 = 16 << 10;

/// Answers until dropped.
#[derive(Debug)]
pub(crate) struct Names(JoinHandle<()>);

impl Names {
    /// Ends it.
    pub(crate) async fn stop(self) {
        self.0.abort();
        // "cancelled" is what was asked for
        let _ = self.0.await;
    }
}

/// What the container has at `/etc/resolv.conf`, on the host.
pub(crate) fn file_of(spec: &Spec) -> Option<&Path> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let here = mounts.iter().find(|mount| mount.destination() == Path::new("/etc/resolv.conf"));
    here.and_then(|mount| mount.source().as_deref())
}

/// Whether a resolv.conf(5) names the server that this is for. May block.
pub(crate) fn are_wanted(file: &Path) -> bool {
    let mut text = Vec::new();
    // a file that cannot be read is the container's mount, which is told of elsewhere
    let read = File::open(file).and_then(|file| file.take(FILE_LIMIT).read_to_end(&mut text));
    read.is_ok()
        && String::from_utf8_lossy(&text).lines().any(|line| {
            let mut words = line.split_ascii_whitespace();
            words.next() == Some("nameserver")
                && words.next().and_then(|server| server.parse().ok()) == Some(IpAddr::V4(DOCKERS))
        })
}

/// Begins to answer; when this returns, the guest can ask.
///
/// # Errors
/// The agent cannot listen, or does not know how to.
pub(super) async fn start(namespace: NetworkNamespace, agent: AgentClient) -> Result<Names, Error> {
    let request = ListenRequest { address: DOCKERS.to_string(), ..Default::default() };
    agent
        .resolver_call("starting the name server in the guest", Some(PATIENCE), |client, context| async {
            client.listen(context, &request).await
        })
        .await?;
    Ok(Names(tokio::spawn(async move {
        if let Err(error) = serve(Arc::new(namespace), &agent).await {
            tracing::debug!(%error, "answering DNS queries of the guest ends");
        }
    })))
}

async fn serve(namespace: Arc<NetworkNamespace>, agent: &AgentClient) -> Result<(), Error> {
    let room = Arc::new(Semaphore::new(MOST));
    let mut answers = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return Ok(()) };
        let question = agent
            .resolver_call("waiting for a DNS query of the guest", None, |client, context| async {
                client.next(context, &Empty::new()).await
            })
            .await?;
        let (namespace, agent) = (Arc::clone(&namespace), agent.clone());
        answers.spawn(async move {
            let _permit = permit;
            if let Err(error) = answer(&namespace, &agent, question).await {
                tracing::debug!(%error, "a DNS query of the guest failed");
            }
        });
        while answers.try_join_next().is_some() {}
    }
}

async fn answer(namespace: &NetworkNamespace, agent: &AgentClient, question: Question) -> Result<(), Error> {
    let id = question.id;
    let asked = namespace.within_plainly(move |_| ask((DOCKERS, PORT).into(), &question.message, question.tcp)).await?;
    let message = asked.unwrap_or_else(|error| {
        tracing::debug!(%error, "the name server at {DOCKERS} did not answer");
        Vec::new()
    });
    let request = AnswerRequest { id, message, ..Default::default() };
    agent
        .resolver_call("answering a DNS query of the guest", Some(PATIENCE), |client, context| async {
            client.answer(context, &request).await
        })
        .await
        .map(drop)
}

/// Asks the server as the guest's process did. Blocks for as long as the answer takes.
fn ask(server: SocketAddr, message: &[u8], tcp: bool) -> io::Result<Vec<u8>> {
    if tcp {
        let length = u16::try_from(message.len()).map_err(io::Error::other)?.to_be_bytes();
        let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&[&length, message].concat())?;
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer)?;
        return Ok(answer);
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(message)?;
    let mut answer = vec![0; LARGEST];
    let count = socket.recv(&mut answer)?;
    answer.truncate(count);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dockers_server_is_meant() {
        let folder = tempfile::tempdir().expect("a folder");
        let wanted = |text: &str| {
            let file = folder.path().join("resolv.conf");
            std::fs::write(&file, text).expect("written");
            are_wanted(&file)
        };
        assert!(wanted("# by Docker\nsearch x\nnameserver 127.0.0.11\noptions ndots:0\n"));
        assert!(!wanted("nameserver 127.0.0.53\n") && !wanted("#nameserver 127.0.0.11\n") && !wanted("nameserver\n"));
        assert!(!are_wanted(Path::new("/not/there")));
    }

    /// A server that answers each question with itself, by both ways.
    #[test]
    fn asks_by_the_way_of_the_question() {
        let udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let at = udp.local_addr().expect("an address");
        let tcp = std::net::TcpListener::bind(at).expect("bound");
        let server = std::thread::spawn(move || {
            let mut message = [0; 64];
            let (count, from) = udp.recv_from(&mut message).expect("asked");
            udp.send_to(&message[..count], from).expect("answered");
            let (mut stream, _) = tcp.accept().expect("connected");
            let mut whole = [0; 5];
            stream.read_exact(&mut whole).expect("asked");
            stream.write_all(&whole).expect("answered");
        });
        assert_eq!(ask(at, b"by udp", false).expect("answered"), b"by udp");
        assert_eq!(ask(at, b"tcp", true).expect("answered"), b"tcp");
        server.join().expect("ended");
    }
}
