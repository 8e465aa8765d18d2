//! Who was hit by the kernel's out-of-memory killer: inotify on each container's `memory.events`.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::mpsc;

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
    tell: mpsc::UnboundedSender<String>,
    hits: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<String>>>,
}

impl OomWatch {
    pub(crate) fn start() -> std::io::Result<Self> {
        let inotify = Arc::new(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?);
        let (to, from) = mpsc::unbounded_channel();
        let watch = Self {
            inotify: Arc::clone(&inotify),
            watched: Arc::default(),
            tell: to.clone(),
            hits: Arc::new(tokio::sync::Mutex::new(from)),
        };
        let watched = Arc::clone(&watch.watched);
        let ready = crate::io::watch(inotify.as_fd().try_clone_to_owned()?)?;
        tokio::spawn(async move {
            while let Ok(mut guard) = ready.readable().await {
                guard.clear_ready();
                for event in inotify.read_events().unwrap_or_default() {
                    let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
                    let Some(one) = watched.get_mut(&event.wd) else { continue };
                    if one.hit() {
                        let _ = to.send(one.id.clone());
                    }
                    if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                        watched.remove(&event.wd);
                    }
                }
            }
        });
        Ok(watch)
    }

    /// From now on; it ends with the cgroup.
    pub(crate) fn add(&self, id: &str, file: PathBuf) {
        match self.inotify.add_watch(&file, AddWatchFlags::IN_MODIFY) {
            Ok(descriptor) => {
                let one = Watched { id: id.to_owned(), file, kills: 0 };
                self.watched.lock().unwrap_or_else(PoisonError::into_inner).insert(descriptor, one);
            }
            Err(errno) => crate::log::warn(&format!("watching the memory of {id}: {errno}")),
        }
    }

    /// Looks whether `id` was hit. The kernel may tell a change of `memory.events` up to 10 ms late
    /// (CGROUP_FILE_NOTIFY_MIN_INTV, kernel/cgroup/cgroup.c): a container that has ended by it can be removed by then,
    /// and the file with it.
    pub(crate) fn look(&self, id: &str) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        for one in watched.values_mut().filter(|one| one.id == id) {
            if one.hit() {
                let _ = self.tell.send(one.id.clone());
            }
        }
    }

    /// The next one that is hit.
    pub(crate) async fn next(&self) -> Option<String> {
        self.hits.lock().await.recv().await
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

    #[tokio::test]
    async fn a_kill_is_told_once_even_when_its_file_goes_at_once() {
        let file = std::env::temp_dir().join(format!("kata-oom-{}", std::process::id()));
        std::fs::write(&file, "oom 0\noom_kill 0\n").expect("written");
        let watch = OomWatch::start().expect("started");
        watch.add("one", file.clone());
        watch.look("one");
        std::fs::write(&file, "oom 1\noom_kill 1\n").expect("written");
        watch.look("one");
        watch.look("one");
        watch.look("another");
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(watch.next().await.as_deref(), Some("one"));
        // neither the notice of the change nor the file's end tells it again
        assert!(tokio::time::timeout(Duration::from_millis(100), watch.next()).await.is_err());
    }
}
