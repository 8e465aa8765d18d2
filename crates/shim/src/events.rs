//! Task events to containerd, in the order in which they happened.
//!
//! A publisher of our own (not the one of the `containerd-shim` crate) for two reasons: it keeps the order when
//! containerd is away for a while, and it can be waited for, so that the last event is not lost with the process.

use std::time::Duration;

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageDyn, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use runtime::Event;
use tokio::sync::{mpsc, oneshot};

use crate::convert;

/// How often an event is tried while containerd is away, a second apart.
const TRIES: u32 = 60;

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Where events go.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

impl Publisher {
    pub(crate) fn start(address: String, namespace: String) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        tokio::spawn(deliver(address, items));
        Self { namespace, queue }
    }

    /// Queues an event. `topic` is from containerd's `runtime` package.
    pub(crate) fn publish(&self, topic: &str, event: &dyn MessageDyn) {
        let Ok(value) = event.write_to_bytes_dyn() else { return };
        let any = Any { type_url: event.descriptor_dyn().full_name().to_owned(), value, ..Default::default() };
        let envelope = Envelope {
            timestamp: MessageField::some(convert::timestamp(std::time::SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any),
            ..Default::default()
        };
        let _ = self.queue.send(Item::Event(Box::new(envelope)));
    }

    /// Publishes what a sandbox tells, for as long as it lives.
    pub(crate) async fn follow(self, pid: u32, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Exit(process, exit) => {
                    let id = process.exec.as_ref().map_or_else(|| process.container.to_string(), ToString::to_string);
                    let event = task::TaskExit {
                        container_id: process.container.to_string(),
                        id,
                        pid,
                        exit_status: exit.status,
                        exited_at: MessageField::some(convert::timestamp(exit.at)),
                        ..Default::default()
                    };
                    self.publish("/tasks/exit", &event);
                }
                Event::Oom(container) => {
                    let event = task::TaskOOM { container_id: container.to_string(), ..Default::default() };
                    self.publish("/tasks/oom", &event);
                }
            }
        }
    }

    /// Waits until everything that is queued has been delivered, or `limit` has passed.
    pub(crate) async fn flush(&self, limit: Duration) {
        let (done, wait) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            let _ = tokio::time::timeout(limit, wait).await;
        }
    }
}

async fn deliver(address: String, mut items: mpsc::UnboundedReceiver<Item>) {
    let address = if address.contains("://") { address } else { format!("unix://{address}") };
    let mut client = None;
    while let Some(item) = items.recv().await {
        let envelope = match item {
            Item::Event(envelope) => envelope,
            Item::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let request = ForwardRequest { envelope: MessageField::some(*envelope), ..Default::default() };
        for _ in 0..TRIES {
            if client.is_none() {
                client = Client::connect(&address).await.ok().map(EventsClient::new);
            }
            if let Some(connected) = &client {
                match connected.forward(context::with_duration(Duration::from_secs(10)), &request).await {
                    Ok(_) => break,
                    Err(error) => log::debug!("event not delivered: {error}"),
                }
                client = None;
                // the connection may only have been an old one
                if let Ok(fresh) = Client::connect(&address).await {
                    client = Some(EventsClient::new(fresh));
                    continue;
                }
            }
            // containerd is away, and nothing tells when it is back
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
