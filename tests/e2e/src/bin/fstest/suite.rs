//! pjdfstest in a container: what it is given and what it says.

use anyhow::{Context as _, Result, ensure};
use e2e::{Node, Runtime, compile::compile};
use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

/// Users that the suite becomes.
const USERS: &str = "nobody:x:65534:65534::/:/bin/sh\ntests:x:1000:1000::/:/bin/sh\nother:x:1001:1001::/:/bin/sh\n";
const GROUPS: &str = "nobody:x:65534:\ntests:x:1000:\nother:x:1001:\n";

/// Everything that Linux' usual file systems have.
const CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["tests", "tests"], ["other", "other"]]
"#;

/// The suite copies `sleep` and runs the copy under another name, under which busybox does not know what it is.
const SLEEP: &str = "#include <unistd.h>\nint main(void) { return sleep(10); }\n";

/// Longest run: a guest under TCG takes a minute.
const LIMIT: Duration = Duration::from_secs(600);

/// The suite.
pub(crate) struct Suite(PathBuf);

impl Suite {
    pub(crate) fn from_environment() -> Result<Self> {
        let program = std::env::var_os("FSTEST_PROGRAM").context("FSTEST_PROGRAM is not set: run `make fstest`")?;
        Ok(Self(program.into()))
    }

    /// Runs it in /data: on a volume, or in the root file system of a container with these options.
    pub(crate) fn run(&self, node: &Node, runtime: Runtime, place: Place<'_>) -> Result<Results> {
        let (suite, data) = (node.dir().join("suite"), node.dir().join("data"));
        for folder in [&suite, &data] {
            fs::create_dir(folder)?;
        }
        // other users go through it
        fs::set_permissions(&data, fs::Permissions::from_mode(0o755))?;
        fs::copy(&self.0, suite.join("pjdfstest")).with_context(|| self.0.display().to_string())?;
        fs::write(suite.join("sleep"), compile(node.dir(), "sleep", SLEEP)?)?;
        fs::set_permissions(suite.join("sleep"), fs::Permissions::from_mode(0o755))?;
        for (name, text) in [("config.toml", CONFIG), ("passwd", USERS), ("group", GROUPS)] {
            fs::write(suite.join(name), text)?;
        }
        let mount = |from: &PathBuf, to: &str| format!("type=bind,src={},dst={to},options=rbind:rw", from.display());
        let (suite, volume) = (mount(&suite, "/suite"), mount(&data, "/data"));
        let script = "cat /suite/passwd >> /etc/passwd && cat /suite/group >> /etc/group && mkdir -p /data && cd /data && \
                      PATH=/suite:$PATH exec /suite/pjdfstest -c /suite/config.toml -p /data -s /dev/shm";
        let place = match place {
            Place::Volume => &["--mount", volume.as_str()],
            Place::RootFs(options) => options,
        };
        let options = [&["--privileged", "--mount", &suite], place].concat();
        let done = node.run(runtime, "suite", &options, &["sh", "-c", script]).limit(LIMIT).output()?;
        let results = Results::of(&done.text());
        ensure!(results.0.len() > 300, "the suite did not run: {done:?}");
        Ok(results)
    }
}

/// Where it runs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    Volume,
    RootFs(&'a [&'a str]),
}

/// What became of a test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    Skipped,
    /// With what it says of it.
    Failed(String),
}

/// By the tests' names.
#[derive(Debug, Default)]
pub(crate) struct Results(pub(crate) BTreeMap<String, Outcome>);

impl Results {
    /// Reads lines of a name and a word; what is said of a test comes after it, further in.
    fn of(text: &str) -> Self {
        let mut results = BTreeMap::new();
        let mut last: Option<String> = None;
        for line in text.lines() {
            if line.starts_with(char::is_whitespace) {
                if let Some(Outcome::Failed(why)) = last.as_ref().and_then(|name| results.get_mut(name)) {
                    why.push_str(line.trim());
                    why.push(' ');
                }
                continue;
            }
            let words: Vec<_> = line.split_whitespace().collect();
            let [name, word] = words[..] else { continue };
            let outcome = match word {
                "ok" => Outcome::Passed,
                "skipped" => Outcome::Skipped,
                "FAILED" => Outcome::Failed(String::new()),
                _ => continue,
            };
            results.insert(name.to_owned(), outcome);
            last = Some(name.to_owned());
        }
        Self(results)
    }

    pub(crate) fn summary(&self) -> String {
        let count = |wanted: fn(&Outcome) -> bool| self.0.values().filter(|outcome| wanted(outcome)).count();
        let passed = count(|outcome| *outcome == Outcome::Passed);
        let skipped = count(|outcome| *outcome == Outcome::Skipped);
        format!("{passed} passed, {} failed, {skipped} skipped", self.0.len() - passed - skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_read() {
        let text = "a::b        ok\nc::d    skipped\n\tRemounts are not allowed\ne::f   FAILED\n\tassertion\n\tleft: 1\n\
                    \nSummary: 1 failed, 1 skipped, 1 passed, 0 expected failures, 3 total\n";
        let results = Results::of(text);
        assert_eq!(results.0["e::f"], Outcome::Failed("assertion left: 1 ".into()));
        assert_eq!(results.summary(), "1 passed, 1 failed, 1 skipped");
    }
}
