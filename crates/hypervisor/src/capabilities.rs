//! What the VMs of a driver can have: plain data, for choices that are made before there is a VM.

use crate::{Device, Error};

/// How the host can speak to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelKind {
    /// A virtio-serial port: one stream, whose host end the VM has.
    Serial,
    /// The host kernel's vsock: an address.
    Vsock,
    /// vsock that the VMM ends in a Unix socket of the host's.
    HybridVsock,
}

/// How a guest can have a folder of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharingKind {
    /// virtio-fs by a vhost-user daemon, which the VMM reaches in this way.
    VirtioFs(DaemonSocket),
    /// 9p, served by the VMM.
    NineP,
}

/// How a VMM reaches a vhost-user daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaemonSocket {
    /// It inherits a connection.
    Connection,
    /// It connects to a path.
    Path,
}

/// Kinds of [`Device`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A network card.
    Net,
    /// A device of the host.
    Host,
    /// A disk.
    Disk,
}

impl DeviceKind {
    /// In messages.
    fn name(self) -> &'static str {
        match self {
            Self::Net => "network card",
            Self::Host => "device of the host",
            Self::Disk => "disk",
        }
    }
}

/// What the VMs of a driver can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Ways to the guest, the best first.
    pub channels: &'static [ChannelKind],
    /// Ways to share a folder, the best first.
    pub sharing: &'static [SharingKind],
    /// Devices that a VM can start with.
    pub devices: &'static [DeviceKind],
    /// Devices that can be plugged while it runs ([`crate::Vm::hotplug`]).
    pub hotplug: &'static [DeviceKind],
    /// The channel of VMs that are saved and cloned ([`crate::Vm::snapshots`]), one whose state can be saved; `None` where
    /// none can.
    pub snapshots: Option<ChannelKind>,
    /// A VM can go from one process to another ([`crate::Vm::hand_over`]).
    pub hand_over: bool,
}

impl Capabilities {
    /// Refuses a device that no VM of the driver `name` can start with.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with both names.
    pub fn check(&self, name: &'static str, device: &Device) -> Result<(), Error> {
        let kind = device.kind();
        if self.devices.contains(&kind) {
            return Ok(());
        }
        Err(Error::Unsupported { driver: name, what: format!("{} {}", kind.name(), device.id()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_no_vm_can_have_is_named_with_its_driver() {
        let mut capabilities = Capabilities {
            channels: &[],
            sharing: &[],
            devices: &[DeviceKind::Net],
            hotplug: &[],
            snapshots: None,
            hand_over: false,
        };
        let device = Device::Host(crate::HostDevice { id: "net1".into(), address: "0000:3b:02.1".into() });
        let error = capabilities.check("plain", &device).expect_err("refused").to_string();
        assert_eq!(error, "hypervisor plain has no support for device of the host net1");
        capabilities.devices = &[DeviceKind::Host];
        capabilities.check("plain", &device).expect("fine");
    }
}
