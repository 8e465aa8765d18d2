//! The PCI bridge behind which devices come and go while the guest runs: the root bus takes nothing then.
//!
//! A VM that nothing can come to has none. Measured under TCG, in milliseconds of processor time from QEMU's start to the
//! guest's first process (of about 450, means of 100 starts each): a card on the root bus and nothing else 0, a card behind
//! this bridge 19, behind a root port of its own 17, with two root ports to spare 32. So root ports, which are the modern
//! way, cost as much for one place as the bridge for all.

use serde::{Deserialize, Serialize};

/// Where the bridge is on the root bus: below QEMU's own devices, and the others fill the bus from the other end.
const SLOT: usize = 0x1e;
/// The same, as Kata's agent protocol writes it.
pub(super) const BRIDGE: &str = "1e";
/// The event by which the machine tells of plugged devices (QEMU's docs/specs/acpi_pci_hotplug).
pub(super) const PLUGGED: &str = "gpe01";
/// The bus behind it.
pub(super) const BUS: &str = "plug";
/// Places behind it: slots 1 to 30.
pub(super) const MOST: usize = 30;
/// What is always behind it: the guest's kernel gives an empty bridge no addresses, and then nothing can come.
pub(super) const RESIDENT: &str = ",bus=plug,addr=0x1f";
/// For `-device`. The guest learns of changes by ACPI; the bridge's own controller (SHPC) would wait five seconds each time,
/// as for a hand at a lever.
pub(super) const ARGUMENT: &str = "pci-bridge,id=plug,bus=pcie.0,addr=0x1e,chassis_nr=1,shpc=off";

/// Which device is where.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Bridge(Vec<Option<String>>);

/// A place behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(usize);

impl Bridge {
    /// One with all its places.
    pub(super) fn new() -> Self {
        Self(vec![None; MOST])
    }

    /// There is no bridge.
    pub(super) fn is_missing(&self) -> bool {
        self.0.is_empty()
    }

    /// A free place, for `device`.
    pub(super) fn take(&mut self, device: &str) -> Option<Slot> {
        let free = self.0.iter().position(Option::is_none)?;
        self.0[free] = Some(device.to_owned());
        Some(Slot(free))
    }

    pub(super) fn find(&self, device: &str) -> Option<Slot> {
        self.0.iter().position(|one| one.as_deref() == Some(device)).map(Slot)
    }

    pub(super) fn free(&mut self, device: &str) {
        if let Some(Slot(number)) = self.find(device) {
            self.0[number] = None;
        }
    }
}

impl Slot {
    /// QEMU's `addr`.
    pub(super) fn address(self) -> String {
        format!("{:#x}", self.0 + 1)
    }

    /// As Kata's agent protocol writes it.
    pub(super) fn guest_path(self) -> String {
        format!("{SLOT:02x}/{:02x}", self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_and_taken_back() {
        assert_eq!(Bridge::default().take("a"), None);
        let mut bridge = Bridge::new();
        let all: Vec<_> = (0..MOST).map(|number| bridge.take(&format!("net{number}")).expect("free")).collect();
        assert_eq!(bridge.take("more"), None);
        assert_eq!((all[0].guest_path(), all[29].guest_path()), ("1e/01".into(), "1e/1e".into()));
        assert_eq!((all[0].address(), all[29].address()), ("0x1".into(), "0x1e".into()));
        bridge.free("net7");
        bridge.free("net7");
        assert_eq!((bridge.find("net7"), bridge.take("more"), bridge.find("net8")), (None, Some(all[7]), Some(all[8])));
    }

    #[test]
    fn the_argument_has_the_slot_of_the_path() {
        assert_eq!(BRIDGE, format!("{SLOT:02x}"));
        assert!(ARGUMENT.contains(&format!("addr={SLOT:#x},")) && ARGUMENT.contains(&format!("id={BUS},")));
    }
}
