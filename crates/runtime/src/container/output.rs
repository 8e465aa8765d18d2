//! How far a process's output is, and for how long others wait for it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

/// Output that has not moved for so long has either come to its end, or belongs to a child that lives on.
pub(crate) const QUIET: Duration = Duration::from_millis(250);

/// Output that comes with an end is seen within that, unless the machine is busy.
const GLANCE: Duration = Duration::from_millis(50);

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
    /// Somebody copies, or is still busy with what was copied.
    open: watch::Sender<bool>,
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

    /// Whether a delete has to wait, when all that can be waited for otherwise is over.
    pub(crate) fn is_open(&self, is_open: bool) {
        self.open.send_replace(is_open);
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
    /// unless nobody takes it, or there is no end of it. `guest` asks the guest something.
    pub(crate) async fn before_the_exit<F: Future>(&self, guest: impl Fn() -> F) {
        let _ = timeout(BEFORE_THE_EXIT, self.settled(QUIET, guest)).await;
    }

    /// The last chance of a reader. Then its streams end, and so does its log program, which has limits of its own.
    pub(crate) async fn before_the_delete<F: Future>(&self, guest: impl Fn() -> F) {
        self.deletion.send_replace(Deletion::Asked);
        let _ = timeout(BEFORE_THE_DELETE, self.settled(BEFORE_THE_DELETE, guest)).await;
        self.deletion.send_replace(Deletion::Done);
        let _ = self.open.subscribe().wait_for(|is_open| !is_open).await;
    }

    /// Until all was delivered, or nothing moves: for `stalled` while bytes wait for their reader, else for a moment. How
    /// long a moment is, a guest that shares its processors with many others says by its answer: what was in its pipes
    /// when it was asked came before that.
    async fn settled<F: Future>(&self, stalled: Duration, guest: impl Fn() -> F) {
        loop {
            let before = (self.passed.load(Ordering::Relaxed), self.is_held());
            if self.ends_within(GLANCE).await {
                return;
            }
            if !before.1 {
                let mut done = self.done.subscribe();
                tokio::select! {
                    _ = done.wait_for(|done| *done) => return,
                    _ = guest() => {}
                }
            }
            let patience = if self.is_held() { stalled } else { QUIET };
            if self.ends_within(patience.saturating_sub(GLANCE)).await
                || before == (self.passed.load(Ordering::Relaxed), self.is_held())
            {
                return;
            }
        }
    }

    /// Whether bytes wait for their reader.
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed) > 0
    }

    async fn ends_within(&self, limit: Duration) -> bool {
        timeout(limit, self.done.subscribe().wait_for(|done| *done)).await.is_ok()
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

    /// How long it takes beside others.
    async fn since(work: impl Future<Output = ()>) -> Duration {
        let from = Instant::now();
        work.await;
        from.elapsed()
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
            output.before_the_exit(async || ()).await;
            output.before_the_delete(async || ()).await;
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
            let ((), told) = tokio::join!(writer, since(output.before_the_exit(async || ())));
            assert_eq!(told, Duration::from_millis(700));
        });
        assert_eq!(took, Duration::from_millis(700));
    }

    #[test]
    fn an_exit_does_not_wait_for_a_stalled_reader_nor_for_a_child_nor_for_ever() {
        let stalled = timed(|output| async move {
            output.hold();
            output.before_the_exit(async || ()).await;
        });
        let child = timed(|output| async move { output.before_the_exit(async || ()).await });
        assert_eq!((stalled, child), (QUIET, QUIET));
        let endless = timed(|output| async move {
            tokio::select! {
                () = flow(&output, 1000) => {}
                () = output.before_the_exit(async || ()) => {}
            }
        });
        assert_eq!(endless, BEFORE_THE_EXIT);
    }

    #[test]
    fn a_delete_waits_longer_for_a_reader_but_not_for_a_child() {
        let reader = timed(|output| async move {
            output.hold();
            output.before_the_delete(async || ()).await;
        });
        let child = timed(|output| async move { output.before_the_delete(async || ()).await });
        assert_eq!((reader, child), (BEFORE_THE_DELETE, QUIET));
    }

    /// What was in the guest's pipes comes before its answer.
    #[test]
    fn a_slow_guest_is_waited_for() {
        let took = timed(|output| async move {
            let slow = || sleep(Duration::from_secs(1));
            let writer = async {
                sleep(Duration::from_millis(900)).await;
                output.hold();
                output.pass(1);
                output.let_go();
                sleep(Duration::from_millis(600)).await;
                output.is_done();
            };
            let ((), told) = tokio::join!(writer, since(output.before_the_exit(slow)));
            assert_eq!(told, Duration::from_millis(1500));
        });
        assert_eq!(took, Duration::from_millis(1500));
    }
}
