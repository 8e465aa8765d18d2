//! The generations of containerd that the product serves: where each is found, and how it wants to be configured.

use crate::{Runtime, install::Install};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};

/// Chooses one generation for a run of the tests, by its name here; unset means all.
const CHOICE: &str = "KATA_CONTAINERD";

/// The socket for its plugins, in a node's folder.
pub const NRI_SOCKET: &str = "nri.sock";

/// A containerd, with the `ctr` and the shim for runc that belong to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Containerd {
    /// Debian 12's, which is 1.6: the one in PATH.
    #[default]
    Debian,
    /// 1.7, built by `xtask clients`.
    V1_7,
    /// The newest, built by `xtask clients`.
    V2,
}

/// What is started of a containerd.
#[derive(Debug, Clone)]
pub struct Programs {
    /// containerd itself.
    pub daemon: String,
    /// Its client.
    pub ctr: String,
    /// The PATH in which it finds shims: the product's and its own.
    pub path: String,
}

/// All of them.
pub const GENERATIONS: [Containerd; 3] = [Containerd::Debian, Containerd::V1_7, Containerd::V2];

impl Containerd {
    /// What it is called in `KATA_CONTAINERD` and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Containerd::Debian => "debian",
            Containerd::V1_7 => "1.7",
            Containerd::V2 => "2",
        }
    }

    /// Those that this run of the tests is about.
    pub fn chosen() -> Result<Vec<Self>> {
        let Some(wanted) = std::env::var_os(CHOICE) else { return Ok(GENERATIONS.to_vec()) };
        match GENERATIONS.into_iter().find(|one| wanted == one.name()) {
            Some(one) => Ok(vec![one]),
            None => bail!("{CHOICE}={}: one of debian, 1.7, 2", wanted.display()),
        }
    }

    /// Its programs, with the product's beside them.
    pub fn programs(self, install: &Install) -> Result<Programs> {
        let usual = std::env::var("PATH").context("PATH")?;
        let folder = match self {
            Containerd::Debian => None,
            Containerd::V1_7 => Some(client("containerd-1.7")?),
            Containerd::V2 => Some(client("containerd-2")?),
        };
        let program = |name: &str| match &folder {
            Some(folder) => folder.join(name).display().to_string(),
            None => name.to_owned(),
        };
        let folders = [Some(install.bin()), folder.clone()].into_iter().flatten();
        let first = folders.fold(String::new(), |path, folder| format!("{path}{}:", folder.display()));
        Ok(Programs { daemon: program("containerd"), ctr: program("ctr"), path: first + &usual })
    }

    /// Its configuration: everything below `dir`, and CRI only where it is wanted, with that runtime by default. 2.x has it in three plugins.
    pub(crate) fn settings(self, dir: &Path, cri: Option<Runtime>) -> String {
        let (version, names) = match self {
            Containerd::Debian | Containerd::V1_7 => (2, &["io.containerd.grpc.v1.cri"][..]),
            Containerd::V2 => {
                (3, &["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"][..])
            }
        };
        let at = |name: &str| dir.join(name).display().to_string();
        let mut disabled = Vec::new();
        let more = if let Some(default) = cri {
            crate::cri::settings(self, dir, default) + &self.nri(dir)
        } else {
            // its socket is the machine's; only 2.x opens it unasked
            disabled.push("io.containerd.nri.v1.nri");
            disabled.extend(names);
            String::new()
        };
        format!(
            "version = {version}\nroot = {:?}\nstate = {:?}\ndisabled_plugins = {disabled:?}\n[grpc]\naddress = {:?}\n\
             [debug]\nlevel = \"debug\"\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n{more}",
            at("root"),
            at("state"),
            at("c.sock"),
            at("opt"),
        )
    }
}

impl Containerd {
    /// Whether plugins can take part in what CRI does (NRI).
    pub fn has_nri(self) -> bool {
        self != Containerd::Debian
    }

    /// Makes it serve them by a socket below `dir`, and look for none of the machine's.
    fn nri(self, dir: &Path) -> String {
        if !self.has_nri() {
            return String::new();
        }
        let at = |name: &str| dir.join(name).display().to_string();
        format!(
            "[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = false\nsocket_path = {:?}\nplugin_path = {:?}\n\
             plugin_config_path = {:?}\n",
            at(NRI_SOCKET),
            at("nri/plugins"),
            at("nri/conf"),
        )
    }
}

/// The programs that `xtask clients` built for a role in the tests.
pub fn client(role: &str) -> Result<PathBuf> {
    let all = match std::env::var_os("KATA_CLIENTS") {
        Some(given) => PathBuf::from(given),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-clients"),
    };
    let folder = all.join(role).join("bin");
    folder.canonicalize().with_context(|| {
        format!("{}: {role} is not there: run `cargo run -p xtask clients`, as `make test` does", folder.display())
    })
}
