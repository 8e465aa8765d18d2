//! Kubernetes' pods: what a CRI server's annotations say about a container. Pure.
//!
//! containerd's CRI plugin, CRI-O and cri-dockerd each have names of their own for the same three things. A container
//! without any of them (ctr, Docker, nerdctl) is a pod of its own.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxMemory, LinuxResources, Spec};

use crate::{ContainerId, Error};

/// A container's part in its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The only one.
    Alone,
    /// Made first and stopped last; holds what the others share and runs nothing of its image.
    Sandbox,
    /// Joins the pod whose sandbox has this id.
    Member(ContainerId),
}

/// One server's names.
struct Dialect {
    kind: &'static str,
    sandbox: &'static str,
    container: &'static str,
    id: &'static str,
}

const DIALECTS: [Dialect; 3] = [
    Dialect {
        kind: "io.kubernetes.cri.container-type",
        sandbox: "sandbox",
        container: "container",
        id: "io.kubernetes.cri.sandbox-id",
    },
    Dialect {
        kind: "io.kubernetes.cri-o.ContainerType",
        sandbox: "sandbox",
        container: "container",
        id: "io.kubernetes.cri-o.SandboxID",
    },
    Dialect {
        kind: "io.kubernetes.docker.type",
        sandbox: "podsandbox",
        container: "container",
        id: "io.kubernetes.sandbox.id",
    },
];

impl Role {
    /// Reads a specification's annotations.
    ///
    /// # Errors
    /// [`Error::Invalid`]: a kind that is not known, or a container that does not name its sandbox.
    pub fn of(annotations: &HashMap<String, String>) -> Result<Self, Error> {
        for dialect in &DIALECTS {
            let Some(kind) = annotations.get(dialect.kind) else { continue };
            if kind == dialect.sandbox {
                return Ok(Self::Sandbox);
            }
            if kind != dialect.container {
                return Err(Error::Invalid(format!(
                    "invalid annotation {} = {kind:.80?}: must be {:?} or {:?}",
                    dialect.kind, dialect.sandbox, dialect.container
                )));
            }
            let id = annotations.get(dialect.id).ok_or_else(|| {
                Error::Invalid(format!("missing annotation {}: a container of a pod must name its sandbox", dialect.id))
            })?;
            return ContainerId::try_from(id.as_str()).map(Self::Member);
        }
        Ok(Self::Alone)
    }

    /// Of a whole specification.
    pub(crate) fn of_spec(spec: &Spec) -> Result<Self, Error> {
        spec.annotations().as_ref().map_or(Ok(Self::Alone), Self::of)
    }
}

/// What all containers of a pod together may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes; zero is none.
    pub(crate) memory: u64,
    /// Whole processors; zero is none.
    pub(crate) vcpus: u64,
}

impl Limits {
    /// Of a pod, which its sandbox's annotations tell (containerd 1.6 and newer, Kubernetes 1.23 and newer); of a
    /// container alone, its own.
    pub(crate) fn of(spec: &Spec, role: &Role) -> Self {
        match role {
            Role::Sandbox => spec.annotations().as_ref().map(Self::annotated).unwrap_or_default(),
            Role::Alone | Role::Member(_) => Self::own(spec),
        }
    }

    fn annotated(annotations: &HashMap<String, String>) -> Self {
        let number = |name: &str| -> Option<i64> {
            annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?.trim().parse().ok()
        };
        let shares = number("cpu-shares").and_then(|shares| u64::try_from(shares).ok());
        Self {
            memory: number("memory").and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default(),
            vcpus: processors(number("cpu-quota"), number("cpu-period").and_then(|p| u64::try_from(p).ok()), shares),
        }
    }

    /// Of one container.
    pub(crate) fn own(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map(Self::of_resources).unwrap_or_default()
    }

    /// As a specification has them, or an update.
    pub(crate) fn of_resources(resources: &LinuxResources) -> Self {
        let memory = resources.memory().as_ref().and_then(LinuxMemory::limit);
        let cpu = resources.cpu().as_ref();
        Self {
            memory: memory.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default(),
            // shares say nothing about a container alone: Docker's default of 1024 is no wish for a processor
            vcpus: cpu.map_or(0, |cpu| processors(cpu.quota(), cpu.period(), None)),
        }
    }
}

/// The kernel's, microseconds: of a quota that has none of its own.
const USUAL_PERIOD: u64 = 100_000;

/// A quota below zero is kubelet's static CPU manager: whole processors, told as shares of 1024 each.
fn processors(quota: Option<i64>, period: Option<u64>, shares: Option<u64>) -> u64 {
    match (quota, period.filter(|period| *period > 0).unwrap_or(USUAL_PERIOD)) {
        (Some(quota), _) if quota < 0 => shares.map_or(0, |shares| shares.div_ceil(1024)),
        (Some(quota), period) => quota.unsigned_abs().div_ceil(period),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_server_is_understood() {
        assert_eq!(Role::of(&annotations(&[("x", "y")])).expect("alone"), Role::Alone);
        for dialect in &DIALECTS {
            let sandbox = annotations(&[(dialect.kind, dialect.sandbox)]);
            assert_eq!(Role::of(&sandbox).expect("a sandbox"), Role::Sandbox);
            let member = annotations(&[(dialect.kind, dialect.container), (dialect.id, "s1")]);
            let id = ContainerId::try_from("s1").expect("an id");
            assert_eq!(Role::of(&member).expect("a member"), Role::Member(id));
            let error = Role::of(&annotations(&[(dialect.kind, dialect.container)])).expect_err("no sandbox");
            assert!(error.to_string().contains(dialect.id), "{error}");
            let error = Role::of(&annotations(&[(dialect.kind, "pod")])).expect_err("no kind");
            assert!(error.to_string().contains(dialect.kind) && error.to_string().contains("\"pod\""), "{error}");
            let bad = annotations(&[(dialect.kind, dialect.container), (dialect.id, "../s1")]);
            Role::of(&bad).expect_err("no name");
        }
    }

    fn limits(pairs: &[(&str, &str)]) -> Limits {
        Limits::annotated(&annotations(pairs))
    }

    #[test]
    fn a_pods_size_is_in_its_sandboxs_annotations() {
        let all = [
            ("io.kubernetes.cri.sandbox-memory", "1073741824"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "250000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-cpu-shares", "4096"),
        ];
        assert_eq!(limits(&all), Limits { memory: 1 << 30, vcpus: 3 });
        let pinned = [("io.kubernetes.cri.sandbox-cpu-quota", "-1"), all[3]];
        assert_eq!(limits(&pinned).vcpus, 4);
        assert_eq!(limits(&[("io.kubernetes.cri.sandbox-cpu-quota", "150000")]).vcpus, 2);
        assert_eq!(limits(&[]), Limits::default());
        assert_eq!(limits(&[("io.kubernetes.cri.sandbox-memory", "-5")]).memory, 0);
    }

    proptest! {
        #[test]
        fn any_text_is_a_size(memory in ".*", quota in any::<i64>(), period in any::<i64>(), shares in any::<i64>()) {
            limits(&[
                ("io.kubernetes.cri.sandbox-memory", &memory),
                ("io.kubernetes.cri.sandbox-cpu-quota", &quota.to_string()),
                ("io.kubernetes.cri.sandbox-cpu-period", &period.to_string()),
                ("io.kubernetes.cri.sandbox-cpu-shares", &shares.to_string()),
            ]);
        }
    }
}
