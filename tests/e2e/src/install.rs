//! Where the product under test is installed, and the variations of its configuration that tests need.

use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};

/// An installation below one prefix.
#[derive(Debug, Clone)]
pub struct Install {
    prefix: PathBuf,
}

impl Install {
    /// The installation named by `KATA_PREFIX`, else the one that `make test` lays out; an error names what is missing
    /// and what to do about it.
    pub fn locate() -> Result<Self> {
        let prefix = match std::env::var_os("KATA_PREFIX") {
            Some(given) => PathBuf::from(given),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-prefix"),
        };
        if !nix::unistd::geteuid().is_root() {
            bail!("the tests start containers and so need root: run them with sudo");
        }
        let prefix = std::fs::canonicalize(&prefix).with_context(|| {
            format!("{}: no installation to test there: run `make test`, or set KATA_PREFIX", prefix.display())
        })?;
        let install = Self { prefix };
        for path in [install.shim(), install.kernel(), install.initrd(), install.image(), install.config()] {
            if !path.is_file() {
                bail!("{}: missing from the installation: run `make test`, or set KATA_PREFIX", path.display());
            }
        }
        for (program, package) in [
            ("containerd", "containerd"),
            ("ctr", "containerd"),
            ("runc", "runc"),
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("busybox", "busybox-static"),
        ] {
            if program_path(program).is_none() {
                bail!("{program}: not found in PATH: run `apt-get install {package}`");
            }
        }
        Ok(install)
    }

    /// The folder of binaries, to be put first in containerd's PATH.
    pub fn bin(&self) -> PathBuf {
        self.prefix.join("bin")
    }

    /// The shim's binary.
    pub fn shim(&self) -> PathBuf {
        self.bin().join("containerd-shim-kata-v2")
    }

    /// The guest's uncompressed kernel.
    pub fn kernel(&self) -> PathBuf {
        self.prefix.join("share/kata-containers/vmlinux.container")
    }

    /// The guest's compressed kernel; may be absent.
    pub fn compressed_kernel(&self) -> PathBuf {
        self.prefix.join("share/kata-containers/vmlinuz.container")
    }

    /// The guest's initrd.
    pub fn initrd(&self) -> PathBuf {
        self.prefix.join("share/kata-containers/kata-containers-initrd.img")
    }

    /// The guest's image.
    pub fn image(&self) -> PathBuf {
        self.prefix.join("share/kata-containers/kata-containers.img")
    }

    /// The installed configuration of a guest that boots the image.
    pub fn image_config(&self) -> PathBuf {
        self.prefix.join("share/defaults/kata-containers/configuration-image.toml")
    }

    /// It, with keys of `[hypervisor.qemu]` set to other values, as text.
    pub fn image_config_with(&self, changes: &[(&str, toml::Value)]) -> Result<String> {
        let mut table = table(&self.image_config())?;
        change(&mut table, "hypervisor.qemu", changes)?;
        Ok(table.to_string())
    }

    /// The installed configuration.
    pub fn config(&self) -> PathBuf {
        self.prefix.join("share/defaults/kata-containers/configuration.toml")
    }

    /// The installed configuration as a table, to be changed and written elsewhere.
    pub fn config_table(&self) -> Result<toml::Table> {
        let mut table = table(&self.config())?;
        if Self::wants_templates() {
            let factory = table.entry("factory").or_insert_with(|| toml::Table::new().into());
            factory.as_table_mut().context("[factory] is no table")?.insert("enable_template".into(), true.into());
        }
        Ok(table)
    }

    /// `KATA_E2E_TEMPLATE=1`: every pod of every test is a clone of a template, once one of its kind is made.
    pub fn wants_templates() -> bool {
        std::env::var_os("KATA_E2E_TEMPLATE").is_some_and(|value| value == "1")
    }

    /// The command line for administrators.
    pub fn kata_runtime(&self) -> PathBuf {
        self.bin().join("kata-runtime")
    }

    /// The installed configuration with keys of `[hypervisor.qemu]` set to other values, as text.
    pub fn config_with(&self, changes: &[(&str, toml::Value)]) -> Result<String> {
        self.config_table_with("hypervisor.qemu", changes)
    }

    /// As `config_with`, of another table.
    pub fn config_table_with(&self, name: &str, changes: &[(&str, toml::Value)]) -> Result<String> {
        let mut table = self.config_table()?;
        change(&mut table, name, changes)?;
        Ok(table.to_string())
    }
}

fn table(path: &Path) -> Result<toml::Table> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    text.parse().with_context(|| format!("parsing {}", path.display()))
}

fn change(table: &mut toml::Table, name: &str, changes: &[(&str, toml::Value)]) -> Result<()> {
    let mut at = table;
    for part in name.split('.') {
        let inner = at.get_mut(part).and_then(toml::Value::as_table_mut);
        at = inner.with_context(|| format!("the installed configuration has no [{name}]"))?;
    }
    for (key, value) in changes {
        at.insert((*key).to_owned(), value.clone());
    }
    Ok(())
}

/// Finds a program in PATH.
pub fn program_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}
