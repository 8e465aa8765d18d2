//! Another containerd on the same host, with a pod that runs: what a node in use looks like to a test.

use crate::{
    Containerd, Node, Runtime,
    containerd::Programs,
    ctr::Invocation,
    image,
    journal::Journal,
    node::{address, launch},
    pod_network::ip,
};
use anyhow::Result;
use std::{path::Path, process::Child};

/// What its pod, its bridge and the pod's network namespace are called.
const NAME: &str = "neighbour";

/// The other containerd; its pod ends with it.
#[derive(Debug)]
pub struct Neighbour {
    dir: tempfile::TempDir,
    programs: Programs,
    daemon: Child,
}

impl Neighbour {
    /// With one pod of the product's, in a network namespace with a veth to a bridge.
    pub fn start(node: &Node) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("kn").tempdir_in("/var/tmp")?;
        std::fs::write(dir.path().join("containerd.toml"), Containerd::Debian.settings(dir.path(), None))?;
        let programs = Containerd::Debian.programs(node.install())?;
        // no node's mark
        let daemon = launch(&programs, dir.path(), "", node.config(), &Journal::default())?;
        // from here on dropping it cleans up
        let this = Self { dir, programs, daemon };
        for line in [
            "link add cni-neighbour type bridge".to_owned(),
            format!("netns add {NAME}"),
            format!("link add vethneighbour type veth peer name eth0 netns {NAME}"),
            "link set vethneighbour master cni-neighbour up".to_owned(),
            format!("-n {NAME} link set eth0 up"),
        ] {
            ip(&line)?;
        }
        this.ctr(&["image", "import", &image::archive()?.display().to_string()]).output()?.ok()?;
        let network = format!("network:/run/netns/{NAME}");
        let run = ["run", "-d", "--runtime", Runtime::Kata.name(), "--with-ns", &network, image::NAME, NAME];
        this.ctr(&[&run[..], &["sleep", "100000"]].concat()).output()?.ok()?;
        Ok(this)
    }

    fn ctr(&self, args: &[&str]) -> Invocation {
        let address = address(self.path());
        Invocation::new(&self.programs.ctr, [&["-a", &address, "-n", NAME], args].concat())
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.ctr(&["task", "delete", "-f", NAME]).output();
        let _ = self.ctr(&["container", "rm", NAME]).output();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        for line in ["link del vethneighbour", "link del cni-neighbour", &format!("netns del {NAME}")] {
            let _ = ip(line);
        }
        crate::mounts::unmount_below(&[self.path().to_owned()]);
    }
}
