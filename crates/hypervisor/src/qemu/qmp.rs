//! QEMU's machine protocol, as much of it as we use.
//!
//! A client of our own because it must live through whatever a QEMU of any version says: unknown events, fields and
//! values are passed over. Protocol: docs/interop/qmp-spec.rst of QEMU.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};
use tokio::task::AbortHandle;

use crate::Error;

/// Longest message that is read, bytes: `query-*` answers of large machines stay far below.
const LINE_LIMIT: u64 = 1 << 20;

/// Who waits for what. `None` once the connection has ended.
type Waiting = Arc<Mutex<Option<Waiters>>>;

#[derive(Debug, Default)]
struct Waiters {
    answers: HashMap<u64, oneshot::Sender<Value>>,
    /// By a device's id.
    departures: HashMap<String, watch::Sender<Departure>>,
    /// The state of the guest is written or read, or could not be.
    migration: Option<oneshot::Sender<Result<(), String>>>,
    /// The guest is stopped, by whomever; the last one's end is the connection's.
    stops: watch::Sender<()>,
}

/// What became of a device that was asked to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Departure {
    /// Nothing yet.
    Asked,
    /// The guest will not let go of it now. It may do so later.
    Refused,
    /// The guest has let go of it.
    Gone,
}

/// A connection to a QEMU's monitor.
#[derive(Debug)]
pub(super) struct Qmp {
    writer: AsyncMutex<(OwnedWriteHalf, u64)>,
    waiting: Waiting,
    deadline: Duration,
    reader: AbortHandle,
}

impl Qmp {
    /// Takes an open monitor socket. Capabilities are negotiated at once; the answer is not waited for, since commands
    /// are executed in order.
    pub(super) async fn start(stream: UnixStream, deadline: Duration) -> Result<Self, Error> {
        let (reader, writer) = stream.into_split();
        let waiting: Waiting = Arc::new(Mutex::new(Some(Waiters::default())));
        let reader = tokio::spawn(read_answers(reader, Arc::clone(&waiting))).abort_handle();
        let qmp = Self { writer: AsyncMutex::new((writer, 0)), waiting, deadline, reader };
        qmp.send("qmp_capabilities", json!({}), None).await?;
        Ok(qmp)
    }

    /// The socket, for another process: nothing is read here any more.
    pub(super) async fn lend(&self) -> std::io::Result<OwnedFd> {
        self.reader.abort();
        let writer = self.writer.lock().await;
        let stream: &UnixStream = writer.0.as_ref();
        stream.as_fd().try_clone_to_owned()
    }

    /// Runs a command and returns its `return` value.
    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.execute_with(command, arguments, None).await
    }

    /// Gives QEMU a descriptor under a name. One at a time: QEMU keeps only the last one that it has read until the
    /// command is executed.
    pub(super) async fn give(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.execute_with("getfd", json!({"fdname": name}), Some(fd)).await.map(drop)
    }

    /// Tells when the guest has let go of a device. Ask before `device_del`, so that nothing is missed; who asked earlier
    /// hears no more.
    pub(super) fn departure(&self, device: &str) -> Result<watch::Receiver<Departure>, Error> {
        let (to, from) = watch::channel(Departure::Asked);
        match self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(waiting) => waiting.departures.insert(device.to_owned(), to),
            None => return Err(Error::Gone),
        };
        Ok(from)
    }

    /// Changes whenever the guest is stopped, and ends with the connection.
    pub(super) fn stops(&self) -> watch::Receiver<()> {
        match self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(waiting) => waiting.stops.subscribe(),
            None => watch::channel(()).1,
        }
    }

    /// How long a command may take.
    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Resolves when a migration has come to its end. Ask before it begins.
    pub(super) fn migration(&self) -> Result<oneshot::Receiver<Result<(), String>>, Error> {
        let (to, from) = oneshot::channel();
        match self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(waiting) => waiting.migration = Some(to),
            None => return Err(Error::Gone),
        }
        Ok(from)
    }

    /// As [`Qmp::execute`], with a descriptor that goes with the command.
    pub(super) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Error> {
        let answer = self.send(command, arguments, fd).await?;
        let answer = tokio::time::timeout(self.deadline, answer)
            .await
            .map_err(|_| Error::Timeout { call: command.to_owned(), after: self.deadline })?
            .map_err(|_| Error::Gone)?;
        if let Some(error) = answer.get("error") {
            let answer = error.get("desc").and_then(Value::as_str).unwrap_or("no description").to_owned();
            let call = command.to_owned();
            return Err(match error.get("class").and_then(Value::as_str) {
                Some("DeviceNotFound") => Error::NoDevice { call, answer },
                _ => Error::Refused { call, answer },
            });
        }
        Ok(answer.get("return").cloned().unwrap_or_default())
    }

    async fn send(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<oneshot::Receiver<Value>, Error> {
        let mut writer = self.writer.lock().await;
        writer.1 += 1;
        let id = writer.1;
        let (answer_to, answer) = oneshot::channel();
        match self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(waiting) => waiting.answers.insert(id, answer_to),
            None => return Err(Error::Gone),
        };
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        let mut sent = 0;
        if let Some(fd) = fd {
            sent = send_with(&writer.0, line.as_bytes(), fd).await.map_err(Error::system("passing a descriptor"))?;
        }
        writer.0.write_all(&line.as_bytes()[sent..]).await.map_err(|_| Error::Gone)?;
        Ok(answer)
    }
}

