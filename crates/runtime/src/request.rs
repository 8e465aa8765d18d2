//! What containerd says of a container, before anything of it is there.

use std::path::PathBuf;

use crate::ContainerId;

/// What containerd asks for with `Create`.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Its id.
    pub id: ContainerId,
    /// The folder with `config.json`.
    pub bundle: PathBuf,
    /// The root file system; empty means `root.path` of the specification.
    pub rootfs: Vec<RootfsMount>,
    /// Where its streams go.
    pub stdio: Stdio,
}

/// A mount as containerd describes it (`types.Mount`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system type, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// As in fstab(5).
    pub options: Vec<String>,
}

/// Named pipes, or empty for none; an output may also be a log URI.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Read by the process.
    pub stdin: String,
    /// Written by the process; everything, when there is a terminal.
    pub stdout: String,
    /// Written by the process.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}
