//! containerd's Task API: every method converts, makes one call, converts back and tells the event.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task as event;
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use runtime::cleanup::RunDir;
use runtime::trace::Trace;
use runtime::{
    ContainerId, ContainerSpec, Deleted, Env, Error, ExecSpec, FailedStart, ProcessRef, RootfsMount, Sandbox,
    SandboxSpec, Stdio,
};
use tokio::sync::{Notify, mpsc, watch};

use crate::convert::{self, Rpc, rpc_error, status, timestamp};
use crate::events::Publisher;
use crate::metrics;

/// The pod behind the API.
pub(crate) struct TaskService {
    id: ContainerId,
    namespace: String,
    folder: Folder,
    pod: Arc<watch::Sender<Pod>>,
    publisher: Publisher,
    /// Told when the server shall end.
    pub(crate) done: Arc<Notify>,
}

/// How far the pod is. No call but the one that makes it waits for its start: a containerd that was restarted in the
/// middle of one must learn at once that there is no task.
///
/// ```text
///       first Create             VM runs, container made
/// None --------------> Starting ------------------------> Ready: another Create adds a container
///  |  ^                   |                                 |
///  |  +-------------------+                                 | the last container is deleted:
///  |    failed, or cancelled by Shutdown:                   | the VM ends, the undo journal is run
///  |    the undo journal is run                             v
///  |                                                      Ready, without a container
///  |                                                        |
///  +--------------------------+-----------------------------+
///                             | Shutdown
///                             v
///                   the run folder goes, the server ends
/// ```
///
/// When the VM ends by itself, the pod stays `Ready` and its processes are stopped; each container is deleted as usual.
#[derive(Clone)]
enum Pod {
    None,
    /// Told to give up.
    Starting(Arc<Notify>),
    Ready(Sandbox),
}

/// The pod's run folder: the server's from its first moment, then the sandbox's.
#[derive(Clone)]
struct Folder {
    path: PathBuf,
    unused: Arc<Mutex<Option<RunDir>>>,
}

impl Folder {
    fn unused(&self) -> Option<RunDir> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// For a sandbox; made anew where a start before this failed, and could not be undone at once. May block then.
    fn take(&self, bundle: &Path) -> Result<RunDir, Error> {
        self.unused().map_or_else(
            || {
                let what = format!("creating the run folder {}", self.path.display());
                RunDir::create(&self.path, bundle).map_err(|source| Error::Host { what, source })
            },
            Ok,
        )
    }

    /// After a start that failed: `delete` finds this process by it, should nobody be left who asks for its end.
    fn give_back(&self, failed: FailedStart) -> Error {
        *self.unused.lock().unwrap_or_else(PoisonError::into_inner) = failed.run;
        failed.error
    }

    /// When there never was a sandbox.
    fn remove(&self) {
        if let Some(Err(error)) = self.unused().map(|run| run.undo()) {
            log::error!("run folder {}: {error}", self.path.display());
        }
    }
}

impl TaskService {
    pub(crate) fn new(id: ContainerId, namespace: String, run: RunDir, publisher: Publisher) -> Self {
        let folder = Folder { path: run.path().to_owned(), unused: Arc::new(Mutex::new(Some(run))) };
        let pod = Arc::new(watch::Sender::new(Pod::None));
        Self { id, namespace, folder, pod, publisher, done: Arc::new(Notify::new()) }
    }

    /// The server ends before it was asked for anything.
    pub(crate) fn give_up(&self) {
        self.folder.remove();
    }

    fn sandbox(&self) -> Rpc<Sandbox> {
        match &*self.pod.borrow() {
            Pod::Ready(sandbox) => Ok(sandbox.clone()),
            Pod::None | Pod::Starting(_) => Err(rpc_error(Code::NOT_FOUND, "no such task: not found")),
        }
    }

    /// The pod, once the container's making is over: its creator may have gone away, a killed client or containerd.
    async fn settled(&self, name: &ProcessRef) -> Rpc<Sandbox> {
        let sandbox = self.sandbox()?;
        sandbox.settled(&name.container).await;
        Ok(sandbox)
    }

    /// The pod's first container makes the pod; the others join it.
    async fn make(&self, request: &CreateTaskRequest) -> Result<u32, Error> {
        let spec = container_spec(request)?;
        let cancelled = Arc::new(Notify::new());
        let mut before = Pod::None;
        self.pod.send_if_modified(|pod| {
            before = pod.clone();
            let first = matches!(pod, Pod::None);
            if first {
                *pod = Pod::Starting(Arc::clone(&cancelled));
            }
            first
        });
        match before {
            Pod::None => {}
            Pod::Starting(_) => return Err(Error::Exists(format!("sandbox {}, which is starting", self.id))),
            Pod::Ready(sandbox) => {
                let id = spec.id.clone();
                sandbox.create_container(spec).await?;
                return sandbox.pid(&id);
            }
        }
        let (id, first, folder) = (self.id.clone(), spec.id.clone(), self.folder.clone());
        let namespace = self.namespace.clone();
        let path = convert::config_path(request.options.as_ref());
        let (pod, publisher) = (Arc::clone(&self.pod), self.publisher.clone());
        // a task of its own: a caller that goes away must not leave half a pod
        let start = tokio::spawn(async move {
            let started = start_pod((id, namespace), folder, spec, path, publisher, &cancelled).await;
            pod.send_replace(started.as_ref().map_or(Pod::None, |sandbox| Pod::Ready(sandbox.clone())));
            started
        });
        let sandbox = start
            .await
            .map_err(|error| Error::WrongState(format!("the start of the sandbox failed unexpectedly: {error}")))??;
        sandbox.pid(&first)
    }
}

