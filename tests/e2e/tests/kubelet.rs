//! A kubelet with static pods, beside runc, in a world of its own.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Runtime, image,
    kubelet::{Kubelet, with_kubelet},
};
use serde_json::{Value, json};
use std::fs;

/// The README's value of `overhead.podFixed.memory` for a host without KVM.
const OVERHEAD: &str = "130Mi";

fn shell(name: &str, script: &str, more: &Value) -> Value {
    let mut container =
        json!({"name": name, "image": image::NAME, "imagePullPolicy": "Never", "command": ["sh", "-c", script]});
    for (key, value) in more.as_object().into_iter().flatten() {
        container[key] = value.clone();
    }
    container
}

fn exec(script: &str) -> Value {
    json!({"exec": {"command": ["sh", "-c", script]}})
}

fn probe(script: &str) -> Value {
    let mut probe = exec(script);
    (probe["periodSeconds"], probe["failureThreshold"], probe["timeoutSeconds"]) = (1.into(), 60.into(), 10.into());
    probe
}

fn limits(memory: &str) -> Value {
    json!({"resources": {"limits": {"memory": memory}}})
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
}

/// The last or present end of a pod's only container.
fn end(status: &Value) -> Value {
    let one = &status["containerStatuses"][0];
    [&one["state"]["terminated"], &one["lastState"]["terminated"]]
        .into_iter()
        .find(|end| !end.is_null())
        .cloned()
        .unwrap_or_default()
}

/// Init, a sidecar, probes, hooks and volumes: each writes a line into a folder of the host's.
fn everything(kubelet: &Kubelet<'_>) -> Result<()> {
    let told = kubelet.cri.node.dir().join("told");
    fs::create_dir_all(&told)?;
    let mounts = json!({"volumeMounts": [
        {"name": "told", "mountPath": "/told"}, {"name": "disk", "mountPath": "/disk"},
        {"name": "memory", "mountPath": "/memory"}, {"name": "about", "mountPath": "/about"},
    ]});
    let with = |more: Value| {
        let mut all = mounts.clone();
        for (key, value) in more.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        all
    };
    let serve = "trap 'echo sidecar ends >> /told/lines; exit 0' TERM; echo sidecar >> /told/lines; touch /disk/up; \
                 while :; do sleep 1 & wait $!; done";
    let main = "grep of=.test /about/labels && echo main >> /told/lines; mkdir /www; echo alive > /www/index.html; \
                httpd -p 80 -h /www; trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
    kubelet.add(
        "full",
        &json!({
            "terminationGracePeriodSeconds": 20,
            "initContainers": [
                shell("first", "echo init >> /told/lines; echo from-init > /memory/word", &mounts),
                shell("sidecar", serve, &with(json!({"restartPolicy": "Always", "startupProbe": probe("test -e /disk/up")}))),
            ],
            "containers": [shell("main", main, &with(json!({
                "readinessProbe": {"httpGet": {"port": 80, "path": "/"}, "periodSeconds": 1, "failureThreshold": 60},
                "livenessProbe": probe("test -e /disk/up"),
                "lifecycle": {
                    "postStart": exec("test \"$(cat /memory/word)\" = from-init && echo hook after start >> /told/lines"),
                    "preStop": exec("echo hook before stop >> /told/lines"),
                },
            })))],
            "volumes": [
                {"name": "told", "hostPath": {"path": told}}, {"name": "disk", "emptyDir": {}},
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
                {"name": "about", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            ],
        }),
    )?;
    let status = kubelet.wait("full", is_ready)?;
    ensure!(status["containerStatuses"][0]["restartCount"] == 0, "restarted: {status}");
    let lines = || fs::read_to_string(told.join("lines")).unwrap_or_default();
    let begun: Vec<_> = lines().lines().map(str::to_owned).collect();
    ensure!(
        begun.first().is_some_and(|line| line == "init") && begun.get(1).is_some_and(|line| line == "sidecar"),
        "{begun:?}"
    );
    ensure!(
        begun.iter().any(|line| line == "main") && begun.iter().any(|line| line == "hook after start"),
        "{begun:?}"
    );
    kubelet.remove("full")?;
    let ended = lines();
    ensure!(ended.contains("hook before stop\n") && ended.ends_with("sidecar ends\n"), "{ended}");
    Ok(())
}

/// One that eats more than it may is told so, and one that may have little runs. A RuntimeClass is an object of the API
/// server's, which puts the class's overhead into the pod: here the pod has it from the start.
fn memory(kubelet: &Kubelet<'_>, runtime: Runtime) -> Result<()> {
    let (small, overhead) = match runtime {
        Runtime::Runc => ("16Mi", json!({})),
        Runtime::Kata => ("64Mi", json!({"memory": OVERHEAD})),
    };
    let eat = "exec tail /dev/zero";
    let eater = shell("eater", eat, &limits("128Mi"));
    kubelet.add("eater", &json!({"restartPolicy": "Never", "overhead": overhead, "containers": [eater]}))?;
    let status = kubelet.wait("eater", |pod| !end(&pod["status"]).is_null())?;
    let ended = end(&status);
    ensure!(ended["reason"] == "OOMKilled" && ended["exitCode"] == 137, "{status}");
    kubelet.remove("eater")?;
    let small = shell("small", "sleep 100000", &limits(small));
    kubelet.add("small", &json!({"overhead": overhead, "containers": [small]}))?;
    kubelet.wait("small", is_ready)?;
    kubelet.remove("small")
}

#[test]
#[ignore = "minutes: `make clients` runs it"]
fn static_pods_have_all_that_a_pod_has() -> Result<()> {
    for runtime in BOTH {
        with_kubelet(runtime, |kubelet| {
            everything(kubelet)?;
            memory(kubelet, runtime)
        })
        .context(runtime.tag())?;
    }
    Ok(())
}
