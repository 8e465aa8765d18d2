//! Work on files of the host, which may be on a file system that never answers (a dead NFS server, a stopped FUSE daemon).
//!
//! A system call on such a file system cannot be ended, so none is made on the shim's event loop. Each piece of work is a
//! job on a thread of its own, with a deadline. A job that has missed it, or that nobody wants any more, keeps its thread
//! until the file system answers; then the job undoes what it has made, and its thread ends. The number of jobs is
//! bounded, and they do not share threads with anything else that the shim must be able to do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::Instant;

use crate::Error;

/// Most jobs of a pod at the same time, those that hang included.
const JOBS: usize = 32;

/// What a job tells of itself, and is told.
#[derive(Debug)]
pub(crate) struct Progress {
    step: Mutex<String>,
    is_abandoned: AtomicBool,
}

impl Progress {
    fn new(step: &str) -> Arc<Self> {
        Arc::new(Self { step: Mutex::new(step.to_owned()), is_abandoned: AtomicBool::new(false) })
    }

    /// Begins a step; `what` is what an error calls it when the step does not end.
    ///
    /// # Errors
    /// Nobody waits for the job any more: it must make nothing else, and undo what it has made.
    pub(crate) fn step(&self, what: impl Into<String>) -> Result<(), Error> {
        if self.is_abandoned() {
            return Err(Error::WrongState("nobody waits for the job any more".into()));
        }
        *self.step.lock().unwrap_or_else(PoisonError::into_inner) = what.into();
        Ok(())
    }

    /// Whether nobody waits for the job any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.is_abandoned.load(Ordering::Acquire)
    }

    fn abandon(&self) {
        self.is_abandoned.store(true, Ordering::Release);
    }

    fn current(&self) -> String {
        self.step.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The jobs of one pod. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct HostWork {
    limit: Duration,
    free: Arc<Semaphore>,
    /// Becomes true when what the jobs are for is not wanted any more.
    cancelled: Option<watch::Receiver<bool>>,
}

impl HostWork {
    /// `limit` is `create_container_timeout`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, free: Arc::new(Semaphore::new(JOBS)), cancelled: None }
    }

    /// The same, for work that ends when `cancelled` becomes true.
    pub(crate) fn until(&self, cancelled: watch::Receiver<bool>) -> Self {
        Self { cancelled: Some(cancelled), ..self.clone() }
    }

    /// The same, with another limit.
    pub(crate) fn within(&self, limit: Duration) -> Self {
        Self { limit, ..self.clone() }
    }

    /// Does `work`, whose outcome holds nothing that its drop does not give back. `what` is its first step.
    ///
    /// # Errors
    /// What the work says; [`Error::HostSilent`] with the step that it is at when the limit has passed; or it was cancelled.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Progress) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.run_or_undo(what, work, drop).await
    }

    /// The same, where an outcome that nobody waits for any more is given to `undo`, on the job's thread.
    ///
    /// # Errors
    /// As [`HostWork::run`].
    pub(crate) async fn run_or_undo<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Progress) -> Result<T, Error> + Send + 'static,
        undo: impl FnOnce(T) + Send + 'static,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + self.limit;
        let job = Job { progress: Progress::new(what) };
        let started = tokio::select! {
            permit = Arc::clone(&self.free).acquire_owned() => permit,
            ended = self.ended(deadline) => return Err(match ended {
                End::Cancelled => cancelled(what),
                End::Deadline => Error::WrongState(format!(
                    "{what}: {JOBS} jobs of this pod wait for file systems of the host that do not answer"
                )),
            }),
        };
        let permit = started.map_err(|closed| Error::WrongState(closed.to_string()))?;
        let (tell, mut told) = oneshot::channel();
        let progress = Arc::clone(&job.progress);
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let outcome = work(&progress);
            if let Err(Ok(unwanted)) = tell.send(outcome) {
                undo(unwanted);
            }
        });
        let ended = tokio::select! {
            biased;
            outcome = &mut told => return outcome.unwrap_or_else(|_| Err(lost(what))),
            ended = self.ended(deadline) => ended,
        };
        // what was told before this moment is ours, what comes after it the job's
        told.close();
        if let Ok(outcome) = told.try_recv() {
            return outcome;
        }
        Err(match ended {
            End::Cancelled => cancelled(&job.progress.current()),
            End::Deadline => Error::HostSilent { what: job.progress.current(), limit: self.limit },
        })
    }

    /// Waits for work that does no system call here that may hang, with the same limit.
    ///
    /// # Errors
    /// As [`HostWork::run`].
    pub(crate) async fn wait<T>(&self, what: &str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::select! {
            biased;
            outcome = work => outcome,
            ended = self.ended(Instant::now() + self.limit) => Err(match ended {
                End::Cancelled => cancelled(what),
                End::Deadline => Error::HostSilent { what: what.into(), limit: self.limit },
            }),
        }
    }

    /// Waits until no job runs, or `limit` has passed: then those that are left hang. Whether none runs.
    pub(crate) async fn settled(&self, limit: Duration) -> bool {
        let all = u32::try_from(JOBS).unwrap_or(u32::MAX);
        tokio::time::timeout(limit, self.free.acquire_many(all)).await.is_ok()
    }

    async fn ended(&self, deadline: Instant) -> End {
        let cancelled = async {
            if let Some(mut cancelled) = self.cancelled.clone()
                && cancelled.wait_for(|cancelled| *cancelled).await.is_ok()
            {
                return;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = cancelled => End::Cancelled,
            () = tokio::time::sleep_until(deadline) => End::Deadline,
        }
    }
}

