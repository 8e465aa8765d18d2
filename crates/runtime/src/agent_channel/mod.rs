//! The way to a VM's agent: the kernel's vsock where the host has it, else a virtio-serial port.
//!
//! Owns the choice, what the VM gets for it, and the wait until the agent can be called; not the calls.

mod serial;
mod vsock;

use std::io::ErrorKind;
use std::os::fd::OwnedFd;

use agent_api::ports;
use hypervisor::Channel;

use self::vsock::Vsock;
use crate::Error;
use crate::agent_client::{AgentClient, VmWatch};

/// What is being done while the agent is waited for, for errors.
const STARTING: &str = "starting the guest";
/// The same for a guest that may never answer.
const STARTING_ON_SERIAL: &str =
    "starting the guest (over a serial port, which our initrd alone knows: others need /dev/vhost-vsock on the host)";

/// The host's end of a channel whose other end is in no guest yet.
#[derive(Debug)]
pub(crate) enum AgentChannel {
    /// The end comes from the VM ([`hypervisor::Vm::take_channel`]).
    Serial,
    /// An address that is the VM's alone.
    Vsock(Vsock),
}

impl AgentChannel {
    /// Takes what `wanted` asks for; the device is the VM's.
    ///
    /// # Errors
    /// vsock was demanded and the host does not have it.
    pub(crate) fn open(wanted: config::AgentChannel) -> Result<(Self, Channel), Error> {
        let serial = (Self::Serial, Channel::Serial { port: ports::AGENT_SERIAL });
        if wanted == config::AgentChannel::Serial {
            return Ok(serial);
        }
        match Vsock::claim() {
            Ok((vsock, vhost)) => {
                let cid = vsock.cid();
                Ok((Self::Vsock(vsock), Channel::Vsock { vhost, cid }))
            }
            Err(error) if wanted == config::AgentChannel::Auto => {
                // a host without the device is an ordinary one
                if !matches!(&error, Error::Host { source, .. } if source.kind() == ErrorKind::NotFound) {
                    tracing::warn!(%error, "vsock does not work here: the agent is reached by a serial port");
                }
                Ok(serial)
            }
            Err(error) => Err(Error::Unsupported(format!(
                "agent_channel = \"vsock\" is set, but {error}: run `modprobe vhost_vsock` on the host, or set it to \
                 \"auto\" or \"serial\""
            ))),
        }
    }

    /// What the guest's kernel command line says of it.
    pub(crate) fn kernel_params(&self) -> String {
        match self {
            Self::Serial => format!("agent.server_addr=serial://{}", ports::AGENT_SERIAL),
            // where agents listen unless they are told otherwise
            Self::Vsock(vsock) => format!("{}={}", ports::READY_PARAM, vsock.ready_port()),
        }
    }

    /// Waits until the agent can be called, for as long as the configuration allows. `serial` is the VM's end.
    pub(crate) async fn connect(
        self,
        serial: Option<OwnedFd>,
        vm: VmWatch,
        config: &config::Agent,
    ) -> Result<AgentClient, Error> {
        let limit = config.dial_timeout;
        let what = if matches!(self, Self::Serial) { STARTING_ON_SERIAL } else { STARTING };
        let socket = async {
            match self {
                Self::Serial => {
                    let port = serial.ok_or_else(|| Error::Unsupported("the VM has no serial channel".into()))?;
                    serial::connect(port, &vm).await
                }
                Self::Vsock(vsock) => vsock.connect(&vm).await,
            }
        };
        let socket = tokio::time::timeout(limit, vm.unless_gone(STARTING, socket))
            .await
            .map_err(|_| vm.silent(what, limit))??;
        Ok(AgentClient::over(socket, vm, config.request_timeout))
    }

    /// The way to the agent of a clone: it said that it is there when its template was made, and answers once it runs.
    ///
    /// # Errors
    /// The VM has no serial channel.
    pub(crate) fn resume(serial: Option<OwnedFd>, vm: VmWatch, config: &config::Agent) -> Result<AgentClient, Error> {
        let port = serial.ok_or_else(|| Error::Unsupported("the VM has no serial channel".into()))?;
        Ok(AgentClient::over(serial::resume(port)?, vm, config.request_timeout))
    }
}
