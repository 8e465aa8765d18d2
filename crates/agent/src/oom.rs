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

/// Watches containers; tells their ids. Clones share it.
#[derive(Clone)]
pub(crate) struct OomWatch {
    inotify: Arc<Inotify>,
    watched: Arc<Mutex<HashMap<WatchDescriptor, Watched>>>,
    hits: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<String>>>,
}

impl OomWatch {
    pub(crate) fn start() -> std::io::Result<Self> {
        let inotify = Arc::new(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?);
        let (to, from) = mpsc::unbounded_channel();
        let watch = Self {
            inotify: Arc::clone(&inotify),
            watched: Arc::default(),
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
                    let kills = kills(&one.file);
                    if kills > one.kills {
                        let _ = to.send(one.id.clone());
                    }
                    one.kills = kills;
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

    /// The next one that is hit.
    pub(crate) async fn next(&self) -> Option<String> {
        self.hits.lock().await.recv().await
    }
}

fn kills(file: &std::path::Path) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or_default()
}
