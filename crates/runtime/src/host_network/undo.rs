//! What the undo journal does about the network. Nothing there is success: an undo runs again and again.

use std::io;
use std::path::Path;

use super::netns::{Identity, NetworkNamespace};
use super::physical::Function;
use super::{SYSFS, links};

/// The namespace, unless it is gone or another one now.
fn open(path: &Path, identity: Identity) -> io::Result<Option<NetworkNamespace>> {
    let namespace = match NetworkNamespace::open(path) {
        Ok(namespace) => namespace,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok((namespace.identity()? == identity).then_some(namespace))
}

/// Undoes the redirection of one interface.
pub(crate) fn redirection(path: &Path, identity: Identity, index: u32) -> io::Result<()> {
    let Some(namespace) = open(path, identity)? else { return Ok(()) };
    namespace
        .within_blocking(move |handle| async move { links::remove_redirection(&handle, index).await })
        .map_err(io::Error::other)
}

/// Removes a macvtap.
pub(crate) fn macvtap(path: &Path, identity: Identity, name: &str, below: u32) -> io::Result<()> {
    let Some(namespace) = open(path, identity)? else { return Ok(()) };
    let name = name.to_owned();
    namespace
        .within_blocking(move |handle| async move { links::remove_macvtap(&handle, &name, below).await })
        .map_err(io::Error::other)
}

/// Gives a PCI device back to its driver.
pub(crate) fn host_device(address: &str, driver: Option<&str>) -> io::Result<()> {
    Function::new(Path::new(SYSFS), address)?.give_back(driver)
}
