//! A container: its cgroup, its first process and the ones added to it.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::oci;
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use tokio::sync::watch;

use crate::cgroup::{self, Cgroup};
use crate::error::Error;
use crate::io::Stdio;
use crate::launcher::{self, Launch, Namespaces, Place};
use crate::process::Process;
use crate::reaper::Reaper;
use crate::sysctl;

/// A container of this guest.
#[derive(Debug)]
pub(crate) struct Container {
    spec: oci::Spec,
    pub(crate) cgroup: Cgroup,
    init: Arc<Process>,
    /// Written to start it.
    go: Mutex<Option<OwnedFd>>,
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
    /// Mount points of its own storages.
    pub(crate) mounts: Vec<String>,
    /// Its volumes in the share.
    pub(crate) volumes: Vec<String>,
    /// It only holds namespaces: it has no files in which a program could run.
    holder: bool,
    /// Its mounts, which must outlive its processes: what they have asked of virtio-fs ahead may still be on its way, and
    /// the kernel (6.12, `fuse_readpages_end`) dies of an answer for a file system that is gone with its last mount.
    mounted: Mutex<Option<File>>,
}

/// What is to be made of a specification.
pub(crate) struct Plan {
    pub(crate) spec: oci::Spec,
    /// It has another host name than the pod.
    pub(crate) own_hostname: bool,
    /// Its storages' mount points.
    pub(crate) mounts: Vec<String>,
    /// Its volumes in the share.
    pub(crate) volumes: Vec<String>,
    /// It only holds namespaces.
    pub(crate) holder: bool,
    /// The process whose PID namespace it joins.
    pub(crate) pids_of: Option<Arc<Process>>,
    /// Folders that are mounts of their own below read-only ones.
    pub(crate) submounts: Vec<String>,
}

impl Container {
    /// Whether it runs no program.
    pub(crate) fn is_holder(&self) -> bool {
        self.holder
    }

    /// Makes everything up to the program's execution. `ready` gives a cgroup where there is one.
    pub(crate) async fn create(
        id: &str,
        plan: Plan,
        ready: impl FnOnce() -> Option<Cgroup>,
        reaper: &Reaper,
    ) -> Result<Self, Error> {
        let Plan { spec, own_hostname, mounts, volumes, holder, pids_of, submounts } = plan;
        let resources = spec.Linux.Resources.as_ref();
        if spec.Mounts.iter().any(divides) {
            cgroup::delegate_all().map_err(Error::failed("cgroup controllers"))?;
        }
        let ready = if cgroup::are_plain(resources) { ready() } else { None };
        let cgroup = ready.map_or_else(|| Cgroup::create(id, resources), |cgroup| cgroup.fill(resources))?;
        let place = Place { folder: cgroup.folder(), of_first: None };
        let (go_child, go) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(Error::failed("start pipe"))?;
        let (stdio, streams) = streams(&spec.Process)?;
        launcher::allow_descriptors(&spec.Process)?;
        let joins = pids_of.is_some();
        let what = if holder {
            // the pod's, for which the other containers have none of their own; its namespaces are the VM's
            sysctl::set(&spec.Linux.Sysctl).map_err(Error::Failed)?;
            Launch::Holder { go: go_child }
        } else {
            let pids = pids_of.map(|process| launcher::pid_namespace(process.pid)).transpose()?;
            Launch::Container { id, spec: &spec, go: go_child, own_hostname, pids, submounts: &submounts }
        };
        let launched = launcher::launch(what, streams, place, reaper).await?;
        if joins {
            // a namespace of its own would end with its first process, and everything in it
            tokio::spawn(kill_after(launched.exit.clone(), cgroup.killer()?));
        }
        let stdio = with_terminal(stdio, launched.terminal)?;
        let mounted = Mutex::new((!holder).then(|| launcher::mount_namespace(launched.pid)).transpose()?);
        let init = Arc::new(Process::new(launched.pid, stdio, launched.exit));
        let (go, execs) = (Mutex::new(Some(go)), Mutex::default());
        Ok(Self { spec, cgroup, init, go, execs, mounts, volumes, holder, mounted })
    }

    /// Lets the first process execute its program.
    pub(crate) fn start(&self) -> Result<(), Error> {
        let go = self.go.lock().unwrap_or_else(PoisonError::into_inner).take();
        let go = go.ok_or_else(|| Error::State("cannot start a container that was started already".into()))?;
        std::fs::File::from(go).write_all(b"g").map_err(Error::failed("starting the container"))
    }

