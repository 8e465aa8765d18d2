//! The two runtimes that are compared, and the arguments common to all runs.

/// A containerd runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The reference: containers on the host's kernel.
    Runc,
    /// The product.
    Kata,
}

/// Both, the reference first.
pub const BOTH: [Runtime; 2] = [Runtime::Runc, Runtime::Kata];

impl Runtime {
    /// The name given to `ctr --runtime`.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Runc => "io.containerd.runc.v2",
            Runtime::Kata => "io.containerd.kata.v2",
        }
    }

    /// A short word for ids of containers and for messages.
    pub fn tag(self) -> &'static str {
        match self {
            Runtime::Runc => "runc",
            Runtime::Kata => "kata",
        }
    }
}
