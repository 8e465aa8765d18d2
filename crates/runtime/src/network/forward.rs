//! Ports of the pod for those who look for them in its network namespace on the host.
//!
//! `kubectl port-forward` ends in a CRI server that enters the pod's namespace and connects to `localhost`. The pod's
//! processes are in the guest, so nobody listens there. This does: what is connected inside the namespace goes through
//! the agent to the same port of the guest's loopback interface.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use agent_api::port::{CloseRequest, DialRequest, ReadRequest, WriteRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::steer::{self, Steering};
use crate::Error;
use crate::agent_client::AgentClient;
use crate::host_network::NetworkNamespace;

/// Connections at once; each may hold two chunks.
const MOST: usize = 256;
/// Bytes of one call.
const CHUNK: usize = 64 << 10;

/// Forwards until dropped.
#[derive(Debug)]
pub(crate) struct Forwarding(JoinHandle<()>);

impl Forwarding {
    /// Ends it, and waits until nothing of it is in the namespace.
    pub(crate) async fn stop(self) {
        self.0.abort();
        // "cancelled" is what was asked for
        let _ = self.0.await;
    }
}

/// Starts to forward what is connected inside the namespace at `path`. A host that cannot has a pod all the same.
pub(crate) fn start(path: PathBuf, agent: AgentClient) -> Forwarding {
    Forwarding(tokio::spawn(async move {
        if let Err(error) = serve(path, agent).await {
            tracing::warn!(%error, "cannot forward connections to the pod's ports");
        }
    }))
}

async fn serve(path: PathBuf, agent: AgentClient) -> Result<(), Error> {
    let what = format!("network namespace {}", path.display());
    let namespace = NetworkNamespace::open(&path).map_err(Error::host(&what))?;
    let (listener, _steering) = namespace.within_plainly(listen).await?.map_err(Error::host(what))?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(Error::host("forwarding"))?;
    let room = Arc::new(Semaphore::new(MOST));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return Ok(()) };
        let (stream, _) = listener.accept().await.map_err(Error::host("forwarding"))?;
        let agent = agent.clone();
        connections.spawn(async move {
            let _permit = permit;
            if let Err(error) = forward(stream, &agent).await {
                tracing::debug!(%error, "a forwarded connection failed");
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

fn listen(namespace: &std::fs::File) -> io::Result<(TcpListener, Steering)> {
    // one socket for both families, where the namespace has both
    let listener =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    listener.set_nonblocking(true)?;
    let steering = steer::all_to(listener.as_fd(), namespace)?;
    Ok((listener, steering))
}

async fn forward(stream: TcpStream, agent: &AgentClient) -> Result<(), Error> {
    // the address that was asked for, not the listener's
    let port = stream.local_addr().map_err(Error::host("a forwarded connection"))?.port();
    let request = DialRequest { port: port.into(), ..Default::default() };
    let dialled = agent
        .port_call(&format!("connecting to port {port} of the pod"), |client, context| async {
            client.dial(context, &request).await
        })
        .await;
    let id = match dialled {
        Ok(answer) => answer.id,
        Err(error) => {
            // so that the other side sees a refusal, not an end
            let _ = stream.set_zero_linger();
            return Err(error);
        }
    };
    let (from, to) = stream.into_split();
    let both = tokio::try_join!(upwards(agent, id, from), downwards(agent, id, to));
    let request = CloseRequest { id, ..Default::default() };
    agent
        .port_call("closing a forwarded connection", |client, context| async { client.close(context, &request).await })
        .await?;
    both.map(drop)
}

async fn upwards(agent: &AgentClient, id: u64, mut from: OwnedReadHalf) -> Result<(), Error> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = from.read(&mut chunk).await.map_err(Error::host("a forwarded connection"))?;
        // an empty one says that no more comes
        let request = WriteRequest { id, data: chunk[..count].to_vec(), ..Default::default() };
        agent
            .port_call("writing to a forwarded connection", |client, context| async {
                client.write(context, &request).await
            })
            .await?;
        if count == 0 {
            return Ok(());
        }
    }
}

async fn downwards(agent: &AgentClient, id: u64, mut to: OwnedWriteHalf) -> Result<(), Error> {
    let request = ReadRequest { id, len: CHUNK as u32, ..Default::default() };
    loop {
        let answer = agent
            .port_call("reading from a forwarded connection", |client, context| async {
                client.read(context, &request).await
            })
            .await?;
        if answer.data.is_empty() {
            return to.shutdown().await.map_err(Error::host("a forwarded connection"));
        }
        to.write_all(&answer.data).await.map_err(Error::host("a forwarded connection"))?;
    }
}
