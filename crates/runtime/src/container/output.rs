//! How far a process's output is, and for how long others wait for it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

/// Output that has not moved for so long has either come to its end, or belongs to a child that lives on.
pub(crate) const QUIET: Duration = Duration::from_millis(250);

/// The most by which the word of an exit is held back.
const BEFORE_THE_EXIT: Duration = Duration::from_secs(2);

/// The most that a delete waits for a reader which is there but does not read; as long as runc's shim.
const BEFORE_THE_DELETE: Duration = Duration::from_secs(10);

/// Both streams together.
#[derive(Debug, Default)]
pub(crate) struct Output {
    /// Bytes that were delivered.
    passed: AtomicU64,
    /// Streams with bytes in hand that nobody has taken yet.
    held: AtomicUsize,
    /// All was delivered.
    done: watch::Sender<bool>,
    deletion: watch::Sender<Deletion>,
}

/// What becomes of a process that has ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Deletion {
    #[default]
    None,
    /// Only a reader that is there counts now; one that might come is not waited for.
    Asked,
    /// Nobody cares any more.
    Done,
}

impl Output {
    /// A stream has got bytes.
    pub(crate) fn hold(&self) {
        self.held.fetch_add(1, Ordering::Relaxed);
    }

    /// And has passed them on, or given them up.
    pub(crate) fn let_go(&self) {
        self.held.fetch_sub(1, Ordering::Relaxed);
    }

    /// So many bytes were taken.
    pub(crate) fn pass(&self, count: usize) {
        self.passed.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Both streams have ended.
    pub(crate) fn is_done(&self) {
        self.done.send_replace(true);
    }

    #[cfg(test)]
    pub(crate) fn done(&self) -> bool {
        *self.done.borrow()
    }

    /// Until a delete has come so far.
    pub(crate) async fn deletion(&self, so_far: Deletion) {
        let _ = self.deletion.subscribe().wait_for(|now| *now >= so_far).await;
    }

    /// What a process wrote is delivered before its end is told, as clients close their ends when they hear of it;
    /// unless nobody takes it, or there is no end of it.
    pub(crate) async fn before_the_exit(&self) {
        let _ = timeout(BEFORE_THE_EXIT, self.settled(QUIET)).await;
    }

    /// The last chance of a reader. Then its streams end.
    pub(crate) async fn before_the_delete(&self) {
        self.deletion.send_replace(Deletion::Asked);
        let _ = timeout(BEFORE_THE_DELETE, self.settled(BEFORE_THE_DELETE)).await;
        self.deletion.send_replace(Deletion::Done);
    }

    /// Until all was delivered, or nothing moves: for `stalled` while bytes wait for their reader.
    async fn settled(&self, stalled: Duration) {
        let mut done = self.done.subscribe();
        loop {
            let before = self.passed.load(Ordering::Relaxed);
            let patience = if self.held.load(Ordering::Relaxed) == 0 { QUIET } else { stalled };
            if timeout(patience, done.wait_for(|done| *done)).await.is_ok()
                || self.passed.load(Ordering::Relaxed) == before
            {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::time::{Instant, sleep};

    /// How long each of them takes, on a clock that goes as fast as it can.
    fn timed<F: Future>(work: impl FnOnce(Arc<Output>) -> F) -> Duration {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
        runtime.block_on(async {
            let from = Instant::now();
            work(Arc::new(Output::default())).await;
            from.elapsed()
        })
    }

    /// A stream that delivers a byte each 100 ms.
    async fn flow(output: &Output, count: usize) {
        for _ in 0..count {
            output.hold();
            sleep(Duration::from_millis(100)).await;
            output.pass(1);
            output.let_go();
        }
    }

    #[test]
    fn complete_output_is_not_waited_for() {
        let took = timed(|output| async move {
            output.is_done();
            output.before_the_exit().await;
            output.before_the_delete().await;
        });
        assert_eq!(took, Duration::ZERO);
    }

    #[test]
    fn an_exit_comes_after_what_flows() {
        let took = timed(|output| async move {
            let writer = async {
                flow(&output, 7).await;
                output.is_done();
            };
            tokio::join!(writer, output.before_the_exit());
        });
        assert_eq!(took, Duration::from_millis(700));
    }

    #[test]
    fn an_exit_does_not_wait_for_a_stalled_reader_nor_for_a_child_nor_for_ever() {
        let stalled = timed(|output| async move {
            output.hold();
            output.before_the_exit().await;
        });
        let child = timed(|output| async move { output.before_the_exit().await });
        assert_eq!((stalled, child), (QUIET, QUIET));
        let endless = timed(|output| async move {
            tokio::select! {
                () = flow(&output, 1000) => {}
                () = output.before_the_exit() => {}
            }
        });
        assert_eq!(endless, BEFORE_THE_EXIT);
    }

    #[test]
    fn a_delete_waits_longer_for_a_reader_but_not_for_a_child() {
        let reader = timed(|output| async move {
            output.hold();
            output.before_the_delete().await;
        });
        let child = timed(|output| async move { output.before_the_delete().await });
        assert_eq!((reader, child), (BEFORE_THE_DELETE, QUIET));
    }
}
