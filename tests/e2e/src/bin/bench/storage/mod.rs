//! What passes through a container's file systems: fio, and a tree of small files that comes, is looked at and goes. On a
//! volume by virtio-fs, by virtio-9p and on a disk (a direct volume: a root file system on a disk goes the same way);
//! beside runc on the same disk of the host, and beside a bare QEMU with the same virtiofsd or the same kind of image.

mod ground;
mod raw;
mod shell;
mod work;

use crate::{report::Report, sample::Sample};
use anyhow::{Context as _, Result};
use e2e::{install::Install, with_node};
use ground::Ground;
use work::{FIGURES, Group, Unit};

/// How a container, or a bare guest, has the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Runc,
    Fs,
    RawFs,
    NineP,
    Disk,
    RawDisk,
}

/// All of them; those that are compared are neighbours.
const WAYS: [(Way, &str, &str); 6] = [
    (Way::Runc, "runc", "runc"),
    (Way::Fs, "fs", "virtio-fs"),
    (Way::RawFs, "fs.raw", "raw QEMU + virtiofsd"),
    (Way::NineP, "9p", "virtio-9p"),
    (Way::Disk, "disk", "disk"),
    (Way::RawDisk, "disk.raw", "raw QEMU, disk"),
];

/// Ours, and what it must keep up with.
const PAIRS: [(Way, Way, &str, &str); 2] =
    [(Way::Fs, Way::RawFs, "fs", "virtio-fs"), (Way::Disk, Way::RawDisk, "disk", "disk")];

/// What one way did in one round, a value for each figure.
type Values = [f64; FIGURES.len()];

/// Measures all of them in turns, each alone on the machine and freshly started: a VM has luck of its own, for as long as
/// it runs, with where the translator and the kernel put things.
pub(crate) fn measure(install: &Install, rounds: usize, report: &mut Report) -> Result<()> {
    let mut all: Vec<[Values; WAYS.len()]> = Vec::new();
    with_node(|node| {
        let ground = Ground::lay(install, node)?;
        for round in 0..rounds.div_ceil(2) {
            let mut values = [[f64::NAN; FIGURES.len()]; WAYS.len()];
            for step in 0..WAYS.len() {
                // there and back, so that what drifts is nobody's
                let at = if round % 2 == 0 { step } else { WAYS.len() - 1 - step };
                let (way, _, title) = WAYS[at];
                // 9p takes as long as the others together, and has no bar
                if way != Way::NineP || round % 2 == 0 {
                    values[at] = ground.measure(way, title).with_context(|| title.to_owned())?;
                }
            }
            all.push(values);
        }
        Ok(())
    })?;
    for (number, figure) in FIGURES.iter().enumerate() {
        for (at, (_, key, title)) in WAYS.iter().enumerate() {
            let measured = all.iter().map(|round| round[at][number]).filter(|value| value.is_finite());
            let sample = measured.fold(Sample::new(), Sample::with);
            report.add(
                &format!("store.{}.{key}", figure.key),
                &format!("{}, {title}", figure.title),
                sample,
                figure.unit.name(),
            );
        }
    }
    for (ours, theirs, key, title) in PAIRS {
        let (ours, theirs) = (place(ours), place(theirs));
        let ratios: Vec<Values> = all.iter().map(|round| ratios(&round[ours], &round[theirs])).collect();
        for (number, figure) in FIGURES.iter().enumerate() {
            let sample = ratios.iter().map(|round| round[number]).fold(Sample::new(), Sample::with);
            report.add(
                &format!("store.{key}.of-raw.{}", figure.key),
                &format!("{title}, of raw QEMU's: {}", figure.title),
                sample,
                "%",
            );
        }
        for group in [Group::Sequential, Group::Random, Group::Metadata] {
            let sample = ratios.iter().map(|round| mean(round, group)).fold(Sample::new(), Sample::with);
            let (group, name) = group.names();
            report.add(
                &format!("store.{key}.of-raw.all.{group}"),
                &format!("{title}, of raw QEMU's: all {name}"),
                sample,
                "%",
            );
        }
    }
    Ok(())
}

fn place(way: Way) -> usize {
    WAYS.iter().position(|(one, ..)| *one == way).unwrap_or_default()
}

/// In percent: more than 100 is better.
fn ratios(ours: &Values, theirs: &Values) -> Values {
    let mut all = [f64::NAN; FIGURES.len()];
    for (number, figure) in FIGURES.iter().enumerate() {
        all[number] = match figure.unit {
            Unit::Speed => 100.0 * ours[number] / theirs[number],
            Unit::Time => 100.0 * theirs[number] / ours[number],
        };
    }
    all
}

/// The geometric mean of a group's ratios in one round.
fn mean(ratios: &Values, group: Group) -> f64 {
    let logs: Vec<_> =
        FIGURES.iter().zip(ratios).filter(|(figure, _)| figure.group == group).map(|(_, ratio)| ratio.ln()).collect();
    (logs.iter().sum::<f64>() / logs.len() as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_say_who_is_better() {
        let (ours, theirs) = ([2.0; FIGURES.len()], [1.0; FIGURES.len()]);
        let both = ratios(&ours, &theirs);
        for group in [Group::Sequential, Group::Random] {
            assert!((mean(&both, group) - 200.0).abs() < 1e-9, "twice as much is twice as good");
        }
        assert!((mean(&both, Group::Metadata) - 50.0).abs() < 1e-9, "twice as long is half as good");
    }
}