enum End {
    Cancelled,
    Deadline,
}

/// Whoever waits for a job. When he goes away, the job is told.
struct Job {
    progress: Arc<Progress>,
}

impl Drop for Job {
    fn drop(&mut self) {
        self.progress.abandon();
    }
}

fn cancelled(what: &str) -> Error {
    Error::WrongState(format!("{what}: cancelled"))
}

fn lost(what: &str) -> Error {
    Error::Host { what: what.into(), source: std::io::Error::other("its thread has failed") }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A job that waits for a word, as one that waits for a file system; hands out what happens to its outcome.
    fn hanging(
        work: &HostWork,
    ) -> (impl Future<Output = Result<&'static str, Error>> + use<>, mpsc::Sender<()>, mpsc::Receiver<&'static str>)
    {
        let (answer, file_system) = mpsc::channel::<()>();
        let (undo, undone) = mpsc::channel();
        let work = work.clone();
        let job = async move {
            let hangs = move |progress: &Progress| {
                progress.step("source /nfs of the mount on /data")?;
                file_system.recv().map_err(|_| Error::Invalid("no answer".into()))?;
                Ok("made")
            };
            work.run_or_undo("a container", hangs, move |made| undo.send(made).expect("heard")).await
        };
        (job, answer, undone)
    }

    #[tokio::test]
    async fn a_job_that_hangs_fails_at_its_deadline_and_undoes_what_it_makes_later() {
        let mut limit = Duration::from_millis(20);
        // on a busy machine the deadline may pass before the job's thread runs
        let (work, error, answer, undone) = loop {
            let work = HostWork::new(limit);
            let (job, answer, undone) = hanging(&work);
            let error = job.await.expect_err("no answer").to_string();
            if error.starts_with("source /nfs of the mount on /data: ") {
                break (work, error, answer, undone);
            }
            assert!(error.starts_with("a container: "), "{error}");
            limit *= 2;
        };
        assert!(error.contains(&format!("within {limit:?}")), "{error}");
        assert!(!work.settled(Duration::from_millis(5)).await, "it hangs");
        answer.send(()).expect("heard");
        assert_eq!(undone.recv(), Ok("made"));
        assert!(work.settled(Duration::from_secs(60)).await);
    }

    #[tokio::test]
    async fn a_cancelled_job_is_not_waited_for() {
        let (cancel, cancelled) = watch::channel(false);
        let work = HostWork::new(Duration::from_secs(1000)).until(cancelled);
        let (job, answer, undone) = hanging(&work);
        let job = tokio::spawn(job);
        cancel.send(true).expect("heard");
        let error = job.await.expect("no panic").expect_err("cancelled").to_string();
        assert!(error.ends_with(": cancelled"), "{error}");
        // it may have been cancelled before it had begun
        if answer.send(()).is_ok() {
            let _ = undone.recv();
        }
        assert!(work.settled(Duration::from_secs(60)).await);
    }

    #[tokio::test]
    async fn a_job_whose_caller_has_gone_begins_no_further_step() {
        let work = HostWork::new(Duration::from_secs(1000));
        let (answer, file_system) = mpsc::channel::<()>();
        let (began, begun) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let job = tokio::spawn({
            let work = work.clone();
            async move {
                let hangs = move |progress: &Progress| {
                    let _ = began.send(());
                    file_system.recv().map_err(|_| Error::Invalid("no answer".into()))?;
                    let next = progress.step("mounting");
                    tell.send(next.is_err()).expect("heard");
                    next
                };
                work.run("opening", hangs).await
            }
        });
        begun.await.expect("begun");
        job.abort();
        let _ = job.await;
        answer.send(()).expect("heard");
        assert_eq!(told.recv(), Ok(true));
        assert!(work.settled(Duration::from_secs(60)).await);
    }

    #[tokio::test]
    async fn an_outcome_and_an_error_come_through() {
        let work = HostWork::new(Duration::from_secs(60));
        assert_eq!(work.run("it", |_| Ok(7)).await.expect("done"), 7);
        let refused = work.run("it", |_| Err::<(), _>(Error::Invalid("no".into()))).await;
        assert_eq!(refused.expect_err("refused").to_string(), "no");
    }

    #[tokio::test]
    async fn jobs_that_hang_are_bounded() {
        let work = HostWork::new(Duration::from_secs(1000));
        let (jobs, answers): (Vec<_>, Vec<_>) = (0..JOBS)
            .map(|_| {
                let (job, answer, undone) = hanging(&work);
                (tokio::spawn(job), (answer, undone))
            })
            .unzip();
        while work.free.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let late = work.within(Duration::from_millis(20));
        let error = late.run("one more", |_| Ok(())).await.expect_err("too many").to_string();
        assert!(error.starts_with("one more: 32 jobs"), "{error}");
        for (answer, _) in &answers {
            answer.send(()).expect("heard");
        }
        for job in jobs {
            assert_eq!(job.await.expect("no panic").expect("made"), "made");
        }
        assert!(work.settled(Duration::from_secs(60)).await);
    }
}
