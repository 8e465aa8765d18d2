//! What the two runs say together, and whether that is good enough.

use crate::critest::{Run, State, Test};
use anyhow::{Context as _, Result, bail};
use std::{collections::BTreeMap, fmt, fs, path::Path};

/// Tests that a virtual machine cannot pass, with the reason.
pub(crate) type Exceptions = BTreeMap<String, String>;

/// Reads the list: `"name of the test" = "reason"`.
pub(crate) fn exceptions(path: &Path) -> Result<Exceptions> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let all: Exceptions = toml::from_str(&text).with_context(|| path.display().to_string())?;
    if let Some((name, _)) = all.iter().find(|(_, reason)| reason.trim().is_empty()) {
        bail!("{}: {name:?} has no reason", path.display());
    }
    Ok(all)
}

/// A test and what is to be said of it.
type Told = Vec<(String, String)>;

/// The comparison.
#[derive(Debug, Default)]
pub(crate) struct Report {
    both: usize,
    skipped: usize,
    neither: Told,
    only_kata: Told,
    impossible: Told,
    /// What makes the comparison fail.
    only_runc: Told,
    /// Exceptions that are none.
    stale: Told,
}

impl Report {
    /// Puts the runs side by side. `complete`: they are of all tests.
    pub(crate) fn new(runc: &Run, kata: &Run, exceptions: &Exceptions, complete: bool) -> Self {
        let missing = Test { state: State::Failed, why: "not in the report".to_owned() };
        let mut report = Self::default();
        for name in runc.keys().chain(kata.keys().filter(|name| !runc.contains_key(*name))) {
            let one = runc.get(name).unwrap_or(&missing);
            let other = kata.get(name).unwrap_or(&missing);
            report.add(name, one, other, exceptions.get(name));
        }
        if complete {
            for name in exceptions.keys().filter(|name| !runc.contains_key(*name)) {
                report.stale.push((name.clone(), "critest has no such test".to_owned()));
            }
        }
        report
    }

    fn add(&mut self, name: &str, runc: &Test, kata: &Test, exception: Option<&String>) {
        let told = |text: &str| (name.to_owned(), text.to_owned());
        if kata.state == State::Passed && exception.is_some() {
            self.stale.push(told("passes with kata"));
        }
        match (runc.state, kata.state) {
            (State::Passed, State::Passed) => self.both += 1,
            (State::Passed, State::Failed | State::Skipped) => match exception {
                Some(reason) => self.impossible.push(told(reason)),
                None if kata.state == State::Skipped => self.only_runc.push(told(&format!("skipped: {}", kata.why))),
                None => self.only_runc.push(told(&kata.why)),
            },
            (State::Failed | State::Skipped, State::Passed) => self.only_kata.push(told(&runc.why)),
            (State::Skipped, State::Skipped) => self.skipped += 1,
            (State::Failed, _) => self.neither.push(told(&runc.why)),
            (State::Skipped, State::Failed) => self.neither.push(told(&kata.why)),
        }
    }

    /// Whether all that runc passes and a virtual machine can pass was passed.
    pub(crate) fn is_good(&self) -> bool {
        self.only_runc.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = [
            ("failed by both (runc's words)", &self.neither),
            ("passed by kata only (runc's words)", &self.only_kata),
            ("passed by runc only, impossible for a virtual machine", &self.impossible),
            ("EXCEPTIONS THAT ARE NONE: take them out of the list", &self.stale),
            ("PASSED BY RUNC ONLY", &self.only_runc),
        ];
        for (title, list) in lists {
            if !list.is_empty() {
                writeln!(f, "\n{title}:")?;
            }
            for (name, text) in list {
                writeln!(f, "  {name}\n      {text}")?;
            }
        }
        let rows = [
            ("passed by both", self.both),
            ("failed by both", self.neither.len()),
            ("skipped by both", self.skipped),
            ("passed by kata only", self.only_kata.len()),
            ("passed by runc only, impossible", self.impossible.len()),
            ("passed by runc only", self.only_runc.len()),
        ];
        writeln!(f)?;
        rows.iter().try_for_each(|(title, count)| writeln!(f, "{title:<34} {count:>4}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(tests: &[(&str, State)]) -> Run {
        let test = |state| Test { state, why: "why".to_owned() };
        tests.iter().map(|(name, state)| ((*name).to_owned(), test(*state))).collect()
    }

    fn names(told: &Told) -> Vec<&str> {
        told.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn only_what_runc_passes_and_no_exception_covers_is_bad() {
        use State::{Failed, Passed, Skipped};
        let runc = [("a", Passed), ("b", Passed), ("c", Passed), ("d", Failed), ("e", Failed), ("f", Skipped)];
        let kata = [("a", Passed), ("b", Failed), ("c", Failed), ("d", Passed), ("e", Failed), ("f", Skipped)];
        let excepted = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), "why".to_owned())).collect();
        let report = Report::new(&run(&runc), &run(&kata), &excepted(&["b", "c"]), true);
        assert!(report.is_good() && report.stale.is_empty(), "{report:?}");
        assert_eq!((report.both, report.skipped, report.impossible.len()), (1, 1, 2));
        assert_eq!((names(&report.only_kata), names(&report.neither)), (vec!["d"], vec!["e"]));

        let report = Report::new(&run(&runc), &run(&kata), &excepted(&["a", "c", "x"]), true);
        assert!(!report.is_good());
        assert_eq!((names(&report.only_runc), names(&report.stale)), (vec!["b"], vec!["a", "x"]));
        // of some tests only
        assert_eq!(names(&Report::new(&run(&runc), &run(&kata), &excepted(&["a", "c", "x"]), false).stale), ["a"]);

        // not run is not passed
        let report = Report::new(&run(&[("a", Passed), ("b", Passed)]), &run(&[("a", Skipped)]), &excepted(&[]), true);
        assert_eq!(names(&report.only_runc), ["a", "b"]);
    }
}
