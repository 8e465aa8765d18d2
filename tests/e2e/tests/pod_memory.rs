//! Small pods: the VM fits into what the host lets the pod have, so that what goes short of memory is a process in the guest,
//! which is told, and not the VM.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{
    NodeSetup, Runtime,
    cri::{Cri, Network, Pod, with_cri},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

const FOREVER: [&str; 2] = ["sleep", "100000"];
const MIB: u64 = 1 << 20;

/// A cgroup on the host as kubelet makes one for a pod, which goes with this.
struct PodCgroup {
    name: &'static str,
    folder: PathBuf,
    is_v2: bool,
}

impl PodCgroup {
    fn make(name: &'static str) -> Result<Self> {
        let old = Path::new("/sys/fs/cgroup/memory");
        let is_v2 = !old.is_dir();
        let folder = if is_v2 { Path::new("/sys/fs/cgroup") } else { old }.join(name);
        // one may be left of a run that failed
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { name, folder, is_v2 })
    }

    fn file(&self, old: &str, new: &str) -> PathBuf {
        self.folder.join(if self.is_v2 { new } else { old })
    }

    fn limit(&self, bytes: u64) -> Result<()> {
        let file = self.file("memory.limit_in_bytes", "memory.max");
        fs::write(&file, bytes.to_string()).with_context(|| format!("{} = {bytes}", file.display()))
    }

    fn read(&self, old: &str, new: &str) -> Result<u64> {
        let file = self.file(old, new);
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        text.trim().parse().with_context(|| format!("{}: {text}", file.display()))
    }

    fn placed(&self, more: &Value) -> Value {
        let mut placed = json!({"linux": {"cgroup_parent": format!("/{}", self.name)}});
        if let (Some(all), Some(more)) = (placed["linux"].as_object_mut(), more.as_object()) {
            all.extend(more.clone());
        }
        placed
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

fn limited(bytes: u64) -> Value {
    json!({"linux": {"resources": {"memory_limit_in_bytes": bytes}}})
}

/// That it was killed for want of memory, as kubelet reads it.
fn ensure_oom(cri: &Cri<'_>, container: &str) -> Result<()> {
    cri.wait_exited(container)?;
    // the end and its reason are told by two events, in any order
    let shown = cri.wait_shown(container, "OOMKilled").context("the reason")?;
    let shown: Value = serde_json::from_str(&shown)?;
    let code = shown.pointer("/status/exitCode").and_then(Value::as_i64);
    ensure!(code == Some(137), "exit code {code:?}");
    Ok(())
}

fn ensure_runs(cri: &Cri<'_>, container: &str) -> Result<()> {
    ensure!(cri.sh(container, "echo here")? == "here", "{container}");
    Ok(())
}

/// Returns what the error says: the least limit, and the overhead of a RuntimeClass that it advises, MiB.
fn too_small_is_refused(cri: &Cri<'_>) -> Result<(u64, u64)> {
    let cgroup = PodCgroup::make("kata-e2e-small")?;
    cgroup.limit(64 * MIB)?;
    let config = cri.pod_config("refused", &cgroup.placed(&json!({})))?.display().to_string();
    let refused = cri.crictl(["runp", "--runtime", "kata", &config]).output()?;
    ensure!(refused.code != 0, "a pod of 64 MiB started");
    let limit = cgroup.file("memory.limit_in_bytes", "memory.max").display().to_string();
    for word in ["64 MiB", &limit, "RuntimeClass", "no room for a VM"] {
        ensure!(refused.stderr.contains(word), "{word} is not in {}", refused.stderr);
    }
    let number = |after: &str| -> Result<u64> {
        let text = refused.stderr.split(after).nth(1).unwrap_or_default();
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().with_context(|| format!("no number after {after:?} in {}", refused.stderr))
    };
    Ok((number("which needs at least ")?, number("RuntimeClass to ")?))
}

fn the_least_starts(cri: &Cri<'_>, least: u64) -> Result<()> {
    let cgroup = PodCgroup::make("kata-e2e-least")?;
    cgroup.limit(least * MIB)?;
    let pod = cri.run_pod(Runtime::Kata, "least", &cgroup.placed(&json!({})))?;
    let one = cri.run(&pod, "one", &FOREVER, &limited(16 * MIB))?;
    ensure_runs(cri, &one)?;
    let most = cgroup.read("memory.max_usage_in_bytes", "memory.peak")? / MIB;
    println!("a pod of {least} MiB: at most {most} MiB");
    cri.remove(&pod)
}

fn the_guest_is_short_first(cri: &Cri<'_>, overhead: u64) -> Result<()> {
    const LIMIT: u64 = 128;
    let cgroup = PodCgroup::make("kata-e2e-fits")?;
    cgroup.limit((LIMIT + overhead) * MIB)?;
    let resources = json!({"resources": {"memory_limit_in_bytes": LIMIT * MIB}});
    let pod: Pod = cri.run_pod(Runtime::Kata, "fits", &cgroup.placed(&resources))?;
    let used = || cgroup.read("memory.usage_in_bytes", "memory.current").map(|bytes| bytes / MIB);
    println!("a pod of {LIMIT} + {overhead} MiB, idle: {} MiB", used()?);
    let one = cri.run(&pod, "one", &FOREVER, &limited(LIMIT * MIB))?;
    println!(
        "with a container: {} MiB; {}",
        used()?,
        cri.sh(&one, "grep -E 'Mem(Total|Free|Available)' /proc/meminfo")?
    );
    // tail keeps all of a line
    let eaten = cri.sh(&one, "head -c 115m /dev/zero | tail | wc -c")?;
    ensure!(eaten == (115 * MIB).to_string(), "{eaten}");
    // more than it may have: by its own limit; and by the guest's size
    let hungry = cri.run(&pod, "limited", &["tail", "/dev/zero"], &limited(LIMIT * MIB))?;
    ensure_oom(cri, &hungry)?;
    for round in 0..2 {
        let hungry = cri.run(&pod, &format!("unlimited{round}"), &["tail", "/dev/zero"], &json!({}))?;
        ensure_oom(cri, &hungry)?;
    }
    // files that are read and written go through the host too
    cri.sh(&one, "head -c 32m /dev/zero > /file; cat /file > /dev/null; rm /file")?;
    ensure_runs(cri, &one)?;
    let most = cgroup.read("memory.max_usage_in_bytes", "memory.peak")? / MIB;
    println!("full: {} MiB, at most {most}", used()?);
    // an update gets what there is, and an error where there is not
    for (args, has) in
        [(["--memory", "17179869184"], "larger than the VM's memory"), (["--cpu-quota", "800000"], "vCPUs")]
    {
        let refused = cri.crictl([&["update"], &args[..], &[&one]].concat()).output()?;
        ensure!(refused.code != 0 && refused.stderr.contains(has), "{args:?}: {} {}", refused.code, refused.stderr);
    }
    cri.say(["update", "--memory", "67108864", &one])?;
    let max = cri.sh(&one, "cat /sys/fs/cgroup/memory.max")?;
    ensure!(max == "67108864", "{max}");
    cri.remove(&pod)
}

fn a_killed_machine_is_told(cri: &Cri<'_>) -> Result<()> {
    let cgroup = PodCgroup::make("kata-e2e-killed")?;
    let pod = cri.run_pod(Runtime::Kata, "killed", &cgroup.placed(&json!({})))?;
    let eater = ["sh", "-c", "read line; tail /dev/zero"];
    let hungry = cri.run(&pod, "hungry", &eater, &json!({"stdin": true, "stdin_once": true}))?;
    let idle = cri.run(&pod, "idle", &FOREVER, &json!({}))?;
    // what kubelet does on a node without such a RuntimeClass, and later than it does
    let used = cgroup.read("memory.usage_in_bytes", "memory.current")?;
    cgroup.limit(used + 32 * MIB)?;
    cri.crictl(["attach", "-i", &hungry]).output_with(b"now\n")?;
    for container in [&hungry, &idle] {
        ensure_oom(cri, container)?;
    }
    let said = cri.node.log.lines_from(0).iter().any(|line| line.contains("the host's OOM killer killed the VM"));
    if !said {
        bail!("the log does not say why");
    }
    cri.remove(&pod)
}

#[test]
fn a_pod_has_room_or_says_why_not() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let (least, overhead) = too_small_is_refused(cri)?;
        the_least_starts(cri, least).context("the least pod")?;
        the_guest_is_short_first(cri, overhead).context("a small pod")?;
        a_killed_machine_is_told(cri).context("a machine that the host kills")
    })
}
