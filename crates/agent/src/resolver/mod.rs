//! Questions of the guest's processes to a name server on the host's side of the pod's network, which the host fetches here
//! and answers. Docker has one for each container of a user network, at 127.0.0.11.

mod redirect;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::resolver::{AnswerRequest, ListenRequest, Question};
use agent_api::resolver_ttrpc::Resolver;
use agent_api::ttrpc;
use agent_api::ttrpc::r#async::TtrpcContext;
use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::error::Error;

/// RFC 1035, section 4.2.
const PORT: u16 = 53;
/// Questions that wait for the host, and for their answers; more are dropped, the asker tries again.
const MOST: usize = 256;
/// Connections at once.
const CONNECTIONS: usize = 64;
/// Largest message, bytes: what TCP's length can say.
const LARGEST: usize = u16::MAX as usize;
/// For a client that has connected and does not ask, and for the host's answer to it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where an answer goes.
enum Asker {
    Udp(Arc<UdpSocket>, SocketAddr),
    Tcp(oneshot::Sender<Vec<u8>>),
}

type Asked = (Vec<u8>, Asker);

/// What is asked, and who waits.
pub(crate) struct Names {
    /// `None` once it listens.
    to: Mutex<Option<mpsc::Sender<Asked>>>,
    from: tokio::sync::Mutex<mpsc::Receiver<Asked>>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    last: u64,
    askers: BTreeMap<u64, Asker>,
}

impl Default for Names {
    fn default() -> Self {
        let (to, from) = mpsc::channel(MOST);
        Self { to: Mutex::new(Some(to)), from: from.into(), waiting: Mutex::default() }
    }
}

impl Names {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for the asker. The one that has waited longest makes room: UDP's askers may have gone without a word.
    fn number(&self, asker: Asker) -> u64 {
        let mut waiting = self.waiting();
        waiting.last += 1;
        let id = waiting.last;
        waiting.askers.insert(id, asker);
        if waiting.askers.len() > MOST {
            waiting.askers.pop_first();
        }
        id
    }
}

#[async_trait]
impl Resolver for Names {
    async fn listen(&self, _: &TtrpcContext, request: ListenRequest) -> ttrpc::Result<Empty> {
        let address: Ipv4Addr = request
            .address
            .parse()
            .ok()
            .filter(Ipv4Addr::is_loopback)
            .ok_or_else(|| Error::Invalid(format!("{:?} is not a loopback address", request.address)))?;
        let Some(to) = self.to.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(Empty::new()) };
        match sockets(address).await {
            Ok((udp, tcp)) => {
                tokio::spawn(by_udp(udp, to.clone()));
                tokio::spawn(by_tcp(tcp, to));
                Ok(Empty::new())
            }
            Err(error) => {
                // another try may do better
                *self.to.lock().unwrap_or_else(PoisonError::into_inner) = Some(to);
                Err(Error::failed(format!("listening at {address}, port {PORT}"))(error).into())
            }
        }
    }

    async fn next(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Question> {
        let asked = self.from.lock().await.recv().await;
        let (message, asker) =
            asked.ok_or_else(|| Error::State("the name server of the guest does not run any more".into()))?;
        let tcp = matches!(asker, Asker::Tcp(_));
        Ok(Question { id: self.number(asker), message, tcp, ..Default::default() })
    }

    async fn answer(&self, _: &TtrpcContext, request: AnswerRequest) -> ttrpc::Result<Empty> {
        let asker = self.waiting().askers.remove(&request.id);
        match asker {
            // an asker that hears nothing asks again
            _ if request.message.is_empty() => {}
            Some(Asker::Udp(socket, to)) => {
                let _ = socket.send_to(&request.message, to).await;
            }
            Some(Asker::Tcp(to)) => {
                let _ = to.send(request.message);
            }
            None => {}
        }
        Ok(Empty::new())
    }
}

/// At any port that both have; what is sent to [`PORT`] is led there.
async fn sockets(address: Ipv4Addr) -> io::Result<(UdpSocket, TcpListener)> {
    const TRIES: usize = 16;
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..TRIES {
        let tcp = TcpListener::bind((address, 0)).await?;
        let port = tcp.local_addr()?.port();
        match UdpSocket::bind((address, port)).await {
            Ok(udp) => {
                redirect::add(address, PORT, port)?;
                return Ok((udp, tcp));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn by_udp(socket: UdpSocket, to: mpsc::Sender<Asked>) {
    let socket = Arc::new(socket);
    let mut message = vec![0; LARGEST];
    loop {
        let Ok((count, from)) = socket.recv_from(&mut message).await else { return };
        // full is lost, as in any network
        let _ = to.try_send((message[..count].to_vec(), Asker::Udp(Arc::clone(&socket), from)));
    }
}

async fn by_tcp(listener: TcpListener, to: mpsc::Sender<Asked>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // no descriptor, for one: whoever asks by UDP is served meanwhile
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        };
        let to = to.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let _ = talk(stream, &to).await;
        });
    }
}

/// One question after the other, each with its length before it (RFC 1035, section 4.2.2).
async fn talk(mut stream: TcpStream, to: &mpsc::Sender<Asked>) -> io::Result<()> {
    loop {
        let question = async {
            let mut message = vec![0; stream.read_u16().await?.into()];
            stream.read_exact(&mut message).await?;
            Ok::<_, io::Error>(message)
        };
        let message = timeout(PATIENCE, question).await??;
        let (tell, answer) = oneshot::channel();
        to.send((message, Asker::Tcp(tell))).await.map_err(io::Error::other)?;
        let answer = timeout(PATIENCE, answer).await?.map_err(io::Error::other)?;
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat()).await?;
    }
}
