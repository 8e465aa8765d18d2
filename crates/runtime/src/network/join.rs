//! Joins an interface of the pod with a device of the VM, and parts them again. What is made is in the undo journal first.

use std::os::fd::OwnedFd;
use std::path::Path;

use config::Internetworking;
use hypervisor::{Device, HostDevice, NetDevice};

use super::kind::{Attachment, Kind};
use super::scan::Link;
use super::{macvtap, tap, tcfilter};
use crate::Error;
use crate::cleanup::{Journal, Step};
use crate::host_network::{Function, NetworkNamespace, SYSFS};

/// What the configuration says about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct JoinOptions {
    pub(super) model: Internetworking,
    pub(super) queues: u32,
    pub(super) vhost: bool,
}

/// An interface that the VM has.
#[derive(Debug)]
pub(super) struct Member {
    /// As it was last told to the guest.
    pub(super) link: Link,
    /// The VM's name for its device.
    pub(super) id: String,
    /// The tap's or macvtap's number.
    pub(super) number: usize,
    /// How they are parted.
    step: Step,
}

impl Member {
    /// A device that has left its namespace, and is not looked for there.
    pub(super) fn is_away(&self) -> bool {
        matches!(self.link.kind, Kind::Physical(_))
    }
}

/// Refuses what cannot be joined, before anything is made.
pub(super) async fn check(options: JoinOptions, namespace: &NetworkNamespace, links: &[Link]) -> Result<(), Error> {
    for link in links {
        if let Kind::Physical(address) = &link.kind {
            let function = Function::new(Path::new(SYSFS), address)
                .map_err(Error::host(format!("network interface {}", link.name)))?;
            if let Some(obstacle) = function.obstacle() {
                return Err(Error::Unsupported(format!("network interface {}: {obstacle}", link.name)));
            }
        }
    }
    let place = namespace.path().display().to_string();
    let links: Vec<_> =
        links.iter().filter(|link| link.kind.attachment(options.model) != Attachment::Vfio).cloned().collect();
    namespace
        .within(|handle| async move {
            for link in links {
                if tcfilter::is_taken(&handle, &link).await? {
                    return Err(Error::WrongState(format!(
                        "network interface {} in {place} is connected to another VM already: another sandbox uses this network namespace",
                        link.name
                    )));
                }
            }
            Ok(())
        })
        .await
}

/// Joins one. On error nothing is left.
pub(super) async fn join(
    options: JoinOptions,
    namespace: &NetworkNamespace,
    link: Link,
    (id, number): (String, usize),
    journal: &Journal,
) -> Result<(Member, Device), Error> {
    let step = undo(options, namespace, &link, number)?;
    journal.push(step.clone()).map_err(Error::host("writing the undo journal"))?;
    match make(options, namespace, &link, &id, number).await {
        Ok(device) => Ok((Member { link, id, number, step }, device)),
        Err(error) => {
            undone(journal, step).await;
            Err(error)
        }
    }
}

/// Parts them; the VM has let go of the device.
pub(super) async fn part(member: Member, journal: &Journal) {
    undone(journal, member.step).await;
}

async fn undone(journal: &Journal, step: Step) {
    let journal = journal.clone();
    let outcome = tokio::task::spawn_blocking(move || journal.take_back(&step)).await;
    if let Ok(Err(error)) = outcome {
        // the end of the sandbox tries again
        tracing::warn!(%error, "cannot disconnect an interface from the VM");
    }
}

/// As Kata names them; far below the kernel's 15 characters.
fn tap_name(number: usize) -> String {
    format!("tap{number}_kata")
}

fn undo(options: JoinOptions, namespace: &NetworkNamespace, link: &Link, number: usize) -> Result<Step, Error> {
    let identity = namespace.identity().map_err(Error::host("entering the network namespace"))?;
    let (place, index) = (namespace.path().to_owned(), link.index);
    Ok(match (link.kind.attachment(options.model), &link.kind) {
        (Attachment::Vfio, Kind::Physical(address)) => {
            let function = Function::new(Path::new(SYSFS), address).map_err(Error::host(address.as_str()))?;
            Step::HostDevice { address: address.clone(), driver: function.driver() }
        }
        (Attachment::MacVtap, _) => Step::MacVtap { namespace: place, identity, name: tap_name(number), below: index },
        _ => Step::Redirection { namespace: place, identity, interface: link.name.clone(), index },
    })
}

async fn make(
    options: JoinOptions,
    namespace: &NetworkNamespace,
    link: &Link,
    id: &str,
    number: usize,
) -> Result<Device, Error> {
    if let Kind::Physical(address) = &link.kind {
        let function = Function::new(Path::new(SYSFS), address).map_err(Error::host(address.as_str()))?;
        tokio::task::spawn_blocking(move || function.take())
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(Error::host(format!("network interface {}", link.name)))?;
        return Ok(Device::Host(HostDevice { id: id.to_owned(), address: address.clone() }));
    }
    let queues = queues(options, namespace, link, number).await?;
    let vhost = if options.vhost {
        tap::vhost(Path::new(tap::VHOST), queues.len()).map_err(Error::host("detecting the kernel's vhost-net"))?
    } else {
        Vec::new()
    };
    Ok(Device::Net(NetDevice { id: id.to_owned(), mac: link.mac_text(), queues, vhost }))
}

async fn queues(
    options: JoinOptions,
    namespace: &NetworkNamespace,
    link: &Link,
    number: usize,
) -> Result<Vec<OwnedFd>, Error> {
    let link = link.clone();
    namespace
        .within(move |handle| async move {
            let name = tap_name(number);
            match link.kind.attachment(options.model) {
                Attachment::MacVtap => macvtap::connect(&handle, &link, &name, options.queues).await,
                _ => tcfilter::connect(&handle, &link, &name, options.queues).await,
            }
        })
        .await
}

/// Lets the VM's end of an interface take frames as large as the interface's.
pub(super) async fn set_mtu(namespace: &NetworkNamespace, member: &Member, mtu: u32) -> Result<(), Error> {
    if member.is_away() {
        return Ok(());
    }
    let name = tap_name(member.number);
    namespace.within(move |handle| async move { tcfilter::set_mtu(&handle, &name, mtu).await }).await
}
