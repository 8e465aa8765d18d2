//! Kernel settings of a pod, beside runc.

use anyhow::{Result, ensure};
use e2e::{
    BOTH, NodeSetup, Runtime,
    cri::{Network, with_cri},
};
use serde_json::json;

const FOREVER: [&str; 2] = ["sleep", "100000"];

#[test]
fn a_pods_settings_are_its_containers() -> Result<()> {
    let settings = [
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.msgmax", "4096"),
        ("fs.mqueue.msg_max", "100"),
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("net.ipv4.ip_local_port_range", "40000 50000"),
    ];
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        for runtime in BOTH {
            let sysctls: serde_json::Map<_, _> =
                settings.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
            let pod = cri.run_pod(runtime, runtime.tag(), &json!({"linux": {"sysctls": sysctls}}))?;
            let one = cri.run(&pod, "one", &FOREVER, &json!({}))?;
            for (name, value) in settings {
                let path = name.replace('.', "/");
                let seen = cri.sh(&one, &format!("cat /proc/sys/{path}"))?;
                let seen = seen.split_whitespace().collect::<Vec<_>>().join(" ");
                ensure!(seen == value, "{runtime:?}: {name} is {seen:?} instead of {value:?}");
            }
            cri.remove(&pod)?;
        }
        // what is not the pod's alone
        let node = json!({"linux": {"sysctls": {"vm.swappiness": "1"}}});
        let config = cri.pod_config("node", &node)?.display().to_string();
        for runtime in BOTH {
            let refused = cri.crictl(["runp", "--runtime", runtime.tag(), &config]).output()?;
            let told = |words: &str| refused.stderr.contains(words);
            let why = told("vm.swappiness") && told("is not in a separate kernel namespace");
            ensure!(refused.code != 0 && why, "{runtime:?}: {}", refused.stderr);
        }
        let after = cri.run_pod(Runtime::Kata, "after", &json!({}))?;
        cri.remove(&after)
    })
}
