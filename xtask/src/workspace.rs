//! Where things are: the checkout, cargo's output, what we hand out. Owns names of files, touches none of them.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The checkout and what is made in it.
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// From where cargo compiled this program.
    pub(crate) fn locate() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().context("xtask has no parent folder")?.to_owned();
        if !root.join("Cargo.toml").is_file() {
            bail!(
                "{} is not the workspace any more: it was moved; run make again, or cargo clean -p xtask",
                root.display()
            );
        }
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
        Ok(Self { root, target })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The product's shim, compiled.
    pub(crate) fn shim(&self) -> PathBuf {
        self.target.join("release/containerd-shim-kata-v2")
    }

    /// The command line, compiled.
    pub(crate) fn command_line(&self) -> PathBuf {
        self.target.join("release/kata-runtime")
    }

    /// The static agent, compiled.
    pub(crate) fn agent(&self) -> PathBuf {
        self.target.join(triple()).join("release/kata-agent")
    }

    /// What `make guest` hands out.
    pub(crate) fn guest_files(&self) -> PathBuf {
        self.root.join("dist/share/kata-containers")
    }

    /// The topics of the guest kernel's configuration.
    pub(crate) fn kernel_fragments(&self) -> PathBuf {
        self.root.join("guest/kernel")
    }

    /// The reference of the configuration's keys.
    pub(crate) fn reference(&self) -> PathBuf {
        self.root.join("docs/configuration.md")
    }

    /// Where `make test` and `make bench` install.
    pub(crate) fn test_prefix(&self) -> PathBuf {
        self.target.join("test-prefix")
    }

    /// Where the tests find clients that Debian does not have.
    pub(crate) fn test_clients(&self) -> PathBuf {
        self.target.join("test-clients")
    }

    /// What `make nested` boots.
    pub(crate) fn nested_initrd(&self) -> PathBuf {
        self.target.join("nested-initrd.img")
    }

    /// Where `make run` installs.
    pub(crate) fn run_prefix(&self) -> PathBuf {
        self.target.join("run-prefix")
    }

    /// The end-to-end tests, where this checkout has them.
    pub(crate) fn has_end_to_end_tests(&self) -> bool {
        self.root.join("tests/e2e/Cargo.toml").is_file()
    }
}

/// Rust's name of the target: explicit, so that the agent's flags do not reach build scripts and procedural macros.
pub(crate) fn triple() -> String {
    format!("{}-unknown-linux-gnu", env::consts::ARCH)
}

/// Below a prefix: the guest's kernel, initrd and image.
pub(crate) const GUEST_FILES: &str = "share/kata-containers";
/// Below a prefix: the configuration that the shim finds by itself.
pub(crate) const CONFIGURATION: &str = "share/defaults/kata-containers/configuration.toml";
/// Below a prefix: the same with the image instead of the initrd.
pub(crate) const IMAGE_CONFIGURATION: &str = "share/defaults/kata-containers/configuration-image.toml";
/// Below a prefix: the man page of the configuration.
pub(crate) const MAN_PAGE: &str = "share/man/man5/kata-configuration.5";
/// Below a prefix: the shim.
pub(crate) const SHIM: &str = "bin/containerd-shim-kata-v2";
/// Below a prefix: the command line.
pub(crate) const COMMAND_LINE: &str = "bin/kata-runtime";
/// The uncompressed kernel, entered by PVH: the fastest way in.
pub(crate) const VMLINUX: &str = "vmlinux.container";
/// The same kernel as every boot loader likes it.
pub(crate) const VMLINUZ: &str = "vmlinuz.container";
/// The image.
pub(crate) const IMAGE: &str = "kata-containers.img";
/// What the configuration says of it: `kernel_verity_params`.
pub(crate) const IMAGE_VERITY: &str = "kata-containers.img.verity";
/// The initrd.
pub(crate) const INITRD: &str = "kata-containers-initrd.img";