async fn start_pod(
    (id, namespace): (ContainerId, String),
    folder: Folder,
    first: ContainerSpec,
    config: Option<String>,
    publisher: Publisher,
    cancelled: &Notify,
) -> Result<Sandbox, Error> {
    let trace = Trace::default();
    let config = tokio::task::spawn_blocking(move || config::Config::load(config.as_deref().map(AsRef::as_ref)))
        .await
        .map_err(|error| Error::Invalid(format!("reading the configuration: {error}")))??;
    crate::logger::more(config.runtime.enable_debug);
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    for notice in &config.notices {
        log::info!("{notice}");
    }
    trace.step("configuration");
    let hypervisor = runtime::driver(&config);
    let run = {
        let (folder, bundle) = (folder.clone(), first.bundle.clone());
        let taken = tokio::task::spawn_blocking(move || folder.take(&bundle)).await;
        taken.unwrap_or_else(|lost| Err(Error::WrongState(format!("the run folder: {lost}"))))?
    };
    let sandbox = SandboxSpec { id, namespace, run };
    let (events_to, events) = mpsc::unbounded_channel();
    let started = Sandbox::start(Env { config, hypervisor }, sandbox, first, events_to, &trace, cancelled).await;
    let sandbox = started.map_err(|failed| folder.give_back(failed))?;
    trace.log();
    tokio::spawn(publisher.follow(events));
    Ok(sandbox)
}

fn container_spec(request: &CreateTaskRequest) -> Result<ContainerSpec, Error> {
    if !request.checkpoint.is_empty() {
        return Err(Error::Unsupported("restoring from a checkpoint is not supported".into()));
    }
    let mounts = request.rootfs.iter().map(|mount| RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    });
    Ok(ContainerSpec {
        id: ContainerId::try_from(request.id.as_str())?,
        bundle: PathBuf::from(&request.bundle),
        rootfs: mounts.collect(),
        stdio: Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        },
    })
}