/// Sends the first bytes together with a descriptor, and says how many bytes went (unix(7), `SCM_RIGHTS`).
async fn send_with(writer: &OwnedWriteHalf, bytes: &[u8], fd: BorrowedFd<'_>) -> std::io::Result<usize> {
    let stream: &UnixStream = writer.as_ref();
    stream
        .async_io(Interest::WRITABLE, || {
            let fds = [fd.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None).map_err(Into::into)
        })
        .await
}

async fn read_answers(reader: OwnedReadHalf, waiting: Waiting) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE_LIMIT).read_until(b'\n', &mut line).await {
            Ok(count) if count > 0 && line.ends_with(b"\n") => {}
            _ => break,
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { continue };
        if let Some(event) = message.get("event").and_then(Value::as_str) {
            let data = message.get("data").unwrap_or(&Value::Null);
            tracing::debug!(event, %data, "qemu event");
            if event == "STOP"
                && let Some(waiters) = waiting.lock().unwrap_or_else(PoisonError::into_inner).as_ref()
            {
                waiters.stops.send_replace(());
            }
            if event == "MIGRATION"
                && let Some(outcome) = migration(data)
            {
                let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(waiter) = waiting.as_mut().and_then(|map| map.migration.take()) {
                    let _ = waiter.send(outcome);
                }
            }
            if let Some(departure) = departure(event)
                && let Some(device) = data.get("device").and_then(Value::as_str)
                && let Some(waiters) = waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
            {
                match departure {
                    // the last that is heard of it
                    Departure::Gone => {
                        waiters.departures.remove(device).map(|waiter| waiter.send_replace(departure));
                    }
                    _ => {
                        waiters.departures.get(device).map(|waiter| waiter.send_replace(departure));
                    }
                }
            }
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            let waiter =
                waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|map| map.answers.remove(&id));
            if let Some(waiter) = waiter {
                let _ = waiter.send(message);
            }
        } else if message.get("QMP").is_some() {
            tracing::debug!("QEMU's monitor is there");
        }
    }
    // those who wait learn that no answer will come
    waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
}

fn departure(event: &str) -> Option<Departure> {
    match event {
        "DEVICE_DELETED" => Some(Departure::Gone),
        "DEVICE_UNPLUG_GUEST_ERROR" => Some(Departure::Refused),
        _ => None,
    }
}

