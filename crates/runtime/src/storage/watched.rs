//! Small volumes that kubelet swaps as a whole (configMap, secret, projected, downward API), as copies in the guest.
//!
//! What changes on the host changes through virtio-fs too, but nobody in the guest is told: inotify(7) there knows only
//! what the guest's own kernel does. So the shim waits for the host's swap and sends the volume, and the agent does the
//! same swap where containers can watch it.
#![allow(unsafe_code, reason = "tokio's promise about a descriptor")]

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use agent_api::agent::WatchedVolume;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::late::Late;
use super::snapshot::{self, Limit};
use super::source::{GuestWritable, Source};
use crate::Error;
use crate::agent_client::AgentClient;

/// How long a volume that has changed may take to be read.
const READING: Duration = Duration::from_secs(10);

/// The copies of one pod, and who keeps them up to date. With it that ends.
#[derive(Debug, Default)]
pub(crate) struct Watcher {
    state: Arc<Mutex<State>>,
    following: OnceLock<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    /// One for all: a user has few of them (`fs.inotify.max_user_instances`).
    inotify: Option<Arc<Inotify>>,
    volumes: HashMap<WatchDescriptor, Volume>,
    /// Counts what is read, so that the guest knows which one is newer.
    revision: u64,
}

#[derive(Debug, Clone)]
struct Volume {
    name: String,
    path: PathBuf,
    /// Which folder it is: another one at that path is none of kubelet's.
    identity: (u64, u64),
    /// Where the run folders of all sandboxes are.
    sandboxes: PathBuf,
}

impl Volume {
    /// The folder, opened anew: one that is held would be in use when kubelet takes it away.
    fn open(&self) -> io::Result<OwnedFd> {
        let source = Source::open(&self.path, &GuestWritable::of(&self.sandboxes)?)?;
        if source.device_and_inode() != self.identity {
            return Err(io::Error::new(io::ErrorKind::NotFound, "another folder is there now"));
        }
        snapshot::open(&source)
    }
}

impl Watcher {
    /// Begins to watch a volume and reads it, when it has no more than `room` bytes. `None`: it is no volume for that, or
    /// cannot be watched. May block.
    pub(crate) fn add(
        &self,
        path: &Path,
        source: &Source,
        sandboxes: &Path,
        name: &str,
        room: usize,
    ) -> Option<WatchedVolume> {
        let is_known = lock(&self.state).volumes.values().any(|volume| volume.name == name);
        let identity = source.device_and_inode();
        let volume = Volume { name: name.into(), path: path.into(), identity, sandboxes: sandboxes.into() };
        // watched first, so that no change is missed
        if let Err(errno) = watch(&self.state, source, volume.clone()) {
            tracing::warn!(path = %path.display(), %errno, "changes of the volume come without inotify in the guest");
            return None;
        }
        let limit = if is_known { snapshot::GROWN } else { snapshot::SMALL };
        let read = snapshot::open(source).and_then(|folder| read(&self.state, &volume, &folder, limit));
        let volume = read.unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "reading the volume");
            None
        });
        let fitting = volume.filter(|volume| size(volume) <= room);
        if fitting.is_none() && !is_known {
            lock(&self.state).forget(name);
        }
        fitting
    }

    /// Tells the guest from now on. Once is enough.
    pub(crate) fn follow(&self, agent: &AgentClient) {
        let inotify = lock(&self.state).inotify.clone();
        let Some(inotify) = inotify else { return };
        let (state, agent) = (Arc::clone(&self.state), agent.clone());
        let tell = move |volume| {
            let agent = agent.clone();
            async move { refresh(&agent, &volume).await }
        };
        self.following.get_or_init(|| tokio::spawn(follow(inotify, state, tell)));
    }

    /// Tells the guest nothing more.
    pub(super) fn end(&self) {
        if let Some(task) = self.following.get() {
            task.abort();
        }
    }
}

/// Never held while a volume is looked at, which may be on a file system that does not answer.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of its files.
pub(crate) fn size(volume: &WatchedVolume) -> usize {
    volume.files.iter().map(|file| file.content.len()).sum()
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.end();
    }
}

/// What happens before the volume is known is in what is read of it after that.
fn watch(state: &Mutex<State>, source: &Source, volume: Volume) -> nix::Result<()> {
    let inotify = lock(state).inotify()?;
    // a swap is a rename; what else kubelet does in the folder is for the swap, or after it
    let what = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE;
    // the very folder that was opened, whatever is at its path by now
    let opened = format!("/proc/self/fd/{}", source.as_fd().as_raw_fd());
    let watch = inotify.add_watch(opened.as_str(), what | AddWatchFlags::IN_ONLYDIR)?;
    lock(state).volumes.insert(watch, volume);
    Ok(())
}

