//! OCI hooks that run on the host (runtime-spec, config.md, "POSIX-platform Hooks"): `prestart` and `createRuntime`
//! before the guest makes the container, `poststart` after its start, `poststop` after its end.
//!
//! `startContainer` runs in the guest (the agent's launcher). `createContainer` is refused by `container::spec`, for the
//! reasons in docs/design/004-hooks.md.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::runtime::Handle;

use crate::cleanup::{self, Journal, Step};
use crate::container::spec;
use crate::storage::tree::{self, How};
use crate::{ContainerId, Error};

/// Kept of what a failed hook writes, bytes.
const STDERR_KEPT: u64 = 4096;
/// For a hook without a `timeout` of its own.
const LIMIT: Duration = Duration::from_secs(60);

/// A container's hooks and what they are told.
#[derive(Debug, Clone)]
pub(crate) struct Hooks {
    id: String,
    bundle: PathBuf,
    version: String,
    annotations: serde_json::Value,
    before: Vec<Hook>,
    started: Vec<Hook>,
    stopped: Vec<Hook>,
    /// Where the root file system is shown to them.
    shown: Option<PathBuf>,
}

impl Hooks {
    /// Those of `spec`.
    pub(crate) fn of(id: &ContainerId, bundle: &Path, spec: &Spec) -> Self {
        let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
        let all = spec.hooks().clone().unwrap_or_default();
        #[allow(deprecated, reason = "prestart is deprecated in the specification and still used")]
        let mut before = list(all.prestart());
        before.extend(list(all.create_runtime()));
        Self {
            id: id.as_str().to_owned(),
            bundle: bundle.to_owned(),
            version: spec.version().clone(),
            annotations: json!(spec.annotations().clone().unwrap_or_default()),
            before,
            started: list(all.poststart()),
            stopped: list(all.poststop()),
            shown: None,
        }
    }

    /// Shows `rootfs` at `root`, where config.json says that it is and hooks look for it: the guest has it from another
    /// place. Without hooks nobody looks.
    pub(crate) fn show(&mut self, rootfs: &Path, root: &Path, journal: &Journal) -> Result<(), Error> {
        let none = [&self.before, &self.started, &self.stopped].iter().all(|list| list.is_empty());
        // elsewhere it may be anybody's folder
        if none || root == self.bundle || !root.starts_with(&self.bundle) {
            return Ok(());
        }
        journal.push(Step::Mounts(root.to_owned())).map_err(Error::host("writing the undo journal"))?;
        self.shown = Some(root.to_owned());
        std::fs::create_dir_all(root).map_err(Error::host(root.display().to_string()))?;
        tree::copy(rootfs, root, How { recursive: true, ..How::default() })
    }

    /// Takes that back.
    pub(crate) fn hide(&self) {
        if let Some(root) = &self.shown
            && let Err(error) = cleanup::unmount_tree(root)
        {
            tracing::warn!(path = %root.display(), %error, "cannot unmount the root file system from the bundle");
        }
    }

    /// Before the container is made; `pid` is the VMM's. The first that fails fails the create.
    pub(crate) async fn create(&self, pid: u32) -> Result<(), Error> {
        for hook in &self.before {
            self.run("createRuntime", hook, "creating", pid).await?;
        }
        Ok(())
    }

    /// After its start. The container goes on whatever they do.
    pub(crate) async fn started(&self, pid: u32) {
        for hook in &self.started {
            if let Err(error) = self.run("poststart", hook, "running", pid).await {
                tracing::warn!(%error, "a poststart hook failed: the container keeps running");
            }
        }
    }

    /// After everything of it is gone. All are run.
    pub(crate) async fn stopped(&self) {
        for hook in &self.stopped {
            if let Err(error) = self.run("poststop", hook, "stopped", 0).await {
                tracing::warn!(%error, "a poststop hook failed: the container is deleted nevertheless");
            }
        }
        self.hide();
    }

