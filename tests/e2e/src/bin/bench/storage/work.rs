//! What is done on each file system, and how what is said of it is read.

use super::{Values, shell::Shell};
use anyhow::{Context as _, Result, ensure};
use std::{fmt::Write as _, time::Instant};

/// What is said of one kind of work.
pub(super) struct Figure {
    pub(super) key: &'static str,
    pub(super) title: &'static str,
    pub(super) unit: Unit,
    pub(super) group: Group,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// MiB a second.
    Speed,
    /// Milliseconds.
    Time,
}

impl Unit {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Speed => "MiB/s",
            Self::Time => "ms",
        }
    }
}

/// Figures for which there is one bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    Sequential,
    Random,
    Metadata,
}

impl Group {
    /// In keys and in titles.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Sequential => ("seq", "sequential"),
            Self::Random => ("rand", "random"),
            Self::Metadata => ("meta", "small files"),
        }
    }
}

const fn fio(key: &'static str, title: &'static str, group: Group) -> Figure {
    Figure { key, title, unit: Unit::Speed, group }
}

const fn tree(key: &'static str, title: &'static str) -> Figure {
    Figure { key, title, unit: Unit::Time, group: Group::Metadata }
}

/// In the order of the work; the keys of fio's are those of its jobs.
pub(super) const FIGURES: [Figure; 11] = [
    fio("read-4k", "read 4k", Group::Sequential),
    fio("read-1m", "read 1M", Group::Sequential),
    fio("write-4k", "write 4k", Group::Sequential),
    fio("write-1m", "write 1M", Group::Sequential),
    fio("randread-4k", "random read 4k", Group::Random),
    fio("randread-1m", "random read 1M", Group::Random),
    fio("randwrite-4k", "random write 4k", Group::Random),
    fio("randwrite-1m", "random write 1M", Group::Random),
    tree("unpack", "tar x of 300 files"),
    tree("find", "find, with stat, of them"),
    tree("remove", "rm -r of them"),
];

/// How many of them fio does.
const JOBS: usize = 8;

/// fio's: what is sequential goes as most programs do it, through the guest's page cache, and what is written so is
/// synced before it counts; what is random goes past that cache, as databases do it.
pub(super) fn jobs() -> String {
    let mut text = String::from(
        "[global]\ndirectory=/data\nfilename=fio\nsize=32m\nioengine=psync\nthread=1\ngtod_reduce=1\n\
         clocksource=clock_gettime\ntime_based=1\nramp_time=150ms\nruntime=250ms\nstonewall\n",
    );
    for figure in &FIGURES[..JOBS] {
        let (kind, size) = figure.key.split_once('-').unwrap_or_default();
        let how = match figure.group {
            Group::Random => "direct=1",
            _ => "end_fsync=1",
        };
        // it cannot fail
        let _ = write!(text, "[{}]\nrw={kind}\nbs={size}\n{how}\n", figure.key);
    }
    text
}

/// How far a guest's clock may be from ours, since its own clock measures.
const CLOCK: f64 = 0.02;

/// Folders of the tree, and files in each.
pub(super) const TREE: (usize, usize) = (15, 20);

/// Does all of it in `/data`, with the programs in `/tools`. They come by different ways, which is not to be measured: so
/// the small ones go to `/ram`, and the large one is read before.
pub(super) fn measure(shell: &mut Shell) -> Result<Values> {
    let mut values = [f64::NAN; FIGURES.len()];
    shell.ask(
        "cd /ram && cp /tools/clock . && for i in tar find rm; do cp /bin/busybox $i; done; cat /tools/* > /dev/null",
    )?;
    let begin = (clock(shell)?, Instant::now());
    let said = shell
        .ask("/tools/ld.so --library-path /tools /tools/fio --output-format=terse --terse-version=3 /tools/jobs")?;
    for (value, figure) in values.iter_mut().zip(&FIGURES[..JOBS]) {
        *value = speed(&said, figure.key).with_context(|| format!("fio's {}: {said:#?}", figure.key))?;
    }
    let script = "mkdir /data/tree && cd /data/tree && /ram/clock && /ram/tar xf /data/tree.tar && /ram/clock && \
                  /ram/find . -size +1000 && /ram/clock && cd / && /ram/rm -r /data/tree && /ram/clock";
    let times: Vec<u64> = shell.ask(script)?.iter().filter_map(|line| line.parse().ok()).collect();
    ensure!(times.len() == 4, "of the tree: {times:?}");
    for (value, pair) in values[JOBS..].iter_mut().zip(times.windows(2)) {
        *value = (pair[1] - pair[0]) as f64 / 1e6;
    }
    let (theirs, ours) = (clock(shell)? - begin.0, begin.1.elapsed().as_secs_f64() * 1e9);
    let off = theirs as f64 / ours - 1.0;
    ensure!(off.abs() < CLOCK, "its clock, which measures, is off by {:.1} %", off * 100.0);
    Ok(values)
}

/// Prints the time in nanoseconds, which busybox cannot.
pub(super) const CLOCK_PROGRAM: &str = r#"
#include <stdio.h>
#include <time.h>
int main(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("%lld\n", now.tv_sec * 1000000000LL + now.tv_nsec);
}
"#;

fn clock(shell: &mut Shell) -> Result<u64> {
    let said = shell.ask("/ram/clock")?;
    said.iter().find_map(|line| line.parse().ok()).with_context(|| format!("no time: {said:?}"))
}

/// MiB a second of a job, of fio's lines for programs: the bandwidths of reading and writing are its fields 7 and 48.
fn speed(said: &[String], job: &str) -> Option<f64> {
    let line = said.iter().map(|line| line.split(';').collect::<Vec<_>>()).find(|line| line.get(2) == Some(&job))?;
    let kib = |field: usize| line.get(field).and_then(|text| text.parse::<f64>().ok());
    let (read, written) = (kib(6)?, kib(47)?);
    // an error is a job with nothing done
    Some((read + written) / 1024.0).filter(|speed| line.get(4) == Some(&"0") && *speed > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_is_read() {
        let line = |job: &str, error: &str, read: u32, written: u32| {
            let mut fields = vec!["0".to_owned(); 130];
            for (at, text) in [(2, job), (4, error)] {
                fields[at] = text.into();
            }
            (fields[6], fields[47]) = (read.to_string(), written.to_string());
            fields.join(";")
        };
        let said = ["fio: noise".to_owned(), line("a", "0", 2048, 0), line("b", "0", 0, 512), line("c", "5", 1, 0)];
        assert_eq!(["a", "b", "c", "d"].map(|job| speed(&said, job)), [Some(2.0), Some(0.5), None, None]);
    }

    #[test]
    fn each_figure_of_fio_has_its_job() {
        let jobs = jobs();
        assert!(jobs.contains("[randwrite-4k]\nrw=randwrite\nbs=4k\ndirect=1\n"), "{jobs}");
        assert_eq!(jobs.matches("\nrw=").count(), JOBS);
    }
}
