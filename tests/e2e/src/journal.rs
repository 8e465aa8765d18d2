//! The lines of a process, kept as they come, so that a test can wait for one instead of asking again and again.

use std::{
    io::{BufRead as _, BufReader, Read},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A line and when it came.
type Line = (Instant, String);

/// A growing list of lines, shared between the threads that fill it and those that wait.
#[derive(Debug, Clone, Default)]
pub struct Journal {
    shared: Arc<(Mutex<Vec<Line>>, Condvar)>,
}

impl Journal {
    /// Fills the journal from `from` until its end, on a thread of its own.
    pub fn follow(&self, from: impl Read + Send + 'static) {
        let journal = self.clone();
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                journal.push(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
        });
    }

    fn push(&self, line: String) {
        let (lines, grown) = &*self.shared;
        lines.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), line));
        grown.notify_all();
    }

    /// How many lines there are, to be given to `wait_from` as the place to start.
    pub fn len(&self) -> usize {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether nothing has come yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All lines from line `from` on.
    pub fn lines_from(&self, from: usize) -> Vec<String> {
        let lines = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().skip(from).map(|(_, line)| line.clone()).collect()
    }

    /// Waits for a line at or after `from` that `wanted` accepts; returns when it came and what it says.
    pub fn wait_from(&self, from: usize, limit: Duration, wanted: impl Fn(&str) -> bool) -> Option<Line> {
        let (lines, grown) = &*self.shared;
        let end = Instant::now() + limit;
        let mut guard = lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = guard.iter().skip(from).find(|(_, line)| wanted(line)) {
                return Some(found.clone());
            }
            let left = end.checked_duration_since(Instant::now())?;
            guard = grown.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
