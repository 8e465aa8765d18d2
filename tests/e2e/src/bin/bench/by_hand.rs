//! What somebody sets up by hand instead of the product, and what the product is compared with: a bare QEMU of the
//! product's size, and a virtiofsd.

use crate::floor;
use anyhow::{Context as _, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::{
    fs,
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::net::UnixListener,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

/// The program.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// The product's size of a guest.
pub(crate) const SIZE: &str = "512M";

/// The product's kind of memory, which virtio-fs needs; to copy from and to it takes longer than without a name.
pub(crate) fn shared_memory() -> String {
    format!("memory-backend-memfd,id=mem,size={SIZE},share=on")
}

/// What all of them begin with; `memory` is an object with the id `mem`.
pub(crate) fn arguments(memory: &str) -> Vec<String> {
    let machine = format!("{},memory-backend=mem", floor::MACHINE);
    let values = [
        ("-machine", machine.as_str()),
        ("-accel", floor::accelerator()),
        ("-cpu", floor::PROCESSOR),
        ("-smp", "1"),
        ("-m", SIZE),
        ("-object", memory),
        ("-display", "none"),
    ];
    let mut all: Vec<_> = values.iter().flat_map(|(name, value)| [*name, value]).map(str::to_owned).collect();
    all.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    all
}

/// The kernel's command line. A guest under TCG would measure the rate of its time stamp counter wrongly; the product
/// knows it.
pub(crate) fn parameters() -> String {
    let known = fs::read_to_string("/run/kata-containers/tsc-khz");
    let counter = known.map(|rate| format!(" tsc_early_khz={}", rate.trim())).unwrap_or_default();
    format!("{}{counter}", floor::PARAMETERS)
}

/// A virtiofsd, which ends with its only client.
pub(crate) struct Daemon(Child);

impl Daemon {
    /// It listens at `socket` before it is there, so nobody waits for it; its arguments name the descriptor for that.
    pub(crate) fn start(
        program: impl AsRef<Path>,
        socket: &Path,
        arguments: impl FnOnce(RawFd) -> Vec<String>,
    ) -> Result<Self> {
        let _ = fs::remove_file(socket);
        let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let mut command = Command::new(program.as_ref());
        command.args(arguments(listener.as_raw_fd()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| program.as_ref().display().to_string())?))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// When its client is gone.
    pub(crate) fn wait(mut self) -> Result<()> {
        self.0.wait().map(drop).context("virtiofsd")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
