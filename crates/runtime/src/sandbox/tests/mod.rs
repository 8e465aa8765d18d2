//! A pod's life with a fake driver and a fake agent: what fails, is silent, late, wrong or cancelled at each step leaves
//! nothing behind, and the next try works. They make namespaces, so they run as root only.

mod make;
mod processes;
mod start;
mod stop;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio::sync::{Notify, mpsc};

use super::{Env, Event, FailedStart, Sandbox, SandboxSpec};
use crate::cleanup::RunDir;
use crate::container::{ContainerSpec, ProcessRef, Stdio};
use crate::fakes::vm::FakeDriver;
use crate::storage::rootfs::RootfsMount;
use crate::trace::Trace;
use crate::{ContainerId, Error};

/// The name of the pod and of its own container.
const POD: &str = "pod";
/// For what shall not be waited for.
const LONG: Duration = Duration::from_secs(60);
/// For what shall. The other calls of such a test must come through in it.
const SHORT: Duration = Duration::from_secs(2);

/// A host with a driver.
struct World {
    root: tempfile::TempDir,
    driver: FakeDriver,
    /// Of each call and of host work.
    limit: Duration,
}

/// A pod that runs.
struct Pod {
    sandbox: Sandbox,
    events: mpsc::UnboundedReceiver<Event>,
}

impl World {
    /// `None` for a user who may not make namespaces.
    fn new(limit: Duration) -> Option<Self> {
        if !std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0) {
            eprintln!("not tried: only root may make namespaces");
            return None;
        }
        Some(Self { root: tempfile::tempdir().expect("a folder"), driver: FakeDriver::new(), limit })
    }

    fn run_folder(&self) -> PathBuf {
        self.root.path().join("run")
    }

    fn run(&self) -> RunDir {
        RunDir::create(&self.run_folder(), Path::new("/bundle")).expect("made")
    }

    fn env(&self) -> Env {
        let text = "[hypervisor.qemu]\nshared_fs = \"none\"\n[runtime]\ninternetworking_model = \"none\"\n\
                    disable_new_netns = true\n";
        let mut config = config::Config::parse(text, Path::new("/c")).expect("right");
        config.agent.request_timeout = self.limit;
        config.agent.dial_timeout = self.limit;
        config.runtime.create_container_timeout = self.limit;
        Env { config, hypervisor: Box::new(self.driver.clone()) }
    }

    /// A container of the pod; its root file system is a disk.
    fn container(&self, id: &str) -> ContainerSpec {
        let bundle = self.root.path().join("bundles").join(id);
        fs::create_dir_all(&bundle).expect("made");
        let is_pod = id == POD;
        let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": namespaces},
            "annotations": {
                "io.kubernetes.cri.container-type": if is_pod { "sandbox" } else { "container" },
                "io.kubernetes.cri.sandbox-id": POD,
            },
        });
        fs::write(bundle.join("config.json"), spec.to_string()).expect("written");
        let disk = bundle.join("disk");
        fs::write(&disk, "a disk").expect("written");
        let disk = RootfsMount { kind: "ext4".into(), source: disk.display().to_string(), options: Vec::new() };
        let rootfs = if is_pod { Vec::new() } else { vec![disk] };
        ContainerSpec { id: name(id).container, bundle, rootfs, stdio: Stdio::default() }
    }

    /// Starts the pod in this run folder, unless `cancelled` is told.
    async fn try_start(&self, run: RunDir, cancelled: &Notify) -> Result<Pod, FailedStart> {
        let (tell, events) = mpsc::unbounded_channel();
        let spec = SandboxSpec { id: name(POD).container, namespace: "tests".into(), run };
        let first = self.container(POD);
        let sandbox = Sandbox::start(self.env(), spec, first, tell, &Trace::default(), cancelled).await?;
        Ok(Pod { sandbox, events })
    }

    /// One whose containers `ids` are made.
    async fn pod(&self, ids: &[&str]) -> Pod {
        let pod = self.try_start(self.run(), &Notify::new()).await.map_err(|failed| failed.error).expect("started");
        for id in ids {
            pod.sandbox.create_container(self.container(id)).await.expect("made");
        }
        pod
    }

    /// Nothing of any pod is there.
    fn is_clean(&self) {
        assert_eq!(self.driver.alive(), 0, "VMs");
        assert!(!self.run_folder().exists(), "{:?}", fs::read_dir(self.run_folder()).map(Iterator::collect::<Vec<_>>));
    }
}

impl Pod {
    /// Ends it, and finds nothing of it.
    async fn ends(self, world: &World) {
        self.sandbox.stop().await.expect("stopped");
        world.is_clean();
    }
}

fn name(id: &str) -> ProcessRef {
    ProcessRef { container: ContainerId::try_from(id).expect("an id"), exec: None }
}

/// In words, for comparing.
fn words<T>(outcome: Result<T, Error>) -> String {
    outcome.err().map(|error| error.to_string()).unwrap_or_default()
}
