//! Lines on the console. Few: each byte of a console is an exit from the guest.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::broadcast;

/// How much is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

// with the followers the only process-wide state: set once, before anything is served
static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);

// for the log port; a follower that is slower than this many lines loses the oldest
static FOLLOWERS: OnceLock<broadcast::Sender<String>> = OnceLock::new();
const BACKLOG: usize = 256;

/// Every line from now on.
pub(crate) fn follow() -> broadcast::Receiver<String> {
    FOLLOWERS.get_or_init(|| broadcast::Sender::new(BACKLOG)).subscribe()
}

pub(crate) fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

fn write(level: Level, text: &str) {
    if level as u8 <= LEVEL.load(Ordering::Relaxed) {
        let name = match level {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug => "debug",
        };
        let line = format!("agent: {name}: {text}\n");
        // one write, so that lines of children do not mix in
        let _ = std::io::stderr().write_all(line.as_bytes());
        if level == Level::Debug {
            to_kernel(&line);
        }
        if let Some(followers) = FOLLOWERS.get() {
            // nobody there is no error
            let _ = followers.send(line);
        }
    }
}

/// Among the kernel's lines, with its time: `make bench` joins the guest's time to the host's by those that are on the
/// console too. 7 is KERN_DEBUG, which the kernel itself does not write there.
fn to_kernel(line: &str) {
    let _ = File::options()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(format!("<7>{line}").as_bytes()));
}

pub(crate) fn error(text: &str) {
    write(Level::Error, text);
}

pub(crate) fn warn(text: &str) {
    write(Level::Warn, text);
}

pub(crate) fn debug(text: &str) {
    write(Level::Debug, text);
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn followers_get_lines() {
        let mut lines = super::follow();
        super::error("something broke");
        assert_eq!(lines.recv().await.as_deref(), Ok("agent: error: something broke\n"));
    }
}
