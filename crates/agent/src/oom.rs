//! Who was hit by the kernel's out-of-memory killer: inotify on each container's `memory.events`.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::Notify;

use crate::cgroup::READY;

struct Watched {
    id: String,
    file: PathBuf,
    kills: u64,
}

impl Watched {
    /// Whether the kernel has killed since the last look.
    fn hit(&mut self) -> bool {
        let before = self.kills;
        self.kills = kills(&self.file).max(before);
        self.kills > before
    }
}

/// Watches containers; tells their ids. Clones share it.
#[derive(Clone)]
pub(crate) struct OomWatch {
    inotify: Arc<Inotify>,
    watched: Arc<Mutex<HashMap<WatchDescriptor, Watched>>>,
    hits: Arc<Hits>,
}

/// Those that were hit and nobody has been told of.
#[derive(Default)]
struct Hits {
    ids: Mutex<VecDeque<String>>,
    more: Notify,
    fewer: Notify,
    /// Somebody wants to be told.
    is_asked: AtomicBool,
}

impl Hits {
    fn ids(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of each waits to be told: a container may be hit as often as it likes.
    fn push(&self, id: String) {
        let mut ids = self.ids();
        if !ids.contains(&id) {
            ids.push_back(id);
            self.more.notify_one();
        }
    }

    async fn pop(&self) -> String {
        self.is_asked.store(true, Ordering::Relaxed);
        loop {
            if let Some(id) = self.ids().pop_front() {
                self.fewer.notify_waiters();
                return id;
            }
            self.more.notified().await;
        }
    }

    async fn none_of(&self, id: &str) {
        loop {
            let fewer = self.fewer.notified();
            if !self.ids().iter().any(|one| one == id) {
                return;
            }
            fewer.await;
        }
    }
}

/// How long an end may be held back for one that asks who was hit, and does not ask again.
const PATIENCE: Duration = Duration::from_millis(200);

impl OomWatch {
    pub(crate) fn start() -> std::io::Result<Self> {
        let inotify = Arc::new(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?);
        let watch = Self { inotify: Arc::clone(&inotify), watched: Arc::default(), hits: Arc::default() };
        let (watched, hits) = (Arc::clone(&watch.watched), Arc::clone(&watch.hits));
        let ready = crate::io::watch(inotify.as_fd().try_clone_to_owned()?)?;
        tokio::spawn(async move {
            while let Ok(mut guard) = ready.readable().await {
                guard.clear_ready();
                for event in inotify.read_events().unwrap_or_default() {
                    let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
                    let Some(one) = watched.get_mut(&event.wd) else { continue };
                    if one.hit() {
                        hits.push(one.id.clone());
                    }
                    if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                        watched.remove(&event.wd);
                    }
                }
            }
        });
        Ok(watch)
    }

    /// From now on, until it is removed. What was watched ahead, as [`READY`], has this name from now on.
    pub(crate) fn add(&self, id: &str, file: PathBuf) {
        let mut watched = self.watched();
        if let Some(ready) = watched.values_mut().find(|one| one.id == READY && one.file == file) {
            id.clone_into(&mut ready.id);
            return;
        }
        match self.inotify.add_watch(&file, AddWatchFlags::IN_MODIFY) {
            Ok(descriptor) => {
                watched.insert(descriptor, Watched { id: id.to_owned(), file, kills: 0 });
            }
            Err(errno) => crate::log::warn(&format!("cannot watch container {id} for OOM kills: {errno}")),
        }
    }

