//! The drivers that a configuration can choose. Each has a file here with its own settings and their keys; settings that every
//! driver has are [`crate::Hypervisor`].

mod qemu;

pub use qemu::{Accelerator, Qemu};

use crate::key::Key;

/// A driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Driver {
    /// `[hypervisor.qemu]`.
    #[default]
    Qemu,
}

impl Driver {
    /// All.
    pub const ALL: &'static [Self] = &[Self::Qemu];
    /// QEMU alone.
    pub(crate) const QEMU: &'static [Self] = &[Self::Qemu];

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
        }
    }

    /// The driver of that name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|driver| driver.name() == name)
    }
}

/// The keys of the drivers' own settings.
pub(crate) static ROWS: &[&[Key]] = &[qemu::ROWS];
