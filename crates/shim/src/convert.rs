//! containerd's messages ⇄ the runtime's types, and nothing else.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::{ExecProcessRequest, Status as WireStatus, UpdateTaskRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageFull};
use containerd_shim_protos::ttrpc::{self, Code};
use runtime::{ContainerId, Error, ExecId, ProcessRef, Status};

pub(crate) type Rpc<T> = ttrpc::Result<T>;

/// What containerd shall see of an error: the code decides what clients do, the text is what a person reads.
pub(crate) fn status(error: &Error) -> ttrpc::Error {
    let code = match error {
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::Exists(_) => Code::ALREADY_EXISTS,
        Error::WrongState(_) => Code::FAILED_PRECONDITION,
        Error::Invalid(_) | Error::Config(_) => Code::INVALID_ARGUMENT,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::AgentSilent { .. } | Error::HostSilent { .. } => Code::DEADLINE_EXCEEDED,
        Error::Agent { code, .. } => *code,
        _ => Code::UNKNOWN,
    };
    rpc_error(code, error.to_string())
}

pub(crate) fn rpc_error(code: Code, text: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text.into()))
}

/// Names a process as the Task API does: an empty exec id is the container's first.
pub(crate) fn process(container: &str, exec: &str) -> Rpc<ProcessRef> {
    let container = ContainerId::try_from(container).map_err(|error| status(&error))?;
    let exec = match exec {
        "" => None,
        exec => Some(ExecId::try_from(exec).map_err(|error| status(&error))?),
    };
    Ok(ProcessRef { container, exec })
}

pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Default::default() }
}

pub(crate) fn wire_status(status: Status) -> WireStatus {
    match status {
        Status::Created => WireStatus::CREATED,
        Status::Running => WireStatus::RUNNING,
        Status::Paused => WireStatus::PAUSED,
        Status::Stopped => WireStatus::STOPPED,
    }
}

/// The configuration file that the runtime's options name. Field 2 in `runtimeoptions.v1.Options`, and in the older
/// `cri.runtimeoptions.v1.Options`; runc's options are passed over.
pub(crate) fn config_path(options: Option<&Any>) -> Option<String> {
    let any = options?;
    if !any.type_url.ends_with("runtimeoptions.v1.Options") {
        return None;
    }
    // the same field numbers as runc's `Options` has for other things, so only unknown fields are looked at
    let unknown =
        containerd_shim_protos::protobuf::well_known_types::empty::Empty::parse_from_bytes(&any.value).ok()?;
    let field = unknown.special_fields.unknown_fields().get(2)?;
    match field {
        containerd_shim_protos::protobuf::UnknownValueRef::LengthDelimited(bytes) if !bytes.is_empty() => {
            String::from_utf8(bytes.to_vec()).ok()
        }
        _ => None,
    }
}

pub(crate) fn exec_spec(request: &ExecProcessRequest) -> Rpc<oci_spec::runtime::Process> {
    let any = request
        .spec
        .as_ref()
        .ok_or_else(|| rpc_error(Code::INVALID_ARGUMENT, "the exec request has no process specification"))?;
    runtime::process_from_json(&any.value).map_err(|error| {
        rpc_error(Code::INVALID_ARGUMENT, format!("invalid process specification of the exec request: {error}"))
    })
}

/// New limits: the OCI type as JSON in the request's `Any`.
pub(crate) fn limits(request: &UpdateTaskRequest) -> Rpc<oci_spec::runtime::LinuxResources> {
    let any = request
        .resources
        .as_ref()
        .ok_or_else(|| rpc_error(Code::INVALID_ARGUMENT, "the update request has no resources"))?;
    serde_json::from_slice(&any.value)
        .map_err(|error| rpc_error(Code::INVALID_ARGUMENT, format!("invalid resources of the update request: {error}")))
}

pub(crate) fn any(message: &impl MessageFull) -> Rpc<Any> {
    let value = message.write_to_bytes().map_err(|error| rpc_error(Code::INTERNAL, error.to_string()))?;
    Ok(Any { type_url: descriptor_name(message), value, ..Default::default() })
}

fn descriptor_name<M: MessageFull>(_: &M) -> String {
    M::descriptor().full_name().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_file_is_found_in_the_options() {
        // field 2, length-delimited
        let value = [vec![0x12, 4], b"/etc".to_vec()].concat();
        let any = |url: &str| Any { type_url: url.into(), value: value.clone(), ..Default::default() };
        for url in ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"] {
            assert_eq!(config_path(Some(&any(url))), Some("/etc".into()));
        }
        assert_eq!(config_path(Some(&any("containerd.runc.v1.Options"))), None);
        assert_eq!(config_path(None), None);
    }
}
