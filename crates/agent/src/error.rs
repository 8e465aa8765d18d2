//! What a call can be refused with, and its ttRPC code.

use agent_api::ttrpc::{self, Code};

/// A refused or failed call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0} not found")]
    NotFound(String),
    #[error("{0} already exists")]
    Exists(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    State(String),
    #[error("{0} is not supported by this agent")]
    Unsupported(String),
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// For `map_err`: names what was tried.
    pub(crate) fn failed<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Self {
        move |error| Self::Failed(format!("{what}: {error}"))
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::State(_) => Code::FAILED_PRECONDITION,
            Error::Unsupported(_) => Code::UNIMPLEMENTED,
            // what runc's failures are to containerd
            Error::Failed(_) => Code::UNKNOWN,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.to_string()))
    }
}