    async fn run(&self, moment: &str, hook: &Hook, status: &str, pid: u32) -> Result<(), Error> {
        let name = format!("{moment} hook {}", hook.path().display());
        let failed = |why: String| Error::Hook { name: name.clone(), why };
        let limit = match hook.timeout() {
            Some(seconds) => Duration::from_secs(
                u64::try_from(seconds)
                    .ok()
                    .filter(|limit| *limit > 0)
                    .ok_or_else(|| failed(format!("timeout {seconds} must be at least 1 second")))?,
            ),
            None => LIMIT,
        };
        let mut state = json!({
            "ociVersion": self.version,
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if pid != 0 {
            state["pid"] = pid.into();
        }
        let mut command = Command::new(hook.path());
        let args = hook.args().clone().unwrap_or_default();
        if let Some((arg0, rest)) = args.split_first() {
            command.arg0(arg0).args(rest);
        }
        command.env_clear().current_dir(&self.bundle).kill_on_drop(true);
        let env = hook.env().clone().unwrap_or_default();
        command.envs(env.iter().filter_map(|pair| pair.split_once('=')));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let state = state.to_string();
        let work = async {
            // the program, or its working folder, may be on a file system that does not answer
            let handle = Handle::current();
            let spawned = tokio::task::spawn_blocking(move || {
                let _within = handle.enter();
                command.spawn()
            });
            let mut child = match spawned.await.unwrap_or_else(|lost| Err(std::io::Error::other(lost))) {
                Ok(child) => child,
                Err(error) => return (Err(error), Vec::new()),
            };
            let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
            // a hook need not read it
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(state.as_bytes()).await;
            }
            let mut said = Vec::new();
            if let Some(mut stderr) = stderr {
                let _ = (&mut stderr).take(STDERR_KEPT).read_to_end(&mut said).await;
                // the rest is read too, or the hook would wait for us
                let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            }
            (child.wait().await, said)
        };
        match tokio::time::timeout(limit, work).await {
            Err(_) => Err(failed(format!("timed out after {limit:?}"))),
            Ok((Ok(status), _)) if status.success() => Ok(()),
            Ok((Ok(status), said)) => {
                let said = String::from_utf8_lossy(&said);
                Err(failed(format!("{status}, stderr: {}", said.trim_end())))
            }
            Ok((Err(error), _)) => Err(failed(error.to_string())),
        }
    }
}

/// `poststop` for a container whose shim died: its bundle says which there are.
///
/// # Errors
/// The bundle's specification cannot be read; then nobody knows of any hook.
pub async fn after_a_crash(id: &ContainerId, bundle: &Path) -> Result<(), Error> {
    let spec = spec::read(bundle)?;
    Hooks::of(id, bundle, &spec).stopped().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(bundle: &Path, lists: &serde_json::Value) -> Hooks {
        let spec = json!({ "ociVersion": "1.0.2", "annotations": { "a": "b" }, "hooks": lists });
        let spec: Spec = serde_json::from_value(spec).expect("a specification");
        Hooks::of(&ContainerId::try_from("c1").expect("an id"), bundle, &spec)
    }

    fn shell(script: &str) -> serde_json::Value {
        json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "X=1 2"], "timeout": 5 })
    }

    #[tokio::test]
    async fn are_told_the_state_in_order() {
        let bundle = tempfile::tempdir().expect("a folder");
        let lists = json!({
            "prestart": [shell("cat >> log; echo \" $X first\" >> log")],
            "createRuntime": [shell("echo second >> log")],
            "poststop": [shell("exit 3"), shell("cat >> log")],
        });
        let hooks = hooks(bundle.path(), &lists);
        hooks.create(42).await.expect("run");
        hooks.started(42).await;
        hooks.stopped().await;
        let log = std::fs::read_to_string(bundle.path().join("log")).expect("written");
        let (first, rest) = log.split_once(" 1 2 first\nsecond\n").expect("both, in order");
        let state: serde_json::Value = serde_json::from_str(first).expect("JSON");
        assert_eq!((&state["id"], &state["pid"], &state["status"]), (&json!("c1"), &json!(42), &json!("creating")));
        assert_eq!(state["annotations"]["a"], "b");
        let state: serde_json::Value = serde_json::from_str(rest).expect("JSON");
        assert_eq!((&state["status"], state.get("pid")), (&json!("stopped"), None));
    }

    #[tokio::test]
    async fn a_failure_has_a_name_and_a_reason() {
        let bundle = tempfile::tempdir().expect("a folder");
        let fail = |hook: serde_json::Value| {
            let hooks = hooks(bundle.path(), &json!({ "createRuntime": [hook] }));
            async move { hooks.create(1).await.expect_err("failed").to_string() }
        };
        let error = fail(shell("echo broken >&2; exit 3")).await;
        assert_eq!(error, "createRuntime hook /bin/sh failed: exit status: 3, stderr: broken");
        let error = fail(json!({ "path": "/no/hook" })).await;
        assert!(error.contains("/no/hook failed: No such file"), "{error}");
        let error = fail(json!({ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 })).await;
        assert!(error.ends_with("timed out after 1s"), "{error}");
    }
}