/// What the event tells when it is the last one.
fn migration(data: &Value) -> Option<Result<(), String>> {
    match data.get("status").and_then(Value::as_str)? {
        "completed" => Some(Ok(())),
        failed @ ("failed" | "cancelled") => Some(Err(failed.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A scripted monitor: greets, then answers each command by `reply`.
    pub(in super::super) fn monitor(reply: impl Fn(&Value) -> Vec<Value> + Send + 'static) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        tokio::spawn(async move {
            let (reader, mut writer) = theirs.into_split();
            let mut lines = BufReader::new(reader).lines();
            let _ = writer.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").await;
            while let Ok(Some(line)) = lines.next_line().await {
                let command: Value = serde_json::from_str(&line).expect("json");
                for answer in reply(&command) {
                    let _ = writer.write_all(format!("{answer}\r\n").as_bytes()).await;
                }
            }
        });
        ours
    }

    #[tokio::test]
    async fn passes_over_what_it_does_not_know() {
        let stream = monitor(|command| {
            vec![
                json!({"event": "FROM_THE_FUTURE", "data": {"x": [1]}}),
                json!({"return": {"status": "running"}, "id": command["id"]}),
            ]
        });
        let qmp = Qmp::start(stream, Duration::from_secs(5)).await.expect("started");
        let status = qmp.execute("query-status", json!({})).await.expect("answered");
        assert_eq!(status["status"], "running");
    }

    #[tokio::test]
    async fn errors_are_told() {
        let stream = monitor(|c| vec![json!({"error": {"class": "GenericError", "desc": "no such"}, "id": c["id"]})]);
        let qmp = Qmp::start(stream, Duration::from_secs(5)).await.expect("started");
        let error = qmp.execute("stop", json!({})).await.expect_err("refused");
        assert_eq!(error.to_string(), "stop refused by the VMM: no such");
    }

    #[tokio::test]
    async fn departures_are_told_by_device() {
        let stream = monitor(|command| {
            let device = command["arguments"]["id"].clone();
            vec![
                json!({"return": {}, "id": command["id"]}),
                json!({"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/other/virtio-backend"}}),
                json!({"event": "DEVICE_DELETED", "data": {"device": "other"}}),
                json!({"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": "b"}}),
                json!({"event": "DEVICE_DELETED", "data": {"device": device}}),
            ]
        });
        let qmp = Qmp::start(stream, Duration::from_secs(5)).await.expect("started");
        let (mut a, mut b) = (qmp.departure("a").expect("open"), qmp.departure("b").expect("open"));
        qmp.execute("device_del", json!({"id": "a"})).await.expect("answered");
        a.wait_for(|seen| *seen == Departure::Gone).await.expect("told");
        b.wait_for(|seen| *seen == Departure::Refused).await.expect("told");
        qmp.execute("device_del", json!({"id": "b"})).await.expect("answered");
        b.wait_for(|seen| *seen == Departure::Gone).await.expect("told of what follows a refusal");
    }

    #[tokio::test]
    async fn a_descriptor_goes_with_its_command() {
        use std::io::{IoSliceMut, Read as _, Write as _};
        use std::os::fd::{AsFd, FromRawFd, OwnedFd};
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let monitor = std::thread::spawn(move || {
            let mut theirs = theirs;
            let mut text = Vec::new();
            let mut passed = None;
            while text.split(|byte| *byte == b'\n').count() < 3 {
                let mut part = [0; 4096];
                let mut space = nix::cmsg_space!(std::os::fd::RawFd);
                let mut parts = [IoSliceMut::new(&mut part)];
                let got = nix::sys::socket::recvmsg::<()>(
                    theirs.as_raw_fd(),
                    &mut parts,
                    Some(&mut space),
                    MsgFlags::empty(),
                )
                .expect("received");
                let bytes = got.bytes;
                for message in got.cmsgs().expect("whole") {
                    if let nix::sys::socket::ControlMessageOwned::ScmRights(fds) = message {
                        passed = fds.first().copied();
                    }
                }
                text.extend_from_slice(&part[..bytes]);
            }
            let last: Value =
                serde_json::from_slice(text.split(|byte| *byte == b'\n').nth(1).expect("two")).expect("json");
            theirs.write_all(format!("{}\n", json!({"return": {}, "id": last["id"]})).as_bytes()).expect("answered");
            #[expect(unsafe_code, reason = "a descriptor that came over a socket")]
            // SAFETY: recvmsg has just made it for us.
            let mut file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(passed.expect("a descriptor")) });
            let mut said = String::new();
            file.read_to_string(&mut said).expect("read");
            (last, said)
        });
        ours.set_nonblocking(true).expect("set");
        let qmp =
            Qmp::start(UnixStream::from_std(ours).expect("a stream"), Duration::from_secs(5)).await.expect("started");
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        writer.write_all(b"through").expect("written");
        drop(writer);
        qmp.give("tap0", reader.as_fd()).await.expect("given");
        drop(reader);
        let (command, said) = monitor.join().expect("ended");
        assert_eq!((command["execute"].as_str(), said.as_str()), (Some("getfd"), "through"));
    }

    #[tokio::test]
    async fn a_closed_monitor_ends_the_wait() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let qmp = Qmp::start(ours, Duration::from_secs(60)).await.expect("started");
        let waiting = qmp.execute("stop", json!({}));
        tokio::pin!(waiting);
        tokio::select! {
            biased;
            _ = &mut waiting => panic!("no answer was given"),
            () = tokio::task::yield_now() => {}
        }
        drop(theirs);
        assert!(matches!(waiting.await, Err(Error::Gone)));
    }
}
