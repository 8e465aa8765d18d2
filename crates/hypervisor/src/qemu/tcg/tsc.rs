//! The rate of the host's time stamp counter, for guests under TCG.
//!
//! TCG shows the guest the host's counter, but a guest that has to find its rate by an emulated timer finds a wrong one,
//! or none, when the host is busy: then its clock runs away, or ticks with the timer interrupt. So the guest is told.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Between two readings; a reading is good to about 100 ns, so the rate is to about 5 parts in a million.
const INTERVAL: Duration = Duration::from_millis(20);
/// Where Linux says which counters it trusts.
const TRUSTED: &str = "/sys/devices/system/clocksource/clocksource0/available_clocksource";

/// Counts a millisecond (kHz), measured once for each boot of the host and kept in `dir`; `None` where the host's own
/// kernel does not trust the counter.
pub(in crate::qemu) async fn rate(dir: &Path) -> Option<u64> {
    let file = dir.join("tsc-khz");
    if let Some(rate) = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok()) {
        return Some(rate);
    }
    if !fs::read_to_string(TRUSTED).ok()?.split_whitespace().any(|name| name == "tsc") {
        return None;
    }
    let before = reading()?;
    // the measure itself: nothing to wait for but time
    tokio::time::sleep(INTERVAL).await;
    let after = reading()?;
    let nanoseconds = after.nanoseconds.checked_sub(before.nanoseconds).filter(|passed| *passed > 0)?;
    let rate = u64::try_from(u128::from(after.count - before.count) * 1_000_000 / u128::from(nanoseconds)).ok()?;
    let draft = file.with_extension(std::process::id().to_string());
    let kept = fs::create_dir_all(dir)
        .and_then(|()| fs::write(&draft, rate.to_string()))
        .and_then(|()| fs::rename(&draft, &file));
    if let Err(error) = kept {
        tracing::debug!(%error, "keeping the counter's rate");
    }
    Some(rate)
}

struct Reading {
    count: u64,
    nanoseconds: u64,
}

/// The counter and the clock at the same moment: of some pairs the one that took least.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "reading the time stamp counter")]
fn reading() -> Option<Reading> {
    use nix::time::{ClockId, clock_gettime};
    // SAFETY: every x86-64 processor has it, and it only reads.
    let count = || unsafe { core::arch::x86_64::_rdtsc() };
    let pair = || {
        let before = count();
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_RAW).ok()?);
        let width = count().checked_sub(before)?;
        let nanoseconds = u64::try_from(now.as_nanos()).ok()?;
        Some((width, Reading { count: before + width / 2, nanoseconds }))
    };
    (0..16).filter_map(|_| pair()).min_by_key(|(width, _)| *width).map(|(_, reading)| reading)
}

#[cfg(not(target_arch = "x86_64"))]
fn reading() -> Option<Reading> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn is_measured_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let Some(first) = rate(folder.path()).await else { return };
        assert!((100_000..20_000_000).contains(&first), "{first} kHz");
        fs::write(folder.path().join("tsc-khz"), "1234567\n").expect("written");
        assert_eq!(rate(folder.path()).await, Some(1_234_567));
        let again = tempfile::tempdir().expect("a folder");
        let second = rate(again.path()).await.expect("measured");
        assert!(second.abs_diff(first) < first / 1000, "{first} and {second}");
    }
}
