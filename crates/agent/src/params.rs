//! The kernel command line, as far as it speaks to the agent. Kata's names.

use std::time::Duration;

use crate::log::Level;

/// Where the agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    Vsock { port: u32 },
    Serial { port: String },
}

/// What the host asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Params {
    pub(crate) log: Level,
    pub(crate) address: Address,
    /// Host port to which one connection is made when the server listens; 0 is none.
    pub(crate) ready_vport: u32,
    /// vsock port on which the log is given to whoever connects; 0 is none.
    pub(crate) log_vport: u32,
    /// How long a plugged device may take to appear.
    pub(crate) hotplug_timeout: Duration,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            log: Level::Info,
            address: Address::Vsock { port: agent_api::ports::AGENT_VSOCK },
            ready_vport: 0,
            log_vport: 0,
            hotplug_timeout: Duration::from_secs(3),
        }
    }
}

impl Params {
    pub(crate) fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(line: &str) -> Self {
        let mut params = Self::default();
        for word in line.split_ascii_whitespace() {
            let Some((name, value)) = word.split_once('=') else { continue };
            match name {
                "agent.log" => {
                    params.log = match value {
                        "fatal" | "panic" | "critical" | "error" => Level::Error,
                        "warn" | "warning" => Level::Warn,
                        "debug" | "trace" => Level::Debug,
                        _ => Level::Info,
                    };
                }
                "agent.server_addr" => match address(value) {
                    Some(address) => params.address = address,
                    None => crate::log::warn(&format!(
                        "kernel parameter agent.server_addr={value:.100} is ignored: must be vsock://CID:PORT or serial://PORT"
                    )),
                },
                agent_api::ports::READY_PARAM => params.ready_vport = value.parse().unwrap_or_default(),
                "agent.log_vport" => params.log_vport = value.parse().unwrap_or_default(),
                "agent.hotplug_timeout" => match value.parse() {
                    Ok(seconds @ 1..=3600) => params.hotplug_timeout = Duration::from_secs(seconds),
                    _ => crate::log::warn(&format!(
                        "kernel parameter agent.hotplug_timeout={value:.20} is ignored: must be from 1 to 3600 seconds"
                    )),
                },
                _ => {}
            }
        }
        params
    }
}

fn address(url: &str) -> Option<Address> {
    if let Some(port) = url.strip_prefix("serial://") {
        return (!port.is_empty()).then(|| Address::Serial { port: port.to_owned() });
    }
    let port = url.strip_prefix("vsock://")?.rsplit(':').next()?.parse().ok()?;
    Some(Address::Vsock { port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn katas_parameters() {
        assert_eq!(Params::parse("quiet agent.log=debug").log, Level::Debug);
        assert_eq!(Params::parse("agent.hotplug_timeout=20").hotplug_timeout, Duration::from_secs(20));
        assert_eq!(Params::parse("agent.hotplug_timeout=-1").hotplug_timeout, Duration::from_secs(3));
        let serial = Params::parse("agent.server_addr=serial://org.x.0").address;
        assert_eq!(serial, Address::Serial { port: "org.x.0".into() });
        assert_eq!(Params::parse("agent.server_addr=vsock://-1:1055").address, Address::Vsock { port: 1055 });
        assert_eq!(Params::parse("agent.server_addr=http://x").address, Address::Vsock { port: 1024 });
    }

    proptest! {
        #[test]
        fn any_line_is_survived(line in ".*") {
            let _ = Params::parse(&line);
        }
    }
}
