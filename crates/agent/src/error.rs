//! What a call can be refused with, and its ttRPC code.

use std::any::Any;
use std::fmt::Display;
use std::io;

use agent_api::ttrpc::{self, Code};
use nix::errno::Errno;

/// A refused or failed call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}: not found")]
    NotFound(String),
    #[error("{0}: already exists")]
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
    pub(crate) fn failed<E: Display + 'static>(what: impl Display) -> impl FnOnce(E) -> Self {
        move |error| Self::Failed(format!("{what}: {}", words(&error)))
    }
}

/// An error's words; of a system call's the C library's alone, without number or constant, as runc's users know them.
pub(crate) fn words<E: Display + 'static>(error: &E) -> String {
    let any = error as &dyn Any;
    let errno = any
        .downcast_ref::<Errno>()
        .copied()
        .or_else(|| any.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error).map(Errno::from_raw));
    errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_lowercase())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_system_calls_are_in_words() {
        let want = "not a directory";
        assert_eq!(words(&Errno::ENOTDIR), want);
        assert_eq!(words(&io::Error::from(Errno::ENOTDIR)), want);
        assert_eq!(words(&"mkdir: no".to_owned()), "mkdir: no");
    }
}
