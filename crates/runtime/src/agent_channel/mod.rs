//! The way to a VM's agent: vsock where host and hypervisor have it, else a virtio-serial port.
//!
//! Owns the choice among those that the driver has, and the wait until the agent can be called; not the calls, nor the end
//! points, which are the driver's.

mod hybrid;
mod serial;
mod vsock;

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::Path;

use agent_api::ports;
use hypervisor::{Channel, ChannelKind, ChannelNames, Hypervisor};

use self::hybrid::Hybrid;
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
    /// A socket of the VMM's.
    Hybrid(Hybrid),
}

impl AgentChannel {
    /// Takes what `wanted` asks for, among what the driver has; the end point is the VM's. Sockets are made in `folder`.
    ///
    /// # Errors
    /// A way was demanded that the host or the driver does not have.
    pub(crate) fn open(
        driver: &dyn Hypervisor,
        wanted: config::AgentChannel,
        folder: &Path,
    ) -> Result<(Self, Channel), Error> {
        let wants = |kind: ChannelKind| match wanted {
            config::AgentChannel::Auto => true,
            config::AgentChannel::Serial => kind == ChannelKind::Serial,
            config::AgentChannel::Vsock => kind != ChannelKind::Serial,
        };
        let names = ChannelNames { serial_port: ports::AGENT_SERIAL, folder };
        let mut last = None;
        for kind in driver.capabilities().channels.iter().copied().filter(|kind| wants(*kind)) {
            let opened = driver.open_channel(kind, names).map_err(Error::from);
            match opened.and_then(|channel| Ok((Self::of(&channel)?, channel))) {
                Ok(opened) => return Ok(opened),
                Err(error) => {
                    // a host without the device is an ordinary one
                    if wanted == config::AgentChannel::Auto && !is_missing(&error) {
                        tracing::warn!(%error, ?kind, "this kind of channel to the agent does not work on this host: trying the next");
                    }
                    last = Some(error);
                }
            }
        }
        let why =
            last.map_or_else(|| format!("hypervisor {} has no such channel", driver.name()), |error| error.to_string());
        Err(match wanted {
            config::AgentChannel::Vsock => Error::Unsupported(format!(
                "agent_channel = \"vsock\" is set, but {why}: run `modprobe vhost_vsock` on the host, or set it to \
                 \"auto\" or \"serial\""
            )),
            _ => Error::Unsupported(format!("no way to the agent: {why}: set agent_channel = \"auto\"")),
        })
    }

    /// The host's side of a channel.
    fn of(channel: &Channel) -> Result<Self, Error> {
        Ok(match channel {
            Channel::Serial { .. } => Self::Serial,
            Channel::Vsock { cid, .. } => Self::Vsock(Vsock::listen(*cid)?),
            Channel::HybridVsock { socket, .. } => Self::Hybrid(Hybrid::listen(socket)?),
        })
    }

    /// What the guest's kernel command line says of it.
    pub(crate) fn kernel_params(&self) -> String {
        match self {
            Self::Serial => format!("agent.server_addr=serial://{}", ports::AGENT_SERIAL),
            // where agents listen unless they are told otherwise
            Self::Vsock(vsock) => format!("{}={}", ports::READY_PARAM, vsock.ready_port()),
            Self::Hybrid(_) => format!("{}={}", ports::READY_PARAM, hybrid::READY_PORT),
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
                    let port = serial
                        .ok_or_else(|| Error::Unsupported("the VMM gave no serial channel to the agent".into()))?;
                    serial::connect(port, &vm).await
                }
                Self::Vsock(vsock) => vsock.connect(&vm).await,
                Self::Hybrid(hybrid) => hybrid.connect(&vm).await,
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
        let port = serial.ok_or_else(|| Error::Unsupported("the VMM gave no serial channel to the agent".into()))?;
        Ok(AgentClient::over(serial::resume(port)?, vm, config.request_timeout))
    }
}

/// The host does not have it.
fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Vm(hypervisor::Error::System { source, .. }) if source.kind() == ErrorKind::NotFound)
}