/// What went wrong, with runc's words in front, which people and tests look for.
fn worded(prefix: &'static str) -> impl Fn(Error) -> containerd_shim_protos::ttrpc::Error {
    move |error| match &error {
        Error::Agent { code, message } => rpc_error(*code, format!("{prefix}: {message}")),
        _ => status(&error),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn plain(error: Error) -> containerd_shim_protos::ttrpc::Error {
    log::debug!("{error}");
    status(&error)
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Rpc<StateResponse> {
        let name = convert::process(&request.id, &request.exec_id)?;
        let sandbox = self.settled(&name).await?;
        let view = sandbox.view(&name).map_err(plain)?;
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: view.bundle.display().to_string(),
            pid: view.pid,
            status: EnumOrUnknown::new(convert::wire_status(view.status)),
            stdin: view.stdio.stdin,
            stdout: view.stdio.stdout,
            stderr: view.stdio.stderr,
            terminal: view.stdio.terminal,
            exit_status: view.exit.map_or(0, |exit| exit.status),
            exited_at: view.exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Rpc<CreateTaskResponse> {
        log::info!("creating container {:.80}", request.id);
        let pid = match self.make(&request).await {
            Ok(pid) => pid,
            Err(error) => {
                log::error!("creating container {:.80}: {error}", request.id);
                return Err(worded("OCI runtime create failed: runc create failed")(error));
            }
        };
        let io = event::TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        };
        let created = event::TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            io: MessageField::some(io),
            pid,
            ..Default::default()
        };
        self.publisher.publish("/tasks/create", &created);
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Rpc<StartResponse> {
        let name = convert::process(&request.id, &request.exec_id)?;
        let sandbox = self.sandbox()?;
        let prefix = match name.exec {
            None => "OCI runtime start failed",
            Some(_) => "OCI runtime exec failed: exec failed",
        };
        let pid = sandbox.pid(&name.container).map_err(plain)?;
        let started_process = sandbox.start_process(&name).await.map_err(worded(prefix))?;
        if name.exec.is_none() {
            let started = event::TaskStart { container_id: request.id, pid, ..Default::default() };
            self.publisher.publish("/tasks/start", &started);
        } else {
            let started = event::TaskExecStarted {
                container_id: request.id,
                exec_id: request.exec_id,
                pid,
                ..Default::default()
            };
            self.publisher.publish("/tasks/exec-started", &started);
        }
        // the end of a quick process is told after its start
        drop(started_process);
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Rpc<DeleteResponse> {
        let name = convert::process(&request.id, &request.exec_id)?;
        let sandbox = self.sandbox()?;
        let Deleted { pid, exit } = sandbox.delete(&name).await.map_err(plain)?;
        let (status, at) = exit.map_or((0, std::time::SystemTime::now()), |exit| (exit.status, exit.at));
        if name.exec.is_none() {
            let deleted = event::TaskDelete {
                container_id: request.id.clone(),
                id: request.id,
                pid,
                exit_status: status,
                exited_at: MessageField::some(timestamp(at)),
                ..Default::default()
            };
            self.publisher.publish("/tasks/delete", &deleted);
        }
        Ok(DeleteResponse {
            pid,
            exit_status: status,
            exited_at: MessageField::some(timestamp(at)),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Rpc<PidsResponse> {
        let name = convert::process(&request.id, "")?;
        let pids = self.sandbox()?.pids(&name.container).map_err(plain)?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Rpc<Empty> {
        let name = convert::process(&request.id, "")?;
        self.sandbox()?.pause(&name.container).await.map_err(plain)?;
        let paused = event::TaskPaused { container_id: request.id, ..Default::default() };
        self.publisher.publish("/tasks/paused", &paused);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Rpc<Empty> {
        let name = convert::process(&request.id, "")?;
        self.sandbox()?.resume(&name.container).await.map_err(plain)?;
        let resumed = event::TaskResumed { container_id: request.id, ..Default::default() };
        self.publisher.publish("/tasks/resumed", &resumed);
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Rpc<Empty> {
        Err(rpc_error(Code::UNIMPLEMENTED, "checkpoint is not supported by the kata runtime"))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Rpc<Empty> {
        let name = convert::process(&request.id, &request.exec_id)?;
        self.settled(&name).await?.signal(&name, request.signal, request.all).await.map_err(plain)?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Rpc<Empty> {
        let process = convert::process(&request.id, &request.exec_id)?;
        let spec = convert::exec_spec(&request)?;
        let stdio =
            Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        self.sandbox()?.exec(ExecSpec { process, spec, stdio }).map_err(plain)?;
        let added = event::TaskExecAdded { container_id: request.id, exec_id: request.exec_id, ..Default::default() };
        self.publisher.publish("/tasks/exec-added", &added);
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Rpc<Empty> {
        let name = convert::process(&request.id, &request.exec_id)?;
        self.sandbox()?.resize(&name, request.width, request.height).await.map_err(plain)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Rpc<Empty> {
        let name = convert::process(&request.id, &request.exec_id)?;
        if request.stdin {
            self.sandbox()?.close_stdin(&name).map_err(plain)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Rpc<Empty> {
        let name = convert::process(&request.id, "")?;
        let limits = convert::limits(&request)?;
        self.sandbox()?.update(&name.container, &limits).await.map_err(plain)?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Rpc<WaitResponse> {
        let name = convert::process(&request.id, &request.exec_id)?;
        let exit = self.sandbox()?.wait(&name).await.map_err(plain)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Rpc<StatsResponse> {
        let name = convert::process(&request.id, "")?;
        let stats = self.sandbox()?.stats(&name.container).await.map_err(plain)?;
        let host_is_v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let stats = metrics::of(&stats, host_is_v2)?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    /// containerd asks this after its restart, for every bundle that it finds, and waits 5 s. A pod whose create it did not
    /// see ending is none: the answer makes it clean up with `delete`, and a second try begins on a clean host. A container
    /// that joins a pod is there as soon as it is being made; what is asked next waits for that.
    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Rpc<ConnectResponse> {
        let name = convert::process(&request.id, "")?;
        let sandbox = self.sandbox()?;
        sandbox.knows(&name.container).map_err(plain)?;
        // one that is still being made has none yet
        let task_pid = sandbox.pid(&name.container).unwrap_or_default();
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Rpc<Empty> {
        let pod = self.pod.borrow().clone();
        match pod {
            Pod::Starting(cancelled) => {
                cancelled.notify_one();
                let _ = self.pod.subscribe().wait_for(|pod| !matches!(pod, Pod::Starting(_))).await;
            }
            // a pod's other containers still run: containerd asks again with the last
            Pod::Ready(sandbox) if !sandbox.is_empty() => return Ok(Empty::new()),
            Pod::None | Pod::Ready(_) => {}
        }
        if let Ok(sandbox) = self.sandbox()
            && let Err(error) = sandbox.stop().await
        {
            log::error!("{error}");
        }
        // a pod that was never made
        self.folder.remove();
        self.publisher.flush(Duration::from_secs(2)).await;
        self.done.notify_one();
        Ok(Empty::new())
    }
}
