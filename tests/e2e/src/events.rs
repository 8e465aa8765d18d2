//! `ctr events`: what containerd tells the world, in order.

use crate::{Node, ctr::Running, journal::Journal};
use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};

/// The topics of the task events.
const TOPIC: &str = " /tasks/";

/// A running `ctr events`.
#[derive(Debug)]
pub struct Events {
    watcher: Running,
    lines: Journal,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// For example `/tasks/start`.
    pub topic: String,
    /// Its content as JSON.
    pub content: String,
}

impl Events {
    /// Starts watching. Returns when containerd has the subscription: a namespace made for it was seen.
    pub fn watch(node: &Node) -> Result<Self> {
        let mut watcher = node.ctr(["events"]).limit(Duration::from_secs(3600)).spawn()?;
        let lines = Journal::default();
        lines.follow(watcher.stdout.take().context("stdout of ctr events")?);
        let events = Self { watcher, lines };
        // ctr says nothing once it listens; an event of our own making does
        let end = Instant::now() + Duration::from_secs(10);
        for n in 0.. {
            let name = format!("e2e-probe-{n}");
            node.ctr(["namespace", "create", &name]).output()?.ok()?;
            let seen = events.lines.wait_from(0, Duration::from_millis(300), |l| l.contains(&name)).is_some();
            node.ctr(["namespace", "remove", &name]).output()?.ok()?;
            if seen {
                break;
            }
            anyhow::ensure!(Instant::now() < end, "ctr events shows nothing within 10 s");
        }
        Ok(events)
    }

    /// Waits for an event of this topic about this container; returns when it came.
    pub fn wait(&self, topic: &str, id: &str, limit: Duration) -> Result<(Instant, Event)> {
        self.wait_matching(&format!("{topic} about {id}"), limit, |e| {
            e.topic == topic && e.content.contains(&format!("\"{id}\""))
        })
    }

    /// Waits for the end of the container's first process; execs end with an event of the same topic.
    pub fn wait_exit(&self, id: &str, limit: Duration) -> Result<(Instant, Event)> {
        let named = format!("\"id\":\"{id}\"");
        self.wait_matching(&format!("exit of {id}"), limit, |e| e.topic == "/tasks/exit" && e.content.contains(&named))
    }

    /// Waits for an event that `wanted` accepts.
    pub fn wait_matching(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<(Instant, Event)> {
        let found = self.lines.wait_from(0, limit, |l| parse(l).is_some_and(|e| wanted(&e)));
        let (at, line) = found.with_context(|| {
            format!("no event {what} within {limit:?}; there were:\n  {}", self.lines.lines_from(0).join("\n  "))
        })?;
        Ok((at, parse(&line).context("an event")?))
    }

    /// The task events about one container so far, in order.
    pub fn of(&self, id: &str) -> Vec<Event> {
        let quoted = format!("\"{id}\"");
        self.lines.lines_from(0).iter().filter_map(|l| parse(l)).filter(|e| e.content.contains(&quoted)).collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.watcher.pid(), nix::sys::signal::Signal::SIGKILL);
    }
}

/// A line of `ctr events` is a time of several words, the namespace, the topic, and the content in JSON.
fn parse(line: &str) -> Option<Event> {
    let (_, rest) = line.split_once(TOPIC)?;
    let (kind, content) = rest.split_once(' ')?;
    Some(Event { topic: format!("/tasks/{kind}"), content: content.to_owned() })
}
