//! Where the two sides meet.

/// vsock port of the agent's ttRPC server.
pub const AGENT_VSOCK: u32 = 1024;
/// vsock port of the agent's log, when the kernel command line has `agent.log_vport=1025`.
pub const LOG_VSOCK: u32 = 1025;
/// vsock port of the debug console.
pub const DEBUG_CONSOLE_VSOCK: u32 = 1026;

/// Name of the virtio-serial port that carries ttRPC where the host has no vhost-vsock.
///
/// The guest finds it in `/sys/class/virtio-ports/*/name`.
pub const AGENT_SERIAL: &str = "org.katacontainers.agent.0";

/// What the agent writes first on a serial port, and what ttRPC frames follow: the host's signal that the guest is up.
///
/// A serial port has no connection set-up, so this line stands for it.
pub const SERIAL_HELLO: &[u8] = b"KATA-AGENT-READY\n";

/// Kernel parameter: a vsock port on the host (CID 2) to which the agent connects once its server listens.
///
/// The connection carries no data; that it was made is the signal. Other agents do not know it.
pub const READY_PARAM: &str = "agent.ready_vport";
