//! Where devices that can come and go are plugged: root ports, one a device.
//!
//! The root bus takes nothing while the guest runs. A bridge would have 31 places behind it, but describing them costs
//! the guest's ACPI interpreter eight times as much as a port, and a card behind it as much again (measured under TCG: 40,
//! 35 and 5 ms). A VM that gets nothing has no port, and no hot-plug in its ACPI tables: that saves 20 ms.

use std::fmt::Write as _;

/// The slot of the root bus that has the first ports; the next ones are below it. Above it QEMU's own devices live, and
/// those without a place of their own fill the bus from the other end.
const FIRST_SLOT: usize = 0x1e;
/// Functions of a slot.
const FUNCTIONS: usize = 8;
/// Most ports of a VM: four slots of the root bus.
pub(super) const MOST: usize = 4 * FUNCTIONS;

/// Which device is in which port.
#[derive(Debug, Default)]
pub(super) struct Ports(Vec<Option<String>>);

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Port(usize);

impl Ports {
    pub(super) fn new(count: usize) -> Self {
        Self(vec![None; count.min(MOST)])
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = Port> {
        (0..self.0.len()).map(Port)
    }

    /// A free one, for `device`.
    pub(super) fn take(&mut self, device: &str) -> Option<Port> {
        let free = self.0.iter().position(Option::is_none)?;
        self.0[free] = Some(device.to_owned());
        Some(Port(free))
    }

    pub(super) fn find(&self, device: &str) -> Option<Port> {
        self.0.iter().position(|one| one.as_deref() == Some(device)).map(Port)
    }

    pub(super) fn free(&mut self, device: &str) {
        if let Some(Port(number)) = self.find(device) {
            self.0[number] = None;
        }
    }
}

impl Port {
    /// The name of the bus behind it.
    pub(super) fn name(self) -> String {
        format!("port{}", self.0)
    }

    fn slot(self) -> (usize, usize) {
        (FIRST_SLOT - self.0 / FUNCTIONS, self.0 % FUNCTIONS)
    }

    /// For `-device`.
    pub(super) fn argument(self) -> String {
        let (slot, function) = self.slot();
        let several = if function == 0 { ",multifunction=on" } else { "" };
        format!(
            "pcie-root-port,id={},bus=pcie.0,chassis={},addr={slot:#x}.{function:#x}{several}",
            self.name(),
            self.0 + 1
        )
    }

    /// What is in it, as Kata's agent protocol writes it.
    pub(super) fn guest_path(self) -> String {
        let (slot, function) = self.slot();
        let mut path = format!("{slot:02x}");
        if function > 0 {
            let _ = write!(path, ".{function}");
        }
        path + "/00"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_given_and_taken_back() {
        let mut ports = Ports::new(2);
        let (first, second) = (ports.take("a").expect("free"), ports.take("b").expect("free"));
        assert_eq!(ports.take("c"), None);
        assert_eq!((first.guest_path(), second.guest_path()), ("1e/00".into(), "1e.1/00".into()));
        ports.free("a");
        ports.free("a");
        assert_eq!((ports.find("a"), ports.take("c"), ports.find("b")), (None, Some(first), Some(second)));
    }

    #[test]
    fn no_two_ports_are_at_the_same_place() {
        let ports = Ports::new(usize::MAX);
        let places: std::collections::BTreeSet<_> = ports.all().map(Port::slot).collect();
        assert_eq!(places.len(), MOST);
        assert_eq!(
            ports.all().nth(9).expect("a port").argument(),
            "pcie-root-port,id=port9,bus=pcie.0,chassis=10,addr=0x1d.0x1"
        );
    }
}