/// The number is given before the reading: of two readings the one with the higher number began later. A change that the
/// later one may have missed is told by inotify, and read with a higher number still.
fn read(state: &Mutex<State>, volume: &Volume, folder: &OwnedFd, limit: Limit) -> io::Result<Option<WatchedVolume>> {
    let revision = lock(state).next_revision();
    let Some(files) = snapshot::read(folder, limit)? else { return Ok(None) };
    Ok(Some(WatchedVolume { name: volume.name.clone(), revision, files, ..Default::default() }))
}

impl State {
    fn inotify(&mut self) -> nix::Result<Arc<Inotify>> {
        if let Some(inotify) = &self.inotify {
            return Ok(Arc::clone(inotify));
        }
        let fresh = Arc::new(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?);
        self.inotify = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    fn forget(&mut self, name: &str) {
        let State { inotify, volumes, .. } = self;
        volumes.retain(|watch, volume| {
            if volume.name != name {
                return true;
            }
            if let Some(inotify) = inotify {
                let _ = inotify.rm_watch(*watch);
            }
            false
        });
    }
}

async fn follow<T, F>(inotify: Arc<Inotify>, state: Arc<Mutex<State>>, tell: T)
where
    T: Fn(WatchedVolume) -> F,
    F: Future<Output = Result<(), Error>>,
{
    let ready = inotify.as_fd().try_clone_to_owned().and_then(|fd| {
        // SAFETY: the descriptor is owned by what is made of it, and stays open as long.
        unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
    });
    let ready = match ready {
        Ok(ready) => ready,
        Err(error) => return tracing::warn!(%error, "changes of volumes do not reach the guest's inotify"),
    };
    let mut late = Late::<Volume>::default();
    loop {
        let changed = tokio::select! {
            guard = ready.readable() => {
                let Ok(mut guard) = guard else { return };
                let changed = changes(&inotify, &state);
                guard.clear_ready();
                // what is read now is newer than what was late
                late.drop_if(|volume| changed.iter().any(|other| other.name == volume.name));
                changed.into_iter().map(|volume| (volume, 0)).collect()
            }
            due = late.due() => due,
        };
        for (volume, tries) in changed {
            match bring(&volume, &state, &tell).await {
                Ok(()) => {}
                Err(Error::VmGone { .. }) => return,
                Err(error) if late.again(volume.clone(), tries) => {
                    tracing::debug!(path = %volume.path.display(), %error, tries, "a volume is brought up to date later");
                }
                Err(error) => tracing::warn!(
                    path = %volume.path.display(),
                    %error,
                    "the volume stays as it was in the guest until it changes again"
                ),
            }
        }
    }
}

/// Reads what is in a volume now and tells the guest.
async fn bring<T, F>(volume: &Volume, state: &Arc<Mutex<State>>, tell: &T) -> Result<(), Error>
where
    T: Fn(WatchedVolume) -> F,
    F: Future<Output = Result<(), Error>>,
{
    let reading = tokio::task::spawn_blocking({
        let (volume, state) = (volume.clone(), Arc::clone(state));
        move || volume.open().and_then(|folder| read(&state, &volume, &folder, snapshot::GROWN))
    });
    let Ok(read) = tokio::time::timeout(READING, reading).await else {
        // not tried again, since each try may leave a thread that hangs
        tracing::warn!(
            path = %volume.path.display(),
            "the volume's file system does not answer: it stays as it was in the guest until it changes again"
        );
        return Ok(());
    };
    match read.unwrap_or_else(|lost| Err(io::Error::other(lost))) {
        Ok(Some(fresh)) => return tell(fresh).await,
        Ok(None) => tracing::warn!(
            path = %volume.path.display(),
            "the volume is too large for a copy now: the containers keep what they had"
        ),
        // kubelet takes a volume away at the pod's end
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tracing::debug!(path = %volume.path.display(), %error, "reading the volume");
        }
        Err(error) => return Err(Error::host(format!("volume {}", volume.path.display()))(error)),
    }
    Ok(())
}

/// Whose events have come, each once.
fn changes(inotify: &Inotify, state: &Mutex<State>) -> Vec<Volume> {
    let mut changed: Vec<Volume> = Vec::new();
    loop {
        let events = match inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EINTR) => continue,
            // no more of them
            Err(_) => return changed,
        };
        let mut state = lock(state);
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                state.volumes.remove(&event.wd);
            } else if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                changed = state.volumes.values().cloned().collect();
            } else if let Some(volume) = state.volumes.get(&event.wd)
                && changed.iter().all(|other| other.name != volume.name)
            {
                changed.push(volume.clone());
            }
        }
    }
}

