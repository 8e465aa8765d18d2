//! One run of critest against one runtime: started, followed, and its report read.

use anyhow::{Context as _, Result, bail};
use e2e::{
    Runtime,
    containerd::{NRI_SOCKET, client},
    cri::Cri,
    mounts,
};
use nix::mount::{MsFlags, mount};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
};

/// Slow machines without KVM need most of an hour.
const TIME_LIMIT: &str = "--ginkgo.timeout=3h";

/// What became of one test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    /// It passed.
    Passed,
    /// critest found that it makes no sense here.
    Skipped,
    /// It failed, in whatever way.
    Failed,
}

/// One test of a run.
#[derive(Debug, Clone)]
pub(crate) struct Test {
    /// What became of it.
    pub(crate) state: State,
    /// The first lines of what critest says of it; empty when it passed.
    pub(crate) why: String,
}

/// All tests of a run by their full names.
pub(crate) type Run = BTreeMap<String, Test>;

/// Runs the tests whose names match `focus`, all without one. The report and critest's output stay in `folder`.
pub(crate) fn run(cri: &Cri<'_>, runtime: Runtime, focus: Option<&str>, folder: &Path) -> Result<Run> {
    let at = |end: &str| folder.join(format!("{}.{end}", runtime.tag()));
    let report = at("json");
    let _ = fs::remove_file(&report);
    let temporary = cri.node.dir().join("tmp");
    fs::create_dir_all(&temporary)?;
    // as systemd makes every mount of a host
    mount(Some(&temporary), &temporary, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    mount(None::<&str>, &temporary, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
    let mut log = File::create(at("log"))?;
    let address = format!("unix://{}", cri.node.address());
    let mut command = Command::new(client("cri-tools")?.join("critest"));
    command
        .args(["--runtime-endpoint", &address, "--image-endpoint", &address, "--runtime-handler", runtime.tag()])
        // the order is random, but the same each time
        .args(["--ginkgo.v", "--ginkgo.no-color", "--ginkgo.seed=1", TIME_LIMIT, "--ginkgo.json-report"])
        .arg(&report)
        .args(
            cri.node
                .containerd()
                .has_nri()
                .then(|| format!("--nri-socket={}", cri.node.dir().join(NRI_SOCKET).display())),
        )
        .args(focus.map(|focus| format!("--ginkgo.focus={focus}")))
        .env("TMPDIR", &temporary)
        .current_dir(&temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log.try_clone()?));
    let segments = segments()?;
    let mut child = command.spawn().context("starting critest")?;
    let mut progress = Progress::new(runtime);
    for line in BufReader::new(child.stdout.take().context("critest's stdout")?).lines() {
        let line = line?;
        writeln!(log, "{line}")?;
        progress.show(&line);
    }
    let status = child.wait()?;
    // what critest itself leaves of tests that fail is not the runtime's
    remove_new_segments(&segments)?;
    mounts::unmount_below(&[temporary]);
    let text = fs::read(&report)
        .with_context(|| format!("critest ended with {status} and without a report: see {}", at("log").display()))?;
    let run = read(&text)?;
    if run.values().all(|test| test.state == State::Skipped) {
        bail!("critest ran no test: see {}", at("log").display());
    }
    Ok(run)
}

/// The part of ginkgo's report that we need.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

fn read(report: &[u8]) -> Result<Run> {
    let suites: Vec<Suite> = serde_json::from_slice(report).context("critest's report")?;
    let mut run = Run::new();
    for spec in suites.into_iter().flat_map(|suite| suite.spec_reports) {
        let state = match spec.state.as_str() {
            "passed" => State::Passed,
            "skipped" | "pending" => State::Skipped,
            _ => State::Failed,
        };
        // what is done before and after all tests has no name, and is told only when it fails
        if spec.leaf_node_type != "It" && state != State::Failed {
            continue;
        }
        let mut name = spec.container_hierarchy_texts.unwrap_or_default();
        name.push(if spec.leaf_node_text.is_empty() { spec.leaf_node_type } else { spec.leaf_node_text });
        let test = Test { state, why: first_lines(&spec.failure.message) };
        let same = run.entry(name.join(" ")).or_insert_with(|| test.clone());
        if same.state < test.state {
            *same = test;
        }
    }
    Ok(run)
}

/// What fits in a line or two of a table.
fn first_lines(message: &str) -> String {
    const MOST: usize = 400;
    let mut text = message.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = text.char_indices().nth(MOST) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Shows tests as they end: ginkgo writes the name when one begins, and a line with a bullet when it ends.
struct Progress {
    runtime: Runtime,
    all: String,
    done: usize,
    name: String,
}

impl Progress {
    fn new(runtime: Runtime) -> Self {
        Self { runtime, all: "?".to_owned(), done: 0, name: String::new() }
    }

    fn show(&mut self, line: &str) {
        if let Some(count) = line.strip_prefix("Will run ").and_then(|rest| rest.split(' ').next()) {
            count.clone_into(&mut self.all);
        } else if line.starts_with("[k8s.io]") {
            line.clone_into(&mut self.name);
        } else if let Some(mark) = mark(line) {
            self.done += 1;
            println!("    {} {:>3}/{} {mark:<7} {}", self.runtime.tag(), self.done, self.all, self.name);
        }
    }
}

fn mark(line: &str) -> Option<&'static str> {
    match line {
        _ if line.starts_with("S [SKIPPED] [") => Some("skipped"),
        _ if line.starts_with("• [") && line["• [".len()..].contains('[') => Some("FAILED"),
        _ if line.starts_with("• [") => Some("ok"),
        _ => None,
    }
}

/// The host's segments of shared memory. critest makes some and leaves them.
fn segments() -> Result<Vec<String>> {
    let path = "/proc/sysvipc/shm";
    let text = fs::read_to_string(path).context(path)?;
    // key, id, permissions, size, and who made it
    Ok(text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned)).collect())
}

