//! One process: created → running ⇄ paused → stopped. Pure state; the calls are made by the sandbox.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use agent_api::oci;
use tokio::sync::watch;

use super::output::Output;
use crate::request::Stdio;
use crate::{ContainerId, Error, ExecId};

/// Names a process: a container's first, or an exec.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessRef {
    /// The container.
    pub container: ContainerId,
    /// `None` is the container's first process.
    pub exec: Option<ExecId>,
}

impl ProcessRef {
    /// The exec's id on the wire; the first process has the container's.
    pub(crate) fn wire_exec(&self) -> String {
        self.exec.as_ref().map_or_else(|| self.container.as_str(), ExecId::as_str).to_owned()
    }
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Made, not yet started.
    Created,
    /// Runs.
    Running,
    /// Frozen with its container.
    Paused,
    /// Has ended.
    Stopped,
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When the host learnt of it.
    pub at: SystemTime,
}

/// What `State` shows.
#[derive(Debug, Clone)]
pub struct ProcessView {
    /// As [`crate::Sandbox::pid`] of its container.
    pub pid: u32,
    /// Where it is.
    pub status: Status,
    /// Set when it has ended.
    pub exit: Option<Exit>,
    /// Its streams.
    pub stdio: Stdio,
    /// The container's bundle.
    pub bundle: std::path::PathBuf,
}

/// A process and how it may change.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) name: ProcessRef,
    pub(crate) stdio: Stdio,
    /// An exec's specification; the first process has the container's.
    pub(crate) spec: Option<oci::Process>,
    status: Mutex<Status>,
    exit: watch::Sender<Option<Exit>>,
    /// Held while it is being started or deleted: its end is told after its start, and what may be running in the guest
    /// already is not deleted as what never ran.
    pub(crate) changing: Arc<tokio::sync::Mutex<()>>,
    /// How far its output is.
    pub(crate) output: Output,
    /// Ends the copying of its input.
    pub(crate) close_stdin: tokio::sync::Notify,
    /// The size that its terminal is to have from the start on: columns, rows.
    size: Mutex<Option<(u32, u32)>>,
}

impl Process {
    pub(crate) fn new(name: ProcessRef, stdio: Stdio, spec: Option<oci::Process>) -> Self {
        Self {
            name,
            stdio,
            spec,
            status: Mutex::new(Status::Created),
            exit: watch::Sender::new(None),
            changing: Arc::default(),
            output: Output::default(),
            close_stdin: tokio::sync::Notify::new(),
            size: Mutex::default(),
        }
    }

    /// Keeps a size until there is a terminal.
    pub(crate) fn keep_size(&self, columns: u32, rows: u32) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some((columns, rows));
    }

    /// What was kept.
    pub(crate) fn kept_size(&self) -> Option<(u32, u32)> {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn status(&self) -> Status {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes to `to` if that is a step of the life.
    pub(crate) fn advance(&self, to: Status) -> Result<(), Error> {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = matches!(
            (*status, to),
            (Status::Created | Status::Paused, Status::Running)
                | (Status::Running, Status::Paused)
                | (_, Status::Stopped)
        );
        if !allowed {
            let verb = match to {
                Status::Running if *status == Status::Created => "start",
                Status::Running => "start or resume",
                Status::Paused => "pause",
                _ => "change",
            };
            return Err(Error::WrongState(format!("cannot {verb} a {} process", status.name())));
        }
        *status = to;
        Ok(())
    }

    /// Ends it, once; `false` when it had ended before.
    pub(crate) fn ended(&self, status: u32) -> Option<Exit> {
        let exit = Exit { status, at: SystemTime::now() };
        let first = self.exit.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(exit);
            }
            first
        });
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        // an exec's output is read from the start on; nobody would ever say that there is no more
        if *status == Status::Created {
            self.output.is_done();
        }
        *status = Status::Stopped;
        first.then_some(exit)
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    pub(crate) async fn wait(&self) -> Option<Exit> {
        self.exit.subscribe().wait_for(Option::is_some).await.ok().and_then(|exit| *exit)
    }
}

impl Status {
    /// In messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn process() -> Process {
        let container = ContainerId::try_from("c1").expect("an id");
        Process::new(ProcessRef { container, exec: None }, Stdio::default(), None)
    }

    #[test]
    fn a_process_ends_once() {
        let process = process();
        assert_eq!(process.ended(3).map(|exit| exit.status), Some(3));
        assert_eq!(process.ended(4), None);
        assert_eq!(process.exit().map(|exit| exit.status), Some(3));
        process.advance(Status::Running).expect_err("ended");
    }

    #[test]
    fn the_output_of_what_was_never_started_is_complete() {
        let unborn = process();
        unborn.ended(137);
        assert!(unborn.output.done());
        let quick = process();
        quick.advance(Status::Running).expect("started");
        quick.ended(0);
        assert!(!quick.output.done(), "what it wrote may still be on its way");
    }

    proptest! {
        #[test]
        fn stopped_is_for_ever_and_created_is_only_first(steps in proptest::collection::vec(0..4u8, 0..20)) {
            let process = process();
            let mut seen = vec![process.status()];
            for step in steps {
                let to = [Status::Created, Status::Running, Status::Paused, Status::Stopped][step as usize];
                let _ = process.advance(to);
                seen.push(process.status());
            }
            for pair in seen.windows(2) {
                prop_assert!(pair[0] != Status::Stopped || pair[1] == Status::Stopped);
                prop_assert!(pair[1] != Status::Created || pair[0] == Status::Created);
                prop_assert!(!(pair[0] == Status::Created && pair[1] == Status::Paused));
            }
        }
    }
}
