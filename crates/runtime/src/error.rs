//! Everything that the shim can be told, by what a caller can do about it.

use agent_api::ttrpc;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such container or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// There already is one.
    #[error("{0}: already exists")]
    Exists(String),
    /// It is not in a state for that.
    #[error("{0}")]
    WrongState(String),
    /// The request cannot be honoured as it is.
    #[error("{0}")]
    Invalid(String),
    /// We do not do that.
    #[error("{0}")]
    Unsupported(String),
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The VMM failed.
    #[error(transparent)]
    Vm(#[from] hypervisor::Error),
    /// The VM ended while it was needed; with the last lines of its console.
    #[error("{what}: the VM has exited: {reason}{console}")]
    VmGone {
        /// What was being done.
        what: String,
        /// How the VMM ended.
        reason: String,
        /// `\nguest console:\n…` or empty.
        console: String,
        /// What it could not go on without, where that is known.
        fault: Option<hypervisor::Fault>,
    },
    /// The guest did not answer.
    #[error("{what}: the agent did not answer within {limit:?}{console}")]
    AgentSilent {
        /// What was being done.
        what: String,
        /// The limit, from the configuration.
        limit: std::time::Duration,
        /// `\nguest console:\n…` or empty.
        console: String,
    },
    /// A file system of the host did not answer.
    #[error(
        "{what}: no answer from the host's file system within {limit:?}: check its server; create_container_timeout in \
         [runtime] sets the limit"
    )]
    HostSilent {
        /// What was being done, with the path.
        what: String,
        /// The limit.
        limit: std::time::Duration,
    },
    /// The agent refused or failed.
    #[error("{message}")]
    Agent {
        /// Its code.
        code: ttrpc::Code,
        /// Its words.
        message: String,
    },
    /// A hook of the container failed.
    #[error("{name} failed: {why}")]
    Hook {
        /// Which.
        name: String,
        /// How, with what it wrote.
        why: String,
    },
    /// The host's operating system refused.
    #[error("{what}: {source}")]
    Host {
        /// What was tried, with the object's name.
        what: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// For `map_err`: names what was tried.
    pub(crate) fn host<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source: source.into() }
    }
}

impl From<agent_api::oci_convert::Unsupported> for Error {
    fn from(part: agent_api::oci_convert::Unsupported) -> Self {
        Self::Unsupported(part.to_string())
    }
}
