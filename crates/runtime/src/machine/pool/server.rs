//! Keeps the pool full, and passes those who ask on to the keepers.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::wire::{Listener, Wire};
use super::{ANSWER, Answer, Ask, Info, NAME, Order, ROOT, Report, folder, key, mount_namespace, no_hand_over, reach};
use crate::machine::Env;
use crate::{Error, cleanup};

/// A new VM is not begun while pods start, which have better use for the processor: after the last one was handed out it is
/// quiet for so long…
const QUIET: Duration = Duration::from_secs(1);
/// …or one is missing for so long.
const MISSING: Duration = Duration::from_secs(5);
/// The longest pause after one could not be made.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Something happened.
enum Event {
    Asked(Wire, Ask),
    Reported(u32, Report),
    /// With its VM and all that it has made.
    Gone(u32),
}

/// A keeper that has no pod.
struct Keeper {
    wire: Arc<Wire>,
    /// The VMM's process, and whether it is a clone; `None` while it is being made.
    ready: Option<(u32, bool)>,
    since: Instant,
}

struct Server<'a> {
    number: usize,
    config: &'a Path,
    key: String,
    keepers: BTreeMap<u32, Keeper>,
    events: mpsc::UnboundedSender<Event>,
    /// When the next one may be begun.
    next: Instant,
    /// Since when one is missing.
    missing: Instant,
    /// So many could not be made, one after another.
    failures: u32,
    say: &'a mut dyn FnMut(String),
}