fn remove_new_segments(before: &[String]) -> Result<()> {
    for id in segments()?.iter().filter(|id| !before.contains(id)) {
        Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status().context("ipcrm")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let report = br#"[{"SpecReports": [
            {"ContainerHierarchyTexts": null, "LeafNodeType": "BeforeSuite", "LeafNodeText": "", "State": "passed"},
            {"ContainerHierarchyTexts": ["[k8s.io] A", "b"], "LeafNodeType": "It", "LeafNodeText": "c", "State": "passed"},
            {"ContainerHierarchyTexts": ["[k8s.io] A", "b"], "LeafNodeType": "It", "LeafNodeText": "d",
             "State": "timedout", "Failure": {"Message": "too\n  late"}},
            {"ContainerHierarchyTexts": ["[k8s.io] A"], "LeafNodeType": "It", "LeafNodeText": "e", "State": "skipped"},
            {"ContainerHierarchyTexts": ["[k8s.io] A", "b"], "LeafNodeType": "It", "LeafNodeText": "c",
             "State": "failed", "Failure": {"Message": "the other of this name"}}
        ]}]"#;
        let run = read(report).expect("a report");
        let told: Vec<_> = run.iter().map(|(name, test)| (name.as_str(), test.state, test.why.as_str())).collect();
        assert_eq!(
            told,
            [
                ("[k8s.io] A b c", State::Failed, "the other of this name"),
                ("[k8s.io] A b d", State::Failed, "too late"),
                ("[k8s.io] A e", State::Skipped, ""),
            ]
        );
        assert!(read(b"{}").is_err());
    }

    #[test]
    fn progress_is_understood() {
        assert_eq!(mark("• [1.481 seconds]"), Some("ok"));
        assert_eq!(mark("• [FAILED] [1.911 seconds]"), Some("FAILED"));
        assert_eq!(mark("S [SKIPPED] [0.002 seconds]"), Some("skipped"));
        assert_eq!(mark("•"), None);
        assert_eq!(mark("SSSSSS"), None);
    }
}