    /// Lets its mounts go, once it has ended and all that it has asked of the host is answered.
    pub(crate) fn unmount(&self) {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Adds a process and waits until it has executed its program.
    pub(crate) async fn exec(&self, exec: &str, process: &oci::Process, reaper: &Reaper) -> Result<(), Error> {
        if self.holder {
            return Err(Error::State(
                "cannot exec in a pod's sandbox container, which has no root file system: use another container of the pod".into(),
            ));
        }
        if self.go.lock().unwrap_or_else(PoisonError::into_inner).is_some() || self.init.has_ended() {
            return Err(Error::State("cannot exec in a stopped container".into()));
        }
        // a process that begins there would stand still before it could tell anything
        if self.cgroup.is_frozen() {
            return Err(Error::State("cannot exec in a paused container".into()));
        }
        {
            let mut execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
            if execs.contains_key(exec) {
                return Err(Error::Exists(format!("process {exec}")));
            }
            execs.insert(exec.to_owned(), None);
        }
        let launched = self.launch_exec(process, reaper).await;
        let mut execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        match launched {
            Ok(process) => {
                execs.insert(exec.to_owned(), Some(Arc::new(process)));
                Ok(())
            }
            Err(error) => {
                execs.remove(exec);
                Err(error)
            }
        }
    }

    async fn launch_exec(&self, process: &oci::Process, reaper: &Reaper) -> Result<Process, Error> {
        let process = &completed(process, &self.spec.Process);
        launcher::allow_descriptors(process)?;
        let (stdio, streams) = streams(process)?;
        let namespaces = Namespaces::of(self.init.pid)?;
        let place = Place { folder: self.cgroup.folder(), of_first: Some(self.init.pid) };
        let what = Launch::Exec { spec: &self.spec, process, namespaces };
        let launched = launcher::launch(what, streams, place, reaper).await?;
        Ok(Process::new(launched.pid, with_terminal(stdio, launched.terminal)?, launched.exit))
    }

    /// Its first process.
    pub(crate) fn init(&self) -> Arc<Process> {
        Arc::clone(&self.init)
    }

    /// The first process for an empty name or the container's own, else an exec.
    pub(crate) fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>, Error> {
        if exec.is_empty() || exec == id {
            return Ok(Arc::clone(&self.init));
        }
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        execs.get(exec).cloned().flatten().ok_or_else(|| Error::NotFound(format!("process {exec} in container {id}")))
    }

    /// Forgets an exec whose end and last output have been fetched.
    pub(crate) fn forget(&self, exec: &str, process: &Process) {
        if process.is_over() {
            self.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(exec);
        }
    }

    /// Ends everything in it and waits until its first process is gone.
    pub(crate) async fn end(&self) -> Result<(), Error> {
        self.cgroup.end().await?;
        self.init.wait().await;
        Ok(())
    }
}

async fn kill_after(mut exit: watch::Receiver<Option<i32>>, mut killer: std::fs::File) {
    let _ = exit.wait_for(Option::is_some).await;
    // gone already: then nothing is left to kill
    let _ = killer.write_all(b"1");
}

/// Whether this lets the container write into its cgroup.
fn divides(mount: &oci::Mount) -> bool {
    let flags = launcher::options::parse(&mount.options).flags;
    matches!(mount.type_.as_str(), "cgroup" | "cgroup2") && !flags.contains(MsFlags::MS_RDONLY)
}

/// An exec has what it does not say of the container's, as with runc.
fn completed(exec: &oci::Process, of_container: &oci::Process) -> oci::Process {
    let mut process = exec.clone();
    if process.Rlimits.is_empty() {
        process.Rlimits.clone_from(&of_container.Rlimits);
    }
    if process.Capabilities.is_none() {
        process.Capabilities.clone_from(&of_container.Capabilities);
    }
    process
}

fn streams(process: &oci::Process) -> Result<(Option<Stdio>, Option<launcher::Streams>), Error> {
    if process.Terminal {
        return Ok((None, None));
    }
    let (ours, childs) = Stdio::pipes(!process.NoStdin)?;
    Ok((Some(ours), Some(childs)))
}

fn with_terminal(stdio: Option<Stdio>, terminal: Option<OwnedFd>) -> Result<Stdio, Error> {
    match (stdio, terminal) {
        (Some(stdio), _) => Ok(stdio),
        (None, Some(master)) => Stdio::terminal(master),
        (None, None) => Err(Error::Failed("the process did not create its terminal".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_has_its_containers_limits_unless_it_says_some() {
        let limit = |soft| oci::POSIXRlimit { Type: "RLIMIT_CORE".into(), Soft: soft, ..Default::default() };
        let of_container = oci::Process {
            Rlimits: vec![limit(1)],
            Capabilities: Some(oci::LinuxCapabilities { Bounding: vec!["CAP_KILL".into()], ..Default::default() })
                .into(),
            ..Default::default()
        };
        let silent = completed(&oci::Process::default(), &of_container);
        assert_eq!((silent.Rlimits, silent.Capabilities.Bounding.len()), (vec![limit(1)], 1));
        let own = oci::Process {
            Rlimits: vec![limit(2)],
            Capabilities: Some(oci::LinuxCapabilities::default()).into(),
            ..Default::default()
        };
        let own = completed(&own, &of_container);
        assert_eq!((own.Rlimits, own.Capabilities.Bounding.len()), (vec![limit(2)], 0));
    }

    #[test]
    fn the_last_word_decides_whether_a_cgroup_is_divided() {
        let divided = |kind: &str, options: &[&str]| {
            let options = options.iter().map(ToString::to_string).collect();
            divides(&oci::Mount { type_: kind.into(), options, ..Default::default() })
        };
        assert!(divided("cgroup", &["nosuid"]) && divided("cgroup2", &["ro", "rw"]));
        assert!(!divided("cgroup", &["rw", "ro"]) && !divided("tmpfs", &["rw"]));
    }
}
