//! The pod's network: what CNI made in a namespace of the host, brought into the VM as it is.
//!
//! `scan` reads, `tcfilter` joins a link with a tap, `guest` tells the agent. Everything is netlink; no program is run.
//! A namespace without an interface costs one look, a container without a namespace path not even that.

mod forward;
mod guest;
mod netns;
mod scan;
mod steer;
mod tap;
mod tcfilter;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use config::Internetworking;
use hypervisor::NetDevice;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

pub(crate) use forward::Forwarding;
pub(crate) use guest::configure;
use netns::{Identity, NetworkNamespace};
use scan::{Found, Kind, Link};

use crate::Error;
use crate::agent_client::AgentClient;
use crate::cleanup::{RunDir, Step};

/// What the VM gets, and what the guest is told.
#[derive(Debug, Default)]
pub(crate) struct PodNetwork {
    pub(crate) found: Found,
    pub(crate) devices: Vec<NetDevice>,
}

/// Refuses, or connects every interface of the pod's namespace. What can be refused is refused before anything is made.
pub(crate) async fn connect(config: &config::Config, spec: &Spec, run: &mut RunDir) -> Result<PodNetwork, Error> {
    let Some(path) = namespace_path(spec) else { return Ok(PodNetwork::default()) };
    let namespace =
        NetworkNamespace::open(&path).map_err(Error::host(format!("network namespace {}", path.display())))?;
    let about = || Error::host(format!("network namespace {}", path.display()));
    if namespace.is_our_own().map_err(about())? {
        return Err(Error::Unsupported(format!(
            "{} is the host's network, which is not possible in a virtual machine: give the container a network namespace \
             of its own",
            path.display()
        )));
    }
    if config.runtime.internetworking == Internetworking::None {
        return Ok(PodNetwork::default());
    }
    let found = namespace.within(|handle| async move { scan::scan(&handle).await }).await?;
    if found.links.is_empty() {
        return Ok(PodNetwork::default());
    }
    if let Some(pid) = namespace.user().map_err(about())? {
        return Err(Error::WrongState(format!(
            "network namespace {} is used by process {pid}: its traffic would go to the virtual machine, give the pod a \
             namespace of its own",
            path.display()
        )));
    }
    let devices = join(config, &namespace, &found, run).await?;
    Ok(PodNetwork { found, devices })
}

async fn join(
    config: &config::Config,
    namespace: &NetworkNamespace,
    found: &Found,
    run: &mut RunDir,
) -> Result<Vec<NetDevice>, Error> {
    let links = found.links.clone();
    let place = namespace.path().display().to_string();
    namespace
        .within(|handle| async move {
            for link in links.iter().filter(|link| link.kind != Kind::Tap) {
                if tcfilter::is_taken(&handle, link).await? {
                    return Err(Error::WrongState(format!(
                        "interface {} in {place} is redirected already: another sandbox uses this network namespace",
                        link.name
                    )));
                }
            }
            Ok(())
        })
        .await?;
    let identity = namespace.identity().map_err(Error::host("the network namespace"))?;
    for link in found.links.iter().filter(|link| link.kind != Kind::Tap) {
        let step = Step::Redirection { namespace: namespace.path().into(), identity, interface: link.name.clone() };
        run.push(step).map_err(Error::host("the undo journal"))?;
    }
    let (links, queues) = (found.links.clone(), config.hypervisor.network_queues);
    let taps = namespace
        .within(move |handle| async move {
            let mut taps: Vec<Vec<OwnedFd>> = Vec::new();
            for (number, link) in links.iter().enumerate() {
                taps.push(match link.kind {
                    Kind::Tap => tap::open(&link.name, queues).map_err(Error::host(format!("tap {}", link.name)))?,
                    _ => tcfilter::connect(&handle, link, &tap_name(number), queues).await?,
                });
            }
            Ok(taps)
        })
        .await?;
    let device = |(link, queues): (&Link, Vec<OwnedFd>)| NetDevice { mac: link.mac_text(), queues };
    Ok(found.links.iter().zip(taps).map(device).collect())
}

/// As Kata names them; far below the kernel's 15 characters.
fn tap_name(number: usize) -> String {
    format!("tap{number}_kata")
}

/// Lets ports of the pod be reached from inside its namespace; `None` for a pod without one.
pub(crate) fn forward(spec: &Spec, agent: &AgentClient) -> Option<Forwarding> {
    Some(forward::start(namespace_path(spec)?, agent.clone()))
}

fn namespace_path(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|one| one.typ() == LinuxNamespaceType::Network)?.path().clone()
}

/// Undoes the redirection of one interface, unless its namespace is gone or another one now.
pub(crate) fn disconnect(path: &Path, identity: Identity, interface: &str) -> std::io::Result<()> {
    let namespace = match NetworkNamespace::open(path) {
        Ok(namespace) => namespace,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if namespace.identity()? != identity {
        return Ok(());
    }
    let interface = interface.to_owned();
    namespace
        .within_blocking(|handle| async move { tcfilter::disconnect(&handle, &interface).await })
        .map_err(std::io::Error::other)
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// For `map_err`: names what netlink refused.
fn failed(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    let what = what.into();
    move |error| {
        let source = match &error {
            rtnetlink::Error::NetlinkError(message) if message.code.is_some() => {
                std::io::Error::from_raw_os_error(-message.raw_code())
            }
            _ => std::io::Error::other(error),
        };
        Error::Host { what, source }
    }
}