    /// Forgets it. The kernel says nothing of a cgroup's file that goes, and keeps the watch.
    pub(crate) fn remove(&self, id: &str) {
        let mut watched = self.watched();
        for (descriptor, _) in watched.extract_if(|_, one| one.id == id) {
            // gone with its file, on another file system
            let _ = self.inotify.rm_watch(descriptor);
        }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all hits of `id` have been told to those who ask, so that they hear why before they hear of an end.
    ///
    /// It looks itself: the kernel may tell a change of `memory.events` up to 10 ms late (CGROUP_FILE_NOTIFY_MIN_INTV,
    /// kernel/cgroup/cgroup.c), and a container that has ended by it can be removed by then, and the file with it.
    pub(crate) async fn told(&self, id: &str) {
        {
            let mut watched = self.watched();
            for one in watched.values_mut().filter(|one| one.id == id) {
                if one.hit() {
                    self.hits.push(one.id.clone());
                }
            }
        }
        if self.hits.is_asked.load(Ordering::Relaxed) {
            let _ = tokio::time::timeout(PATIENCE, self.hits.none_of(id)).await;
        }
    }

    /// The next one that is hit.
    pub(crate) async fn next(&self) -> String {
        self.hits.pop().await
    }
}

fn kills(file: &std::path::Path) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn watched(name: &str) -> (OomWatch, PathBuf) {
        let file = std::env::temp_dir().join(format!("kata-oom-{name}-{}", std::process::id()));
        std::fs::write(&file, "oom 0\noom_kill 0\n").expect("written");
        let watch = OomWatch::start().expect("started");
        watch.add("one", file.clone());
        (watch, file)
    }

    #[tokio::test]
    async fn a_kill_is_told_once_even_when_its_file_goes_at_once() {
        let (watch, file) = watched("once");
        watch.told("one").await;
        std::fs::write(&file, "oom 1\noom_kill 1\n").expect("written");
        watch.told("one").await;
        watch.told("one").await;
        watch.told("another").await;
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(watch.next().await, "one");
        // neither the notice of the change nor the file's end tells it again
        assert!(tokio::time::timeout(Duration::from_millis(100), watch.next()).await.is_err());
    }

    #[tokio::test]
    async fn who_asks_is_told_first_and_who_asks_no_more_holds_up_little() {
        let (watch, file) = watched("first");
        let order = Arc::new(Mutex::new(Vec::new()));
        let (asking, seen) = (watch.clone(), Arc::clone(&order));
        let asker = tokio::spawn(async move {
            asking.next().await;
            seen.lock().expect("whole").push("why");
        });
        tokio::task::yield_now().await;
        std::fs::write(&file, "oom_kill 1\n").expect("written");
        watch.told("one").await;
        order.lock().expect("whole").push("the end");
        asker.await.expect("told");
        assert_eq!(*order.lock().expect("whole"), ["why", "the end"]);
        std::fs::write(&file, "oom_kill 2\n").expect("written");
        watch.told("one").await;
        std::fs::remove_file(&file).expect("removed");
    }

    #[tokio::test]
    async fn what_was_watched_ahead_has_its_containers_name() {
        let (watch, file) = watched("ahead");
        watch.remove("one");
        watch.add(READY, file.clone());
        watch.add("two", file.clone());
        std::fs::write(&file, "oom_kill 1\n").expect("written");
        assert_eq!(watch.next().await, "two");
        std::fs::remove_file(&file).expect("removed");
    }

    #[tokio::test]
    async fn a_name_that_comes_again_begins_again() {
        let (watch, file) = watched("again");
        for _ in 0..3 {
            std::fs::write(&file, "oom_kill 1\n").expect("written");
            watch.told("one").await;
            let next = tokio::time::timeout(Duration::from_secs(5), watch.next()).await;
            assert_eq!(next.expect("told"), "one");
            watch.remove("one");
            std::fs::remove_file(&file).expect("removed");
            std::fs::write(&file, "oom_kill 0\n").expect("written");
            watch.add("one", file.clone());
        }
        assert_eq!(watch.watched().len(), 1);
        std::fs::remove_file(&file).expect("removed");
    }

    #[tokio::test]
    async fn of_one_container_one_hit_waits() {
        let hits = Hits::default();
        for id in ["a", "b", "a"] {
            hits.push(id.into());
        }
        assert_eq!(hits.ids().iter().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(hits.pop().await, "a");
        hits.push("a".into());
        assert_eq!(hits.ids().iter().collect::<Vec<_>>(), ["b", "a"]);
    }
}
