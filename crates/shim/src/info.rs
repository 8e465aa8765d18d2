//! What the shim says of itself when containerd asks (`-info`): its name, and what it can do in the words of the OCI's
//! features document. containerd 2.x refuses a pod what its runtime does not name there. CRI-O asks for the document alone
//! (`features`), as of any runtime.

use anyhow::Result;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use runtime::agent_api::{features as guest, mount_options};
use serde_json::{Value, json};

use crate::capabilities;

/// How containerd names the document's type.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer, a `RuntimeInfo`.
pub(crate) fn answer() -> Result<Vec<u8>> {
    let info = RuntimeInfo {
        name: "io.containerd.kata.v2".into(),
        version: MessageField::some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() }),
        annotations: [(capabilities::ANNOTATION.to_owned(), capabilities::annotation())].into(),
        features: MessageField::some(Any {
            type_url: FEATURES.into(),
            value: features().to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

/// What of a specification is obeyed, by the host's part or by the guest's.
pub(crate) fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.1.0",
        // createContainer would have to be a program of the host's in the guest
        "hooks": ["prestart", "createRuntime", "startContainer", "poststart", "poststop"],
        "mountOptions": mount_options::NAMES.as_slice(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": guest::CAPABILITIES.as_slice(),
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": guest::SECCOMP_ACTIONS.as_slice(),
                "operators": guest::SECCOMP_OPERATORS.as_slice(),
                "archs": guest::SECCOMP_ARCHS.as_slice(),
                "knownFlags": guest::SECCOMP_FLAGS.as_slice(),
                "supportedFlags": guest::SECCOMP_FLAGS.as_slice(),
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
            "netDevices": {"enabled": false},
        },
        // annotations that change the configuration are not looked at
        "potentiallyUnsafeConfigAnnotations": [],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_features_are_an_oci_document() {
        let info = RuntimeInfo::parse_from_bytes(&answer().expect("made")).expect("parsed");
        let features: oci_spec::runtime::Features = serde_json::from_slice(&info.features.value).expect("features");
        let options = features.mount_options().as_ref().expect("options");
        assert!(options.iter().any(|option| option == "rro"), "{options:?}");
        assert_eq!(info.features.type_url, FEATURES);
        let linux = features.linux().as_ref().expect("linux");
        assert!(linux.namespaces().is_some() && linux.capabilities().is_some() && linux.seccomp().is_some());
    }
}
