//! Task events to containerd, in the order in which they happened.
//!
//! A publisher of our own (not the one of the `containerd-shim` crate) for two reasons: it keeps the order when
//! containerd is away for a while, and it can be waited for, so that the last event is not lost with the process.
#![allow(unsafe_code, reason = "registering a descriptor with the runtime")]

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{MessageDyn, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use runtime::Event;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use crate::convert;

/// How long containerd may take to take an event.
const ANSWER: Duration = Duration::from_secs(10);

enum Item {
    Event(Box<Envelope>),
    /// Want of memory of this container.
    Oom(String, Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Where events go.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
    wanting: Wanting,
}

/// Containers whose want of memory is queued. A guest can tell of it as often as it likes: one of each waits.
type Wanting = Arc<Mutex<HashSet<String>>>;

impl Publisher {
    pub(crate) fn start(address: String, namespace: String) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        let wanting = Wanting::default();
        tokio::spawn(deliver(address, items, Arc::clone(&wanting)));
        Self { namespace, queue, wanting }
    }

    /// Queues an event. `topic` is from containerd's `runtime` package.
    pub(crate) fn publish(&self, topic: &str, event: &dyn MessageDyn) {
        if let Some(envelope) = self.envelope(topic, event) {
            let _ = self.queue.send(Item::Event(envelope));
        }
    }

    fn publish_oom(&self, container: String) {
        let event = task::TaskOOM { container_id: container.clone(), ..Default::default() };
        if let Some(envelope) = self.envelope("/tasks/oom", &event)
            && lock(&self.wanting).insert(container.clone())
        {
            let _ = self.queue.send(Item::Oom(container, envelope));
        }
    }

    fn envelope(&self, topic: &str, event: &dyn MessageDyn) -> Option<Box<Envelope>> {
        let value = event.write_to_bytes_dyn().ok()?;
        let any = Any { type_url: event.descriptor_dyn().full_name().to_owned(), value, ..Default::default() };
        Some(Box::new(Envelope {
            timestamp: MessageField::some(convert::timestamp(std::time::SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any),
            ..Default::default()
        }))
    }

    /// Publishes what a sandbox tells, for as long as it lives.
    pub(crate) async fn follow(self, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Exit { process, exit, pid } => {
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
                Event::Oom(container) => self.publish_oom(container.to_string()),
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

fn lock(wanting: &Wanting) -> MutexGuard<'_, HashSet<String>> {
    wanting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn deliver(address: String, mut items: mpsc::UnboundedReceiver<Item>, wanting: Wanting) {
    let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(&address));
    let mut client = None;
    while let Some(item) = items.recv().await {
        let envelope = match item {
            Item::Event(envelope) => envelope,
            Item::Oom(container, envelope) => {
                lock(&wanting).remove(&container);
                envelope
            }
            Item::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let request = ForwardRequest { envelope: MessageField::some(*envelope), ..Default::default() };
        // twice: the connection may be one to a containerd that has been restarted
        for _ in 0..2 {
            let connected = match client.take() {
                Some(connected) => connected,
                None => match connect(&path).await {
                    Ok(connected) => connected,
                    Err(error) => {
                        log::error!("cannot publish events to containerd at {}: {error}", path.display());
                        return;
                    }
                },
            };
            match connected.forward(context::with_duration(ANSWER), &request).await {
                Ok(_) => {
                    client = Some(connected);
                    break;
                }
                Err(error) => log::warn!("cannot deliver an event to containerd: {error}"),
            }
        }
    }
}

/// Connects to containerd, now or when it is back: its socket then appears, and gets its owner once it is served.
async fn connect(path: &Path) -> io::Result<EventsClient> {
    let address = format!("unix://{}", path.display());
    let folder = path.parent().ok_or_else(|| io::Error::other("has no parent folder"))?;
    let changes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let seen = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ATTRIB;
    changes.add_watch(folder, seen)?;
    let watched = changes.as_fd().try_clone_to_owned()?;
    // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives, which is what is asked for.
    let watched = unsafe { AsyncFd::register_with_interest(watched, Interest::READABLE) }.map_err(io::Error::from)?;
    loop {
        match Client::connect(&address).await {
            Ok(client) => return Ok(EventsClient::new(client)),
            Err(error) => log::debug!("waiting for containerd's return: {error}"),
        }
        let mut ready = watched.readable().await?;
        match changes.read_events() {
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_one_containers_want_of_memory_one_event_waits() {
        let (queue, mut items) = mpsc::unbounded_channel();
        let publisher = Publisher { namespace: "test".into(), queue, wanting: Wanting::default() };
        for id in ["a", "b", "a", "a"] {
            publisher.publish_oom(id.into());
        }
        assert_eq!(items.len(), 2);
        while let Ok(Item::Oom(id, _)) = items.try_recv() {
            lock(&publisher.wanting).remove(&id);
        }
        publisher.publish_oom("a".into());
        assert_eq!(items.len(), 1);
    }
}
