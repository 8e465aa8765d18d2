//! TCP connections into the guest that the host asks for, each with an id.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::limits::STREAM_CHUNK;
use agent_api::port::{CloseRequest, DialRequest, DialResponse, ReadRequest, ReadResponse, WriteRequest};
use agent_api::port_ttrpc::Port;
use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::ttrpc;
use agent_api::ttrpc::r#async::TtrpcContext;
use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::error::Error;

/// Most connections at once.
const MOST: usize = 1024;

/// One connection; its halves are used by one call each at a time.
struct Connection {
    from: tokio::sync::Mutex<OwnedReadHalf>,
    to: tokio::sync::Mutex<OwnedWriteHalf>,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Ports(Mutex<Open>);

#[derive(Default)]
struct Open {
    last: u64,
    all: HashMap<u64, Arc<Connection>>,
}

impl Ports {
    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(&self, id: u64) -> Result<Arc<Connection>, Error> {
        self.open().all.get(&id).cloned().ok_or_else(|| Error::NotFound(format!("connection {id}")))
    }
}

#[async_trait]
impl Port for Ports {
    async fn dial(&self, _: &TtrpcContext, request: DialRequest) -> ttrpc::Result<DialResponse> {
        let port = u16::try_from(request.port)
            .map_err(|_| Error::Invalid(format!("invalid port {}: must be at most 65535", request.port)))?;
        let stream = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(stream) => Ok(stream),
            // as Go's net.Dial("localhost") and curl try
            Err(refused) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| refused),
        };
        let (from, to) = stream.map_err(Error::failed(format!("connecting to port {port}")))?.into_split();
        let connection = Connection { from: from.into(), to: to.into() };
        let mut open = self.open();
        if open.all.len() >= MOST {
            return Err(Error::State(format!("too many forwarded connections: the limit is {MOST}")).into());
        }
        open.last += 1;
        let id = open.last;
        open.all.insert(id, Arc::new(connection));
        Ok(DialResponse { id, ..Default::default() })
    }

    async fn read(&self, _: &TtrpcContext, request: ReadRequest) -> ttrpc::Result<ReadResponse> {
        let connection = self.connection(request.id)?;
        let mut data = vec![0; (request.len as usize).clamp(1, STREAM_CHUNK)];
        let count = connection.from.lock().await.read(&mut data).await.map_err(Error::failed("reading"))?;
        data.truncate(count);
        Ok(ReadResponse { data, ..Default::default() })
    }

    async fn write(&self, _: &TtrpcContext, request: WriteRequest) -> ttrpc::Result<Empty> {
        let connection = self.connection(request.id)?;
        let mut to = connection.to.lock().await;
        let written = if request.data.is_empty() { to.shutdown().await } else { to.write_all(&request.data).await };
        written.map_err(Error::failed("writing"))?;
        Ok(Empty::new())
    }

    async fn close(&self, _: &TtrpcContext, request: CloseRequest) -> ttrpc::Result<Empty> {
        self.open().all.remove(&request.id);
        Ok(Empty::new())
    }
}
