//! What could not be done at once and is tried again, later each time and not for ever.

use std::time::Duration;

use tokio::time::Instant;

/// The first pause; each one after it is twice as long.
const FIRST: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 100 });
/// Tries again: the last one comes 25 seconds after the first.
const MOST: u32 = 8;

/// Things to be tried again.
#[derive(Debug)]
pub(super) struct Late<T>(Vec<Delayed<T>>);

#[derive(Debug)]
struct Delayed<T> {
    what: T,
    tries: u32,
    due: Instant,
}

impl<T> Default for Late<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Late<T> {
    /// After a failure that had `tries` before it; `false`: it was tried often enough.
    pub(super) fn again(&mut self, what: T, tries: u32) -> bool {
        if tries >= MOST {
            return false;
        }
        self.0.push(Delayed { what, tries: tries + 1, due: Instant::now() + FIRST * 2u32.pow(tries) });
        true
    }

    /// Waits for the first of them and hands out what is due, with how often it was tried; for ever when there is none.
    pub(super) async fn due(&mut self) -> Vec<(T, u32)> {
        let Some(first) = self.0.iter().map(|delayed| delayed.due).min() else { return std::future::pending().await };
        tokio::time::sleep_until(first).await;
        let (due, later) = std::mem::take(&mut self.0).into_iter().partition(|delayed| delayed.due <= first);
        self.0 = later;
        due.into_iter().map(|delayed: Delayed<T>| (delayed.what, delayed.tries)).collect()
    }

    /// Those that are not wanted any more.
    pub(super) fn drop_if(&mut self, is_over: impl Fn(&T) -> bool) {
        self.0.retain(|delayed| !is_over(&delayed.what));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_pause_is_longer_and_there_is_an_end() {
        let mut late = Late::default();
        assert!(late.again("slow", 3) && late.again("quick", 0));
        assert_eq!(late.due().await, [("quick", 1)]);
        assert!(late.again("over", 5));
        late.drop_if(|what| *what == "over");
        assert_eq!(late.due().await, [("slow", 4)]);
        assert!(!late.again("slow", MOST));
        tokio::time::timeout(Duration::from_millis(5), late.due()).await.expect_err("nothing is left");
    }
}
