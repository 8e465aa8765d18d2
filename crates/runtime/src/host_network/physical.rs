//! Network cards of the host that a pod has as its own: taken from their driver, given to the VM, given back (kernel:
//! Documentation/driver-api/vfio.rst). Functions over the root of sysfs, `/sys`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The driver that hands a device to a VMM.
const VFIO: &str = "vfio-pci";

/// A PCI device as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Function {
    sysfs: PathBuf,
    /// As `0000:3b:02.1`.
    address: String,
}

impl Function {
    /// `address` comes from the kernel or from our journal; it becomes part of a path.
    pub(crate) fn new(sysfs: &Path, address: &str) -> io::Result<Self> {
        let is_plain = (1..=32).contains(&address.len())
            && address.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':' || byte == b'.')
            && !address.contains("..");
        if is_plain {
            Ok(Self { sysfs: sysfs.to_owned(), address: address.to_owned() })
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, format!("invalid PCI address {address:.40?}")))
        }
    }

    fn device(&self) -> PathBuf {
        self.sysfs.join("bus/pci/devices").join(&self.address)
    }

    /// Which driver has it.
    pub(crate) fn driver(&self) -> Option<String> {
        driver_of(&self.device())
    }

    /// Why it cannot be given to a VM, if so: there must be an IOMMU, and whatever shares its group must be free.
    pub(crate) fn obstacle(&self) -> Option<String> {
        let group = match fs::canonicalize(self.device().join("iommu_group")) {
            Ok(group) => group,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Some(format!(
                    "PCI device {} cannot be passed to a VM, because no IOMMU is enabled on this host: enable it in the firmware and boot with intel_iommu=on or amd_iommu=on, or give the pod a macvlan instead",
                    self.address
                ));
            }
            Err(error) => return Some(format!("IOMMU group of PCI device {}: {error}", self.address)),
        };
        let others = fs::read_dir(group.join("devices")).into_iter().flatten().flatten();
        let busy = others.filter(|other| other.file_name() != self.address.as_str()).find_map(|other| {
            // bridges stay with the host
            let driver = driver_of(&other.path()).filter(|driver| !matches!(driver.as_str(), VFIO | "pcieport"))?;
            Some(format!(
                "PCI device {} is in one IOMMU group with {}, which is bound to driver {driver}: all devices of a group must be passed to the VM",
                self.address,
                other.file_name().display()
            ))
        });
        busy.or_else(|| {
            let missing = !self.sysfs.join("bus/pci/drivers").join(VFIO).is_dir();
            missing.then(|| format!("the driver {VFIO} is not loaded: run `modprobe {VFIO}`"))
        })
    }

    /// Takes it from its driver and gives it to `vfio-pci`.
    pub(crate) fn take(&self) -> io::Result<()> {
        self.hand_to(Some(VFIO))
    }

    /// Back to `driver`, if it is with `vfio-pci`; to whichever wants it, if that is not known. A device that is gone, or
    /// somebody else's by now, is left alone.
    pub(crate) fn give_back(&self, driver: Option<&str>) -> io::Result<()> {
        if !self.device().is_dir() || self.driver().is_some_and(|now| now != VFIO) {
            return Ok(());
        }
        self.hand_to(driver)
    }

    /// The override makes the kernel choose that driver for this device alone, whatever the driver knows of its kind.
    fn hand_to(&self, driver: Option<&str>) -> io::Result<()> {
        if let Some(now) = self.driver() {
            if Some(now.as_str()) == driver {
                return Ok(());
            }
            write(&self.device().join("driver/unbind"), &self.address)?;
        }
        let choice = self.device().join("driver_override");
        // an empty line takes an override away
        write(&choice, driver.filter(|driver| *driver == VFIO).unwrap_or("\n"))?;
        write(&self.sysfs.join("bus/pci/drivers_probe"), &self.address)?;
        match (driver, self.driver()) {
            (Some(wanted), Some(now)) if wanted != now => Err(io::Error::other(format!(
                "PCI device {} was bound to driver {now} instead of {wanted}",
                self.address
            ))),
            (None, Some(now)) if now == VFIO => {
                Err(io::Error::other(format!("PCI device {} is still bound to driver {VFIO}", self.address)))
            }
            (Some(wanted), None) => {
                Err(io::Error::other(format!("PCI device {}: driver {wanted} did not bind to it", self.address)))
            }
            _ => Ok(()),
        }
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

fn driver_of(device: &Path) -> Option<String> {
    let link = fs::read_link(device.join("driver")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const CARD: &str = "0000:3b:02.1";

    /// A sysfs with one card. A file system does not act on what is written, so the tests act as the kernel would.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new() -> Self {
            let fake = Self(tempfile::tempdir().expect("a folder"));
            for driver in ["iavf", VFIO] {
                fs::create_dir_all(fake.path("bus/pci/drivers").join(driver)).expect("made");
                fs::write(fake.path("bus/pci/drivers").join(driver).join("unbind"), "").expect("made");
            }
            fs::write(fake.path("bus/pci/drivers_probe"), "").expect("made");
            fake.add(CARD, "iavf");
            fake
        }

        fn path(&self, below: &str) -> PathBuf {
            self.0.path().join(below)
        }

        fn add(&self, address: &str, driver: &str) {
            let device = self.path("bus/pci/devices").join(address);
            fs::create_dir_all(&device).expect("made");
            fs::write(device.join("driver_override"), "").expect("made");
            self.bind(address, Some(driver));
        }

        fn bind(&self, address: &str, driver: Option<&str>) {
            let link = self.path("bus/pci/devices").join(address).join("driver");
            let _ = fs::remove_file(&link);
            if let Some(driver) = driver {
                symlink(self.path("bus/pci/drivers").join(driver), link).expect("linked");
            }
        }

        fn group(&self, addresses: &[&str]) {
            let devices = self.path("kernel/iommu_groups/7/devices");
            fs::create_dir_all(&devices).expect("made");
            for address in addresses {
                let device = self.path("bus/pci/devices").join(address);
                symlink(&device, devices.join(address)).expect("linked");
                symlink(self.path("kernel/iommu_groups/7"), device.join("iommu_group")).expect("linked");
            }
        }

        fn card(&self) -> Function {
            Function::new(self.0.path(), CARD).expect("an address")
        }

        fn written(&self, file: &str) -> String {
            fs::read_to_string(self.path(file)).expect("read")
        }
    }

    #[test]
    fn without_an_iommu_the_fix_is_told() {
        let obstacle = Fake::new().card().obstacle().expect("an obstacle");
        assert!(obstacle.contains(CARD) && obstacle.contains("intel_iommu=on"), "{obstacle}");
    }

    #[test]
    fn a_group_goes_as_a_whole() {
        let fake = Fake::new();
        fake.add("0000:3b:02.2", "iavf");
        fake.add("0000:3a:00.0", "pcieport");
        fake.group(&[CARD, "0000:3b:02.2", "0000:3a:00.0"]);
        let obstacle = fake.card().obstacle().expect("an obstacle");
        assert!(obstacle.contains("0000:3b:02.2") && obstacle.contains("iavf"), "{obstacle}");
        fake.bind("0000:3b:02.2", Some(VFIO));
        assert_eq!(fake.card().obstacle(), None);
        fake.bind("0000:3b:02.2", None);
        assert_eq!(fake.card().obstacle(), None);
        fs::remove_dir_all(fake.path("bus/pci/drivers").join(VFIO)).expect("removed");
        assert!(fake.card().obstacle().expect("an obstacle").contains("modprobe vfio-pci"));
    }

    #[test]
    fn a_card_is_taken_from_its_driver() {
        let fake = Fake::new();
        let card = fake.card();
        // nobody acts on what is written, so the old driver still has it in the end
        let error = card.take().expect_err("no kernel").to_string();
        assert!(error.contains("iavf instead of vfio-pci"), "{error}");
        assert_eq!(fake.written("bus/pci/drivers/iavf/unbind"), CARD);
        assert_eq!(fake.written(&format!("bus/pci/devices/{CARD}/driver_override")), VFIO);
        assert_eq!(fake.written("bus/pci/drivers_probe"), CARD);
        fake.bind(CARD, Some(VFIO));
        card.take().expect("it is there");
    }

    #[test]
    fn and_given_back_to_it() {
        let fake = Fake::new();
        let card = fake.card();
        card.give_back(Some("iavf")).expect("it has it already");
        assert_eq!(fake.written("bus/pci/drivers_probe"), "");
        // taken, and then nobody's: the kernel was told, and iavf came
        fake.bind(CARD, None);
        let error = card.give_back(Some("iavf")).expect_err("no kernel").to_string();
        assert!(error.contains("driver iavf did not bind to it"), "{error}");
        assert_eq!(fake.written(&format!("bus/pci/devices/{CARD}/driver_override")), "\n");
        assert_eq!(fake.written("bus/pci/drivers_probe"), CARD);
        fake.bind(CARD, Some(VFIO));
        fs::write(fake.path("bus/pci/drivers_probe"), "").expect("emptied");
        card.give_back(None).expect_err("no kernel");
        fs::remove_dir_all(fake.path("bus/pci/devices").join(CARD)).expect("removed");
        card.give_back(Some("iavf")).expect("it is gone");
    }

    #[test]
    fn an_address_is_no_path() {
        for address in ["", "../../x", "0000:3b:02.1/../..", "..", "0000:..:1"] {
            Function::new(Path::new("/sys"), address).expect_err(address);
        }
    }
}
