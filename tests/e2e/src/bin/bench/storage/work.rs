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

/// Figures for which there is one bar; for what is done for the first time there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    Sequential,
    Random,
    Metadata,
    First,
}

impl Group {
    /// In keys and in titles.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Sequential => ("seq", "sequential"),
            Self::Random => ("rand", "random"),
            Self::Metadata => ("meta", "small files"),
            Self::First => ("first", "for the first time"),
        }
    }
}

const fn fio(key: &'static str, title: &'static str, group: Group) -> Figure {
    Figure { key, title, unit: Unit::Speed, group }
}

const fn tree(key: &'static str, title: &'static str, group: Group) -> Figure {
    Figure { key, title, unit: Unit::Time, group }
}

/// In the order of the work; the keys of fio's are those of its jobs.
pub(super) const FIGURES: [Figure; 14] = [
    fio("read-4k", "read 4k", Group::Sequential),
    fio("read-1m", "read 1M", Group::Sequential),
    fio("write-4k", "write 4k", Group::Sequential),
    fio("write-1m", "write 1M", Group::Sequential),
    fio("randread-4k", "random read 4k", Group::Random),
    fio("randread-1m", "random read 1M", Group::Random),
    fio("randwrite-4k", "random write 4k", Group::Random),
    fio("randwrite-1m", "random write 1M", Group::Random),
    tree("unpack-first", "tar x of 300 files, for the first time", Group::First),
    tree("find-first", "find, with stat, of them, for the first time", Group::First),
    tree("remove-first", "rm -r of them, for the first time", Group::First),
    tree("unpack", "tar x of 300 files", Group::Metadata),
    tree("find", "find, with stat, of them", Group::Metadata),
    tree("remove", "rm -r of them", Group::Metadata),
];

/// How many of them fio does.
const JOBS: usize = 8;

/// fio's: what is sequential goes as most programs do it, through the guest's page cache, and what is written so is
/// synced before it counts; what is random goes past that cache, as databases do it. All has run for a moment before it
/// counts. What is synced is done so many times, not for so long: a sync that falls out of the time makes it twice as fast.
pub(super) fn jobs() -> String {
    let mut text = String::from(
        "[global]\ndirectory=/data\nfilename=fio\nsize=32m\nioengine=psync\nthread=1\ngtod_reduce=1\n\
         clocksource=clock_gettime\nstonewall\n",
    );
    for figure in &FIGURES[..JOBS] {
        let (kind, size) = figure.key.split_once('-').unwrap_or_default();
        let what = format!("rw={kind}\nbs={size}");
        // it cannot fail
        let _ = match (figure.group, kind) {
            (Group::Random, _) => writeln!(text, "[{}]\n{what}\ndirect=1\n{TIMED}", figure.key),
            (_, "write") => {
                let synced = format!("{what}\nend_fsync=1\n{AT_MOST}");
                writeln!(text, "[warm-{key}]\n{synced}\n[{key}]\n{synced}\nloops=3", key = figure.key)
            }
            _ => writeln!(text, "[{}]\n{what}\n{TIMED}", figure.key),
        };
    }
    text
}

/// 9p would take half a minute.
const AT_MOST: &str = "runtime=1s";

/// For so long, after a moment.
const TIMED: &str = "time_based=1\nramp_time=150ms\nruntime=250ms";

/// How far a guest's clock may be from ours, since its own clock measures.
const CLOCK: f64 = 0.02;

/// Folders of the tree, and files in each.
pub(super) const TREE: (usize, usize) = (15, 20);

/// How many times the tree comes and goes after the first time, which is the translator's more than the file system's.
const TIMES: usize = 3;

/// Does all of it in `/data`, with the programs in `/tools`. They come by different ways, which is not to be measured: so
/// the small ones go to `/ram`, and the large one is read before. What is printed goes different ways too, and comes last.
pub(super) fn measure(shell: &mut Shell) -> Result<Values> {
    let mut values = [f64::NAN; FIGURES.len()];
    shell.ask("cp /tools/clock /ram && cat /tools/* > /dev/null")?;
    let begin = (clock(shell)?, Instant::now());
    let said = shell
        .ask("/tools/ld.so --library-path /tools /tools/fio --output-format=terse --terse-version=3 /tools/jobs")?;
    for (value, figure) in values.iter_mut().zip(&FIGURES[..JOBS]) {
        *value = speed(&said, figure.key).with_context(|| format!("fio's {}: {said:#?}", figure.key))?;
    }
    // once for the first time, and TIMES
    let script = "t=; for i in 0 1 2 3; do /ram/mkdir /data/tree && cd /data/tree && a=$(/ram/clock) && \
                  /ram/tar xf /data/tree.tar && b=$(/ram/clock) && /ram/find . -size +1000 && c=$(/ram/clock) && \
                  cd / && /ram/rm -r /data/tree && t=\"$t $a $b $c $(/ram/clock)\" || break; done; printf '%s\\n' $t";
    let times: Vec<u64> = shell.ask(script)?.iter().filter_map(|line| line.parse().ok()).collect();
    ensure!(times.len() == 4 * (1 + TIMES), "of the tree: {times:?}");
    // of tar, find and rm
    let took = |time: usize, step: usize| (times[4 * time + step + 1] - times[4 * time + step]) as f64 / 1e6;
    for step in 0..3 {
        values[JOBS + step] = took(0, step);
        values[JOBS + 3 + step] = (1..=TIMES).map(|time| took(time, step)).sum::<f64>() / TIMES as f64;
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
        assert!(FIGURES[..JOBS].iter().all(|figure| jobs.contains(&format!("\n[{}]\n", figure.key))), "{jobs}");
    }
}
