//! Every client that there is, and which version of it.

use super::source::Source;

/// A Go module from which we build programs.
pub(super) struct Client {
    /// What tests call it, whatever its version: the name of the link beside the tests' installation.
    pub(super) role: &'static str,
    pub(super) name: &'static str,
    pub(super) version: &'static str,
    pub(super) module: &'static str,
    pub(super) source: Source,
    pub(super) programs: &'static [Program],
    /// Variables that take the version, as upstream's Makefile sets them, with what they prefix it with.
    pub(super) stamps: &'static [(&'static str, &'static str)],
    pub(super) tags: &'static str,
}

/// One program of it.
pub(super) struct Program {
    pub(super) name: &'static str,
    /// Shows the version, so that we see that it runs.
    pub(super) version_flag: &'static str,
    /// Upstream keeps it as a test of a package that has nothing else.
    pub(super) is_test: bool,
}

const fn program(name: &'static str, version_flag: &'static str) -> Program {
    Program { name, version_flag, is_test: false }
}

const CONTAINERD: &[Program] =
    &[program("containerd", "--version"), program("ctr", "--version"), program("containerd-shim-runc-v2", "-v")];

/// Without the snapshotters that need C libraries or block devices.
const CONTAINERD_TAGS: &str = "urfave_cli_no_docs no_btrfs no_devmapper no_zfs no_aufs osusergo netgo static_build";

/// Without the drivers for images that need C libraries.
const DOCKER_TAGS: &str = "osusergo netgo static_build exclude_graphdriver_btrfs exclude_graphdriver_devicemapper";

/// Every version there is. The tools of the CRI speak the API of the newest containerd here; what Docker has of a client
/// and of a daemon are two modules.
pub(super) const CLIENTS: [Client; 7] = [
    Client {
        role: "cri-tools",
        name: "cri-tools",
        version: "1.37.0",
        module: "sigs.k8s.io/cri-tools",
        source: Source::Whole,
        programs: &[
            program("crictl", "--version"),
            Program { name: "critest", version_flag: "-version", is_test: true },
        ],
        stamps: &[("sigs.k8s.io/cri-tools/pkg/version.Version", "")],
        tags: "",
    },
    Client {
        role: "containerd-2",
        name: "containerd",
        version: "2.4.2",
        module: "github.com/containerd/containerd/v2",
        source: Source::Whole,
        programs: CONTAINERD,
        stamps: &[("github.com/containerd/containerd/v2/version.Version", "v")],
        tags: CONTAINERD_TAGS,
    },
    Client {
        role: "containerd-1.7",
        name: "containerd",
        version: "1.7.35",
        module: "github.com/containerd/containerd",
        source: Source::Whole,
        programs: CONTAINERD,
        stamps: &[("github.com/containerd/containerd/version.Version", "v")],
        tags: CONTAINERD_TAGS,
    },
    Client {
        role: "nerdctl",
        name: "nerdctl",
        version: "2.2.2",
        module: "github.com/containerd/nerdctl/v2",
        source: Source::Without {
            // of its tests alone, and never published by itself; the file uses it although it is part of the program
            module: "github.com/containerd/nerdctl/mod/tigron",
            version: "v0.0.0",
            files: &["cmd/nerdctl/helpers/testing_linux.go"],
        },
        programs: &[program("nerdctl", "--version")],
        stamps: &[("github.com/containerd/nerdctl/v2/pkg/version.Version", "v")],
        tags: "",
    },
    Client {
        role: "docker",
        name: "docker",
        version: "28.5.2",
        module: "github.com/docker/docker",
        source: Source::Vendored,
        programs: &[program("dockerd", "--version"), program("docker-proxy", "--version")],
        stamps: &[("github.com/docker/docker/dockerversion.Version", "")],
        tags: DOCKER_TAGS,
    },
    Client {
        role: "docker-cli",
        name: "docker-cli",
        version: "28.5.2",
        module: "github.com/docker/cli",
        source: Source::Vendored,
        programs: &[program("docker", "--version")],
        stamps: &[("github.com/docker/cli/cli/version.Version", "")],
        tags: DOCKER_TAGS,
    },
    Client {
        role: "kubelet",
        name: "kubelet",
        version: "1.36.3",
        module: "k8s.io/kubernetes",
        source: Source::Staged { prefix: "k8s.io/", version: "v0.36.3" },
        programs: &[program("kubelet", "--version")],
        stamps: &[("k8s.io/component-base/version.gitVersion", "v")],
        tags: "providerless",
    },
];
