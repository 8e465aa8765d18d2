//! The server process: serves the Task API on the socket that `start` made, until containerd says that it is done.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc::r#async::Server;
use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use runtime::cleanup::RunDir;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::Args;
use crate::bootstrap;
use crate::events::Publisher;
use crate::task::TaskService;

/// The name that containerd before 2.0 calls; the messages are the same as those of v3.
const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

pub(crate) fn run(args: &Args) -> Result<()> {
    let (listener, ready) = bootstrap::inherited()?;
    crate::logger::init(&args.id, args.debug);
    // one thread: a pod's traffic is small, and what blocks goes elsewhere
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("creating the async runtime")?;
    let served = runtime.block_on(serve(args, listener, ready));
    // a job on a file system that does not answer must not keep the process, which would wait for it otherwise
    runtime.shutdown_background();
    served
}

async fn serve(args: &Args, listener: UnixListener, ready: std::fs::File) -> Result<()> {
    let (id, run_dir) = bootstrap::run_dir(args)?;
    // from here on `delete` finds this process
    let run = std::env::current_dir()
        .and_then(|bundle| RunDir::create(&run_dir, &bundle))
        .with_context(|| format!("reading the run folder {}", run_dir.display()));
    let run = match run {
        Ok(run) => run,
        Err(error) => {
            bootstrap::tell(ready, &format!("{error:#}"))?;
            return Err(error);
        }
    };
    let socket = listener.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
    let publisher = Publisher::start(std::env::var("TTRPC_ADDRESS").unwrap_or_default(), args.namespace.clone());
    let service = TaskService::new(id, args.namespace.clone(), run, publisher);
    let done = Arc::clone(&service.done);
    let service = Arc::new(service);
    let mut services = create_task(Arc::clone(&service) as Arc<dyn Task + Send + Sync>);
    let mut again = create_task(Arc::clone(&service) as Arc<dyn Task + Send + Sync>);
    services.extend(again.remove(TASK_V3).map(|v3| (TASK_V2.to_owned(), v3)));
    let listener = Listener::try_from(listener).context("taking over the socket")?;
    let mut server = Server::new().add_listener(listener).register_service(services);
    server.start().await.context("starting the ttRPC server")?;
    // a `start` that was killed leaves nobody who could be asked for anything
    if let Err(gone) = bootstrap::tell(ready, bootstrap::READY) {
        service.give_up();
        return Err(gone);
    }
    log::debug!("serving");

    // a service manager's TERM is for containerd; a pod ends when containerd ends it
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        tokio::select! {
            () = done.notified() => break,
            _ = terminate.recv() => log::info!("SIGTERM is ignored: delete the pod's tasks through containerd"),
            _ = interrupt.recv() => {}
        }
    }
    // the answer to `Shutdown` is on its way
    let _ = tokio::time::timeout(Duration::from_millis(200), server.shutdown()).await;
    if let Some(socket) = socket {
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}