/// Serves until `stop`, or until it is asked to end. `say` tells people what happens.
///
/// # Errors
/// The endpoint cannot be had, or is served.
pub async fn serve(env: &Env, stop: impl Future<Output = ()>, say: &mut dyn FnMut(String)) -> Result<(), Error> {
    if !env.hypervisor.capabilities().hand_over {
        return Err(no_hand_over(env));
    }
    let factory = &env.config.factory;
    let (endpoint, number) = (factory.vm_cache_endpoint.clone(), factory.vm_cache_number as usize);
    let key = key(env, None).await?;
    let listener = listen(&endpoint)?;
    sweep();
    say(format!("a pool of {number} at {}", endpoint.display()));
    let (events, mut happens) = mpsc::unbounded_channel();
    let now = Instant::now();
    let config = env.config.source.as_path();
    let mut server =
        Server { number, config, key, keepers: BTreeMap::new(), events, next: now, missing: now, failures: 0, say };
    tokio::pin!(stop);
    let asked = loop {
        let refill = server.refill();
        let pause = async {
            match refill {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = &mut stop => break None,
            wire = listener.accept() => match wire {
                Ok(wire) => server.hear(wire),
                Err(error) => {
                    (server.say)(format!("a connection to the pool failed: {error}"));
                    // for want of a descriptor it fails again at once, and nothing tells when one is free
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(event) = happens.recv() => match event {
                Event::Asked(wire, Ask::End) => break Some(wire),
                event => server.handle(event).await,
            },
            () = pause => server.begin(),
        }
    };
    drop(listener);
    let _ = fs::remove_file(&endpoint);
    server.end(&mut happens).await;
    // closed, which tells the one who asked
    drop(asked);
    Ok(())
}

fn listen(endpoint: &Path) -> Result<Listener, Error> {
    let failed = || Error::host(format!("vm_cache_endpoint {}", endpoint.display()));
    if reach(endpoint)?.is_some() {
        return Err(Error::Exists(format!("a pool at {}", endpoint.display())));
    }
    if let Some(folder) = endpoint.parent() {
        fs::create_dir_all(folder).map_err(failed())?;
    }
    match fs::remove_file(endpoint) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed()(error)),
        _ => {}
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(ROOT).map_err(Error::host(ROOT))?;
    Listener::bind(endpoint).map_err(failed())
}

/// Cleans what dead keepers of dead servers left.
pub(super) fn sweep() {
    for entry in fs::read_dir(ROOT).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(NAME) {
            // those of the living are in use
            let _ = cleanup::clean(&entry.path());
        }
    }
}

impl Server<'_> {
    /// When the next one is to be begun; `None` while there is nothing to do.
    fn refill(&self) -> Option<Instant> {
        let is_busy = self.keepers.values().any(|keeper| keeper.ready.is_none());
        if is_busy || self.keepers.len() >= self.number {
            return None;
        }
        let latest = if self.failures == 0 { self.missing + MISSING } else { self.next };
        Some(self.next.min(latest))
    }

    /// Waits for the question of somebody who has connected.
    fn hear(&self, wire: Wire) {
        let events = self.events.clone();
        tokio::spawn(async move {
            if let Ok(Ok(Some((ask, _)))) = tokio::time::timeout(ANSWER, wire.receive()).await {
                let _ = events.send(Event::Asked(wire, ask));
            }
        });
    }

    fn begin(&mut self) {
        let now = Instant::now();
        match self.spawn() {
            Ok((id, wire)) => drop(self.keepers.insert(id, Keeper { wire, ready: None, since: now })),
            Err(error) => self.failed(&format!("starting its keeper process: {error}")),
        }
    }

    fn spawn(&self) -> io::Result<(u32, Arc<Wire>)> {
        let (ours, theirs) = Wire::pair()?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--config")
            .arg(self.config)
            .args(["factory", "keep", &self.key])
            .stdin(theirs)
            // it may live longer than whoever reads ours
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // a signal to our group is not for it
            .process_group(0)
            .spawn()?;
        let id = child.id().unwrap_or_default();
        let folder = folder(id);
        let wire = Arc::new(ours);
        let (events, reports) = (self.events.clone(), Arc::clone(&wire));
        tokio::spawn(async move {
            while let Ok(Some((report, _))) = reports.receive().await {
                let _ = events.send(Event::Reported(id, report));
            }
            // one that is handed out has this connection closed, or waits with it for the pod's end
            drop(reports);
            let _ = child.wait().await;
            // in peace it has left nothing; a shim that ended it is about to clean, or we are
            let _ = tokio::task::spawn_blocking(move || cleanup::clean(&folder)).await;
            let _ = events.send(Event::Gone(id));
        });
        Ok((id, wire))
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Asked(wire, Ask::Take { key, mounts }) => self.give(wire, &key, mounts).await,
            Event::Asked(wire, Ask::List) => {
                let _ = wire.send(&Answer::List(self.list()), &[]).await;
            }
            // the loop has seen to it
            Event::Asked(_, Ask::End) => {}
            Event::Reported(id, Report::Ready { vmm, is_clone }) => {
                if let Some(keeper) = self.keepers.get_mut(&id) {
                    (keeper.ready, keeper.since) = (Some((vmm, is_clone)), Instant::now());
                    let how = if is_clone { "a clone" } else { "booted" };
                    (self.failures, self.next) = (0, Instant::now());
                    (self.say)(format!("ready: {vmm}, {how}"));
                }
            }
            Event::Reported(id, Report::Failed(why)) => {
                if self.keepers.remove(&id).is_some() {
                    self.failed(&why);
                }
            }
            Event::Gone(id) => {
                if self.keepers.remove(&id).is_some() {
                    self.failed("its keeper process has exited");
                }
            }
        }
    }

    fn failed(&mut self, why: &str) {
        self.failures += 1;
        let pause = Duration::from_secs(1 << self.failures.min(6)).min(LONGEST_PAUSE);
        self.next = Instant::now() + pause;
        (self.say)(format!("cannot make a VM of the pool: {why}; retrying in {} s", pause.as_secs()));
    }

    fn list(&self) -> Vec<Info> {
        let info = |(id, keeper): (&u32, &Keeper)| Info {
            keeper: *id,
            vmm: keeper.ready.map(|(vmm, _)| vmm),
            is_clone: keeper.ready.is_some_and(|(_, is_clone)| is_clone),
            age: keeper.since.elapsed().as_secs(),
        };
        self.keepers.iter().map(info).collect()
    }

    /// Passes the one who asked on to the keeper that has waited longest.
    async fn give(&mut self, wire: Wire, key: &str, mounts: u64) {
        let refused = if mount_namespace().ok() != Some(mounts) {
            Some("the pool's server runs in another mount namespace than this pod's shim")
        } else if key != self.key {
            Some("the pod needs a VM of another kind or size")
        } else {
            None
        };
        if let Some(why) = refused {
            let _ = wire.send(&Answer::None(why.into()), &[]).await;
            return;
        }
        let was_full = self.keepers.len() >= self.number;
        loop {
            let ready = self.keepers.iter().filter(|(_, keeper)| keeper.ready.is_some());
            let Some(id) = ready.min_by_key(|(_, keeper)| keeper.since).map(|(id, _)| *id) else {
                let _ = wire.send(&Answer::None("no VM is ready".into()), &[]).await;
                return;
            };
            let Some(keeper) = self.keepers.remove(&id) else { return };
            // one that has just died is passed over
            if keeper.wire.send(&Order::Serve, &[wire.as_fd()]).await.is_ok() {
                break;
            }
        }
        let now = Instant::now();
        self.next = now + QUIET;
        if was_full {
            self.missing = now;
        }
    }

    /// Ends the keepers that wait: they see the end of their connection.
    async fn end(&mut self, happens: &mut mpsc::UnboundedReceiver<Event>) {
        let mut left: Vec<u32> = self.keepers.keys().copied().collect();
        for keeper in std::mem::take(&mut self.keepers).into_values() {
            let _ = shutdown(keeper.wire.as_fd().as_raw_fd(), Shutdown::Both);
        }
        let gone = async {
            while !left.is_empty() {
                match happens.recv().await {
                    Some(Event::Gone(id)) => left.retain(|one| *one != id),
                    Some(_) => {}
                    None => break,
                }
            }
        };
        let limit = ANSWER * 2;
        if tokio::time::timeout(limit, gone).await.is_err() {
            (self.say)(format!("keeper processes did not exit: {left:?}"));
        }
    }
}
