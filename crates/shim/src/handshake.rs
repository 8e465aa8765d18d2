//! The words between containerd and a shim's `start`: three generations of them.
//!
//! containerd 1.6 and 1.7 read a bare address; 2.0 to 2.2 read it too, and JSON; 2.3 writes its parameters as protobuf on
//! stdin and reads protobuf. The bare address is understood by all that do not speak protobuf, so nothing else is needed
//! for them (containerd issue 13763 is what happens when a shim answers in a form that was not asked for).

use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use anyhow::{Context, Result};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;

use crate::capabilities;

/// Largest input, bytes.
const LIMIT: u64 = 4 << 20;

/// What `start` was told, and how it is to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Handshake {
    /// containerd's ttRPC socket, for events.
    pub(crate) ttrpc_address: String,
    /// Where containerd wants the shims' sockets; only 2.3 and later say.
    pub(crate) socket_dir: Option<PathBuf>,
    protobuf: bool,
}

/// Reads stdin (nothing, runtime options, or 2.3's parameters).
pub(crate) fn read(id: &str, namespace: &str) -> Result<Handshake> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(LIMIT).read_to_end(&mut input).context("reading start parameters")?;
    }
    let fallback = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    Ok(understand(&input, id, namespace, fallback))
}

fn understand(input: &[u8], id: &str, namespace: &str, fallback: String) -> Handshake {
    // runtime options (an `Any`) decode as parameters too, with a type URL for an id; so the id must be ours
    let params = BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == id && params.namespace == namespace);
    match params {
        Some(params) => {
            let told = params.containerd_ttrpc_address;
            Handshake {
                ttrpc_address: if told.is_empty() { fallback } else { told },
                socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()).map(PathBuf::from),
                protobuf: true,
            }
        }
        None => Handshake { ttrpc_address: fallback, socket_dir: None, protobuf: false },
    }
}

impl Handshake {
    /// The answer, in the form that was asked for.
    pub(crate) fn answer(&self, address: &str) -> Result<Vec<u8>> {
        if !self.protobuf {
            return Ok(address.as_bytes().to_vec());
        }
        let mut result =
            BootstrapResult { version: 3, address: address.into(), protocol: "ttrpc".into(), ..Default::default() };
        capabilities::add(&mut result).context("encoding the answer")?;
        result.write_to_bytes().context("encoding the answer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    #[test]
    fn each_generation_gets_its_answer() {
        let options = Any { type_url: "runtimeoptions.v1.Options".into(), value: b"x".to_vec(), ..Default::default() };
        for old in [Vec::new(), options.write_to_bytes().expect("encoded"), b"{\"json\": 1}".to_vec()] {
            let handshake = understand(&old, "c1", "default", "/ttrpc".into());
            assert_eq!(handshake.ttrpc_address, "/ttrpc");
            assert_eq!(handshake.socket_dir, None);
            assert_eq!(handshake.answer("unix:///a").expect("answered"), b"unix:///a");
        }
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/new".into(),
            socket_dir: Some("/run/user/s".into()),
            ..Default::default()
        };
        let handshake = understand(&params.write_to_bytes().expect("encoded"), "c1", "default", String::new());
        assert_eq!(handshake.ttrpc_address, "/new");
        assert_eq!(handshake.socket_dir, Some("/run/user/s".into()));
        let answer =
            BootstrapResult::parse_from_bytes(&handshake.answer("unix:///a").expect("answered")).expect("decoded");
        assert_eq!((answer.version, answer.address.as_str(), answer.protocol.as_str()), (3, "unix:///a", "ttrpc"));
    }
}
