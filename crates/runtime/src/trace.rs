//! Where the time of a start goes: named moments since containerd's create call, written to the log when it has ended.

use std::sync::Mutex;
use std::time::Instant;

/// The moments of one start.
#[derive(Debug)]
pub struct Trace {
    from: Instant,
    steps: Mutex<Vec<(&'static str, Instant)>>,
}

impl Default for Trace {
    fn default() -> Self {
        Self { from: Instant::now(), steps: Mutex::new(Vec::new()) }
    }
}

impl Trace {
    /// This has just been reached.
    pub fn step(&self, name: &'static str) {
        if let Ok(mut steps) = self.steps.lock() {
            steps.push((name, Instant::now()));
        }
    }

    /// Writes the moments to the log, a line each; `make run` and `make bench` read them.
    pub fn log(&self) {
        let Ok(mut steps) = self.steps.lock() else { return };
        for (name, at) in steps.drain(..) {
            tracing::info!("start-trace step={name} ms={:.1}", (at - self.from).as_secs_f64() * 1000.0);
        }
    }
}
