//! The table, the JSON, and the bars.

use crate::sample::Sample;
use serde_json::{Value, json};
use std::fmt;

/// One row of the table.
#[derive(Debug)]
struct Row {
    key: String,
    title: String,
    sample: Sample,
    unit: &'static str,
}

/// A limit that the product sets itself.
#[derive(Debug)]
struct Bar {
    name: &'static str,
    side: Side,
    limit: f64,
    value: Option<f64>,
    unit: &'static str,
}

/// On which side of its limit a value is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    AtMost,
    AtLeast,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    bars: Vec<Bar>,
}

impl Report {
    pub(crate) fn add(&mut self, key: &str, title: &str, sample: Sample, unit: &'static str) {
        // at once too: what comes after may fail
        eprintln!("    {}: {:.1} {unit}", title.trim(), sample.median());
        self.rows.push(Row { key: key.to_owned(), title: title.to_owned(), sample, unit });
    }

    fn median(&self, key: &str) -> Option<f64> {
        self.rows.iter().find(|r| r.key == key).map(|r| r.sample.median())
    }

    /// Compares what was measured with the bars.
    pub(crate) fn judge(&mut self) {
        let is_boot = |key: &str| key.starts_with("floor.") && !key.starts_with("floor.restore");
        let floor = self.rows.iter().filter(|r| is_boot(&r.key)).map(|r| r.sample.median());
        let floor = floor.fold(f64::NAN, f64::min);
        let median = |key| self.median(key).unwrap_or(f64::NAN);
        let start = floor * 1.25 + median("run.runc");
        let exec = median("exec.runc") + 60.0;
        let pod = median("pod.runc") + floor + 300.0;
        let by_hand = median("floor.restore") + 150.0 + median("warm.runc");
        let most = [
            ("start ≤ floor × 1.25 + runc's start", start, "run.kata", "ms"),
            ("exec ≤ runc's exec + 60 ms", exec, "exec.kata", "ms"),
            ("PSS of all host processes of an idle container ≤ 120 MiB", 120.0, "pss.sum", "MiB"),
            ("PSS of the shim ≤ 8 MiB", 8.0, "pss.shim", "MiB"),
            ("RSS of the agent ≤ 8 MiB", 8.0, "rss.agent", "MiB"),
            ("initrd ≤ 8 MiB", 8.0, "size.initrd", "MiB"),
            ("start of a clone ≤ 0.4 × that of a boot", median("warm.cold") * 0.4, "warm.copied", "ms"),
            ("start of a clone ≤ 1.5 × gVisor's", median("warm.runsc") * 1.5, "warm.copied", "ms"),
            ("start of a clone ≤ one restored by hand + 150 ms + runc's", by_hand, "warm.copied", "ms"),
            ("start from the pool ≤ runc's + 120 ms", median("warm.runc") + 120.0, "warm.pool", "ms"),
            ("PSS of one of 50 clones with copied memory ≤ 60 MiB", 60.0, "crowd.pss.copied", "MiB"),
            ("PSS of one of 50 clones with private memory ≤ 35 MiB", 35.0, "crowd.pss.private", "MiB"),
            ("PSS of a shim of 50 clones ≤ 6 MiB", 6.0, "crowd.pss.shim.copied", "MiB"),
            ("pod start ≤ runc's + floor + 300 ms", pod, "pod.kata", "ms"),
            ("TCP round trip ≤ 1.05 × raw QEMU's", median("net.trip.raw") * 1.05, "net.trip.kata", "µs"),
        ];
        let least = [
            ("TCP out of the pod ≥ 0.9 × raw QEMU's", median("net.out.raw") * 0.9, "net.out.kata", "MiB/s"),
            ("TCP into the pod ≥ 0.9 × raw QEMU's", median("net.in.raw") * 0.9, "net.in.kata", "MiB/s"),
            ("virtio-fs, sequential ≥ 95 % of raw QEMU's", 95.0, "store.fs.of-raw.all.seq", "%"),
            ("virtio-fs, random ≥ 95 % of raw QEMU's", 95.0, "store.fs.of-raw.all.rand", "%"),
            ("virtio-fs, small files ≥ 95 % of raw QEMU's", 95.0, "store.fs.of-raw.all.meta", "%"),
            ("disk, sequential ≥ 95 % of raw QEMU's", 95.0, "store.disk.of-raw.all.seq", "%"),
            ("disk, random ≥ 95 % of raw QEMU's", 95.0, "store.disk.of-raw.all.rand", "%"),
            ("disk, small files ≥ 95 % of raw QEMU's", 95.0, "store.disk.of-raw.all.meta", "%"),
        ];
        let most = most.map(|bar| (Side::AtMost, bar));
        let all = most.into_iter().chain(least.map(|bar| (Side::AtLeast, bar)));
        self.bars = all
            .map(|(side, (name, limit, key, unit))| Bar { name, side, limit, value: self.median(key), unit })
            .collect();
    }

    pub(crate) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|r| {
            let value = json!({
                "title": r.title.trim(), "unit": r.unit, "count": r.sample.count(),
                "median": r.sample.median(), "min": r.sample.min(), "max": r.sample.max(),
            });
            (r.key.clone(), value)
        });
        let rows: serde_json::Map<_, _> = rows.collect();
        let bars: Vec<_> = self
            .bars
            .iter()
            .map(|b| json!({"bar": b.name, "limit": b.limit, "value": b.value, "unit": b.unit, "holds": b.holds()}))
            .collect();
        json!({"rows": rows, "bars": bars})
    }
}

impl Bar {
    fn holds(&self) -> Option<bool> {
        // a part of it may not have been measured
        self.value.filter(|_| self.limit.is_finite()).map(|v| match self.side {
            Side::AtMost => v <= self.limit,
            Side::AtLeast => v >= self.limit,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.title.chars().count()).max().unwrap_or_default();
        writeln!(f, "{:<width$} {:>10} {:>10} {:>10}      n", "", "median", "min", "max")?;
        for Row { title, sample, unit, .. } in &self.rows {
            let n = sample.count();
            let (median, min, max) = (sample.median(), sample.min(), sample.max());
            if n == 1 {
                writeln!(f, "{title:<width$} {median:>10.1} {:>10} {:>10} {unit:<4} {n}", "", "")?;
            } else {
                writeln!(f, "{title:<width$} {median:>10.1} {min:>10.1} {max:>10.1} {unit:<4} {n}")?;
            }
        }
        writeln!(f)?;
        for bar in &self.bars {
            let Bar { name, limit, value, unit, .. } = bar;
            match (value, bar.holds()) {
                (Some(v), Some(true)) => writeln!(f, "PASS    {name}: {v:.1} of {limit:.1} {unit}")?,
                (Some(v), Some(false)) => {
                    let by = (v - limit).abs();
                    writeln!(f, "MISSED  {name}: {v:.1} of {limit:.1} {unit}, by {by:.1}")?;
                }
                _ => writeln!(f, "n/a     {name}: could not be measured")?,
            }
        }
        Ok(())
    }
}
