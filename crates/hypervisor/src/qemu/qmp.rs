//! QEMU's machine protocol, as much of it as we use.
//!
//! A client of our own because it must live through whatever a QEMU of any version says: unknown events, fields and
//! values are passed over. Protocol: docs/interop/qmp-spec.rst of QEMU.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

use crate::Error;

/// Longest message that is read, bytes: `query-*` answers of large machines stay far below.
const LINE_LIMIT: u64 = 1 << 20;

type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Value>>>>>;

/// A connection to a QEMU's monitor.
#[derive(Debug)]
pub(super) struct Qmp {
    writer: AsyncMutex<(OwnedWriteHalf, u64)>,
    waiting: Waiting,
    deadline: Duration,
}

impl Qmp {
    /// Takes an open monitor socket. Capabilities are negotiated at once; the answer is not waited for, since commands
    /// are executed in order.
    pub(super) async fn start(stream: UnixStream, deadline: Duration) -> Result<Self, Error> {
        let (reader, writer) = stream.into_split();
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        tokio::spawn(read_answers(reader, Arc::clone(&waiting)));
        let qmp = Self { writer: AsyncMutex::new((writer, 0)), waiting, deadline };
        qmp.send("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and returns its `return` value.
    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        let answer = self.send(command, arguments).await?;
        let answer = tokio::time::timeout(self.deadline, answer)
            .await
            .map_err(|_| Error::Timeout { call: command.to_owned(), after: self.deadline })?
            .map_err(|_| Error::Gone)?;
        if let Some(error) = answer.get("error") {
            let text = error.get("desc").and_then(Value::as_str).unwrap_or("no description").to_owned();
            return Err(Error::Refused { call: command.to_owned(), answer: text });
        }
        Ok(answer.get("return").cloned().unwrap_or_default())
    }

    async fn send(&self, command: &str, arguments: Value) -> Result<oneshot::Receiver<Value>, Error> {
        let mut writer = self.writer.lock().await;
        writer.1 += 1;
        let id = writer.1;
        let (answer_to, answer) = oneshot::channel();
        match self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(waiting) => waiting.insert(id, answer_to),
            None => return Err(Error::Gone),
        };
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        writer.0.write_all(line.as_bytes()).await.map_err(|_| Error::Gone)?;
        Ok(answer)
    }
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
            tracing::debug!(event, data = %message.get("data").unwrap_or(&serde_json::Value::Null), "qemu event");
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            let waiter =
                waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|map| map.remove(&id));
            if let Some(waiter) = waiter {
                let _ = waiter.send(message);
            }
        }
    }
    // those who wait learn that no answer will come
    waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scripted monitor: greets, then answers each command by `reply`.
    fn monitor(reply: impl Fn(&Value) -> Vec<Value> + Send + 'static) -> UnixStream {
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
