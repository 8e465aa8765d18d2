//! Lines on the console. Few: each byte of a console is an exit from the guest.

use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};

/// How much is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

// the one piece of process-wide state: set once, before anything is served
static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);

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
        // one write, so that lines of children do not mix in
        let _ = std::io::stderr().write_all(format!("agent: {name}: {text}\n").as_bytes());
    }
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
