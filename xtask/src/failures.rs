//! The tests that failed, once more below everything else: a CI that shows the end of a long output shows the reason then.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How many of its last lines a failed test is shown with.
const LINES: usize = 30;
/// A line longer than this is cut, in bytes.
const LONGEST: u64 = 64 << 10;

/// Runs `cargo test -- --test-threads=1 --nocapture`, shows all that it prints, and in the end what failed with its last
/// lines.
///
/// # Errors
///
/// It cannot be started, or a test failed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    // one pipe for both, or a test's messages could come after the line that ends it
    let (reader, writer) = std::io::pipe().context("a pipe")?;
    let error_writer = writer.try_clone().context("a pipe")?;
    command.stdin(Stdio::null()).stdout(writer).stderr(error_writer);
    // a trace of thirty lines hides the message, and is the same for every test that returns an error
    command.env("RUST_BACKTRACE", "0");
    let child = command.spawn().context("cargo cannot be started: run `make deps`, which installs what is needed");
    // our copies of the pipe's end are in the command: it would have no end
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = child?;
    let mut told = Failures::default();
    let shown = told.follow(BufReader::new(reader), &mut std::io::stdout().lock());
    let status = child.wait().context("waiting for cargo")?;
    shown?;
    if !status.success() {
        print!("{}", told.report());
        bail!("the tests ended with {status}");
    }
    Ok(())
}

/// What the test harness has printed so far.
#[derive(Default)]
struct Failures {
    file: String,
    test: String,
    last: VecDeque<String>,
    failed: Vec<(String, Vec<String>)>,
}

impl Failures {
    fn follow(&mut self, mut from: impl BufRead, to: &mut impl Write) -> Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if from.by_ref().take(LONGEST).read_until(b'\n', &mut line).context("the output of the tests")? == 0 {
                return Ok(());
            }
            to.write_all(&line).and_then(|()| to.flush()).context("showing the output of the tests")?;
            self.line(String::from_utf8_lossy(&line).trim_end());
        }
    }

    fn line(&mut self, line: &str) {
        if let Some(file) = line.trim_start().strip_prefix("Running ") {
            file.split(' ').next().unwrap_or(file).clone_into(&mut self.file);
        }
        // the name is printed before the test runs, so the test's first words are in the same line
        let begun = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
        if let Some((test, rest)) = begun {
            test.clone_into(&mut self.test);
            self.last.clear();
            self.keep(rest);
        } else {
            self.keep(line);
        }
        let ended = begun.map_or(line, |(_, rest)| rest);
        if ended == "FAILED" || ended.ends_with(" FAILED") {
            let mut shown: Vec<String> = self.last.drain(..).collect();
            shown.pop();
            self.failed.push((format!("{} {}", self.file, self.test), shown));
        }
    }

    fn keep(&mut self, line: &str) {
        if self.last.len() == LINES {
            self.last.pop_front();
        }
        self.last.push_back(line.to_owned());
    }

    fn report(&self) -> String {
        let mut report = vec![String::new(), format!("==> {} failed", self.failed.len())];
        for (test, lines) in &self.failed {
            report.push(format!("--- {test}"));
            report.extend(lines.iter().map(|line| format!("    {line}")));
        }
        report.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::Failures;

    #[test]
    fn what_failed_is_told_with_its_last_words() {
        let printed = "     Running tests/one.rs (target/one)\n\ntest good ... doing\nok\ntest bad ... trying\nError: no \
                       answer\n\nCaused by:\n    gone\nFAILED\ntest short ... FAILED\n\nfailures:\n    bad\n\ntest result: \
                       FAILED. 1 passed; 2 failed\n";
        let mut told = Failures::default();
        let mut shown = Vec::new();
        told.follow(printed.as_bytes(), &mut shown).unwrap();
        assert_eq!(String::from_utf8(shown).unwrap(), printed, "all of it is shown");
        assert_eq!(
            told.report(),
            "\n==> 2 failed\n--- tests/one.rs bad\n    trying\n    Error: no answer\n    \n    Caused by:\n        gone\n--- \
             tests/one.rs short\n"
        );
    }

    #[test]
    fn only_the_last_lines_are_kept() {
        let mut told = Failures::default();
        told.line("test long ... ");
        (0..1000).for_each(|number| told.line(&number.to_string()));
        told.line("FAILED");
        let report = told.report();
        assert!(report.contains("    999\n") && !report.contains("    900\n"), "{report}");
    }
}