async fn refresh(agent: &AgentClient, volume: &WatchedVolume) -> Result<(), Error> {
    agent
        .call("refreshing a volume", |client, context| async { client.refresh_volume(context, volume).await })
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::mpsc;

    use super::*;

    fn swap(volume: &Path, time: &str, content: &str) {
        fs::create_dir(volume.join(time)).expect("made");
        fs::write(volume.join(time).join("key"), content).expect("written");
        symlink(time, volume.join("..data_tmp")).expect("linked");
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("swapped");
    }

    #[test]
    fn a_swap_is_noticed_once_and_read_with_a_higher_number() {
        let folder = tempfile::tempdir().expect("a folder");
        let watcher = Watcher::default();
        let source = Source::open(folder.path(), &GuestWritable::default()).expect("opened");
        let add = |room| watcher.add(folder.path(), &source, Path::new("/none"), "v", room);
        assert!(add(100).is_none(), "nobody swaps it");
        swap(folder.path(), "..1", "old");
        assert!(add(2).is_none(), "no room");
        let first = add(100).expect("a volume");
        assert_eq!(size(&first), 3 + "..1".len());
        swap(folder.path(), "..2", "new");
        let inotify = watcher.state.lock().expect("whole").inotify.clone().expect("watched");
        let changed = changes(&inotify, &watcher.state);
        assert_eq!(changed.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>(), ["v"]);
        assert!(changes(&inotify, &watcher.state).is_empty());
        let again = add(100).expect("a volume");
        assert!(again.revision > first.revision);
        assert!(again.files.iter().any(|file| file.content == b"new"));
    }

    /// A watched volume in `folder` and who follows it, telling a guest that refuses as often as `refusals` says. Returns
    /// what reaches that guest, whether it refuses it or not.
    fn followed(
        folder: &Path,
        watcher: &Watcher,
        refusals: usize,
    ) -> (JoinHandle<()>, mpsc::UnboundedReceiver<Vec<u8>>) {
        swap(folder, "..1", "first");
        let source = Source::open(folder, &GuestWritable::default()).expect("opened");
        watcher.add(folder, &source, Path::new("/none"), "v", 100).expect("a volume");
        let inotify = watcher.state.lock().expect("whole").inotify.clone().expect("watched");
        let (to, from) = mpsc::unbounded_channel();
        let told = AtomicUsize::new(0);
        let tell = move |volume: WatchedVolume| {
            let content = volume.files.into_iter().find(|file| file.path.ends_with("/key")).expect("a key").content;
            to.send(content).expect("heard");
            let refused = told.fetch_add(1, Ordering::Relaxed) < refusals;
            let answer = if refused { Err(Error::WrongState("busy".into())) } else { Ok(()) };
            std::future::ready(answer)
        };
        (tokio::spawn(follow(inotify, Arc::clone(&watcher.state), tell)), from)
    }

    #[tokio::test]
    async fn a_guest_that_is_busy_is_told_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let watcher = Watcher::default();
        let (task, mut told) = followed(folder.path(), &watcher, 3);
        swap(folder.path(), "..2", "second");
        for _ in 0..3 {
            assert_eq!(told.recv().await.expect("told"), b"second");
        }
        // the last of them was taken, unless something is new
        assert_eq!(told.recv().await.expect("told"), b"second");
        let silence = Duration::from_millis(50);
        tokio::time::timeout(silence, told.recv()).await.expect_err("it was taken");
        swap(folder.path(), "..3", "third");
        assert_eq!(told.recv().await.expect("told"), b"third");
        task.abort();
    }

    #[tokio::test]
    async fn what_is_told_again_is_the_newest_and_not_for_ever() {
        let folder = tempfile::tempdir().expect("a folder");
        let watcher = Watcher::default();
        let (task, mut told) = followed(folder.path(), &watcher, usize::MAX);
        swap(folder.path(), "..2", "second");
        assert_eq!(told.recv().await.expect("told"), b"second");
        swap(folder.path(), "..3", "third");
        let mut all = Vec::new();
        // as often as is expected, however slow the machine: a pause is no end
        while all.iter().filter(|content| *content == b"third").count() < 9 {
            all.push(told.recv().await.expect("told"));
        }
        let silence = Duration::from_millis(500);
        tokio::time::timeout(silence, told.recv()).await.expect_err("once, and eight times again");
        // the second may have been tried again before the third was seen
        let third = all.iter().position(|content| content == b"third").expect("told");
        assert!(all.iter().skip(third).all(|content| content == b"third"), "{all:?}");
        swap(folder.path(), "..4", "fourth");
        assert_eq!(told.recv().await.expect("told"), b"fourth");
        task.abort();
    }

    #[test]
    fn another_folder_at_its_path_is_not_read() {
        let root = tempfile::tempdir().expect("a folder");
        let (volume, secret) = (root.path().join("v"), root.path().join("secret"));
        for (folder, content) in [(&volume, "own"), (&secret, "another's")] {
            fs::create_dir(folder).expect("made");
            swap(folder, "..1", content);
        }
        let source = Source::open(&volume, &GuestWritable::default()).expect("opened");
        let watcher = Watcher::default();
        watcher.add(&volume, &source, Path::new("/none"), "v", 100).expect("a volume");
        let known = watcher.state.lock().expect("whole").volumes.values().next().expect("watched").clone();
        known.open().expect("still it");
        fs::rename(&volume, root.path().join("moved")).expect("moved");
        symlink(&secret, &volume).expect("linked");
        assert_eq!(known.open().expect_err("not kubelet's").kind(), io::ErrorKind::NotFound);
    }
}
