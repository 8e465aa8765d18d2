//! The agent's side of the protocol: one method a call, each converted, made and answered.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use agent_api::agent::{self as api};
use agent_api::agent_ttrpc::{AgentService, create_agent_service};
use agent_api::csi::VolumeStatsResponse;
use agent_api::health::{
    CheckRequest, HealthCheckResponse, VersionCheckResponse, health_check_response::ServingStatus,
};
use agent_api::health_ttrpc::{Health, create_health};
use agent_api::limits::STREAM_CHUNK;
use agent_api::port_ttrpc::create_port;
use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::resolver_ttrpc::create_resolver;
use agent_api::ttrpc;
use agent_api::ttrpc::r#async::{Server, TtrpcContext};
use agent_api::types::Interface;
use agent_api::wake_ttrpc::create_wake;
use async_trait::async_trait;

use crate::error::Error;
use crate::guest;
use crate::init;
use crate::io::Output;
use crate::network::Network;
use crate::oom::OomWatch;
use crate::params::Params;
use crate::port::Ports;
use crate::priority;
use crate::reaper::Reaper;
use crate::resolver::Names;
use crate::sandbox::Sandbox;
use crate::storage;
use crate::transport;
use crate::volume;
use crate::wake::Waking;

type Rpc<T> = ttrpc::Result<T>;

/// Serves for as long as the machine runs. Whoever started the machine ends it: after `DestroySandbox` everything is on
/// the host, and a machine that switched itself off could do so before its answer is out.
pub(crate) async fn run(params: &Params) -> Result<std::convert::Infallible, Error> {
    // first of all, so that the host's answer and the rest of our start pass at the same time
    let listener = transport::listen(params).map_err(Error::failed("opening the agent's channel"))?;
    crate::log::debug("listening");
    init::finish().map_err(Error::failed("preparing the guest"))?;
    transport::serve_log(params);
    if let Err(error) = priority::raise() {
        crate::log::warn(&format!(
            "cannot raise the agent's scheduling priority, so busy containers can delay its answers: {error}"
        ));
    }
    let reaper = Reaper::start().map_err(Error::failed("starting to reap child processes"))?;
    let oom = OomWatch::start().map_err(Error::failed("starting to watch for OOM kills"))?;
    let sandbox = Arc::new(Sandbox::new(reaper, oom, params.hotplug_timeout));
    let service = Arc::new(Service {
        sandbox: Arc::clone(&sandbox),
        network: OnceLock::new(),
        hotplug_timeout: params.hotplug_timeout,
    });
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(create_agent_service(service))
        .register_service(create_health(Arc::new(Liveness)))
        .register_service(create_port(Arc::new(Ports::default())))
        .register_service(create_resolver(Arc::new(Names::default())))
        .register_service(create_wake(Arc::new(Waking::default())));
    server.start().await.map_err(Error::failed("serving"))?;
    transport::tell_ready(params);
    crate::log::debug("serving");
    // the host's first request is on its way
    sandbox.prepare();
    std::future::pending().await
}

struct Service {
    sandbox: Arc<Sandbox>,
    network: OnceLock<Network>,
    hotplug_timeout: Duration,
}

impl Service {
    /// Opened with the first call: a pod without a network needs no netlink socket.
    fn network(&self) -> Result<&Network, Error> {
        if let Some(network) = self.network.get() {
            return Ok(network);
        }
        let opened = Network::open(self.hotplug_timeout).map_err(Error::failed("netlink socket"))?;
        Ok(self.network.get_or_init(|| opened))
    }

    fn read_size(len: u32) -> usize {
        (len as usize).clamp(1, STREAM_CHUNK)
    }

    async fn read(&self, request: api::ReadStreamRequest, which: Output) -> Rpc<api::ReadStreamResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let process = container.process(&request.container_id, &request.exec_id)?;
        let data = process.stdio.read(which, Self::read_size(request.len)).await?;
        if data.is_empty() {
            container.forget(&request.exec_id, &process);
        }
        Ok(api::ReadStreamResponse { data, ..Default::default() })
    }
}

// Calls that are not here are answered with UNIMPLEMENTED and their name (agent-api's build.rs).
#[async_trait]
impl AgentService for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: api::CreateSandboxRequest) -> Rpc<Empty> {
        self.sandbox.create(&request).await?;
        crate::log::debug("the sandbox is made");
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: api::DestroySandboxRequest) -> Rpc<Empty> {
        self.sandbox.destroy().await;
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: api::CreateContainerRequest) -> Rpc<Empty> {
        self.sandbox.create_container(request).await?;
        crate::log::debug("a container is made");
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, request: api::StartContainerRequest) -> Rpc<Empty> {
        self.sandbox.start_container(&request.container_id)?;
        crate::log::debug("a container is started");
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: api::RemoveContainerRequest) -> Rpc<Empty> {
        let removal = self.sandbox.remove_container(&request.container_id);
        if request.timeout == 0 {
            removal.await?;
        } else {
            let limit = Duration::from_secs(request.timeout.into());
            tokio::time::timeout(limit, removal)
                .await
                .map_err(|_| Error::Failed(format!("the container was not removed within {limit:?}")))??;
        }
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Rpc<Empty> {
        self.sandbox.exec(&request).await?;
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: api::SignalProcessRequest) -> Rpc<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        if request.exec_id.is_empty() {
            // every process of the container
            if request.signal == libc::SIGKILL as u32 {
                container.cgroup.kill()?;
            } else {
                for pid in container.cgroup.pids() {
                    let pid = nix::unistd::Pid::from_raw(pid as i32);
                    let signal = nix::sys::signal::Signal::try_from(request.signal as i32)
                        .map_err(Error::failed(format!("signal {}", request.signal)))?;
                    match nix::sys::signal::kill(pid, signal) {
                        Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                        Err(errno) => return Err(Error::Failed(format!("signal: {errno}")).into()),
                    }
                }
            }
            return Ok(Empty::new());
        }
        let process = container.process(&request.container_id, &request.exec_id)?;
        if request.signal == libc::SIGKILL as u32 && Arc::ptr_eq(&process, &container.init()) {
            // with it all others end, but not before it has its turn, and till then they make more
            if let Err(error) = container.cgroup.kill() {
                crate::log::debug(&error.to_string());
            }
        }
        process.signal(request.signal)?;
        Ok(Empty::new())
    }

    async fn wait_process(&self, _: &TtrpcContext, request: api::WaitProcessRequest) -> Rpc<api::WaitProcessResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let process = container.process(&request.container_id, &request.exec_id)?;
        let status = process.tell().await;
        if Arc::ptr_eq(&process, &container.init()) {
            // why, before that it ended; with another process's end nothing goes that the kernel tells of later
            self.sandbox.oom.told(&request.container_id).await;
        }
        container.forget(&request.exec_id, &process);
        Ok(api::WaitProcessResponse { status, ..Default::default() })
    }

    async fn update_container(&self, _: &TtrpcContext, request: api::UpdateContainerRequest) -> Rpc<Empty> {
        // an error for one that is not there, whatever is asked
        self.sandbox.container(&request.container_id)?;
        if let Some(resources) = request.resources.as_ref() {
            self.sandbox.limit(&request.container_id, resources)?;
        }
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: api::StatsContainerRequest,
    ) -> Rpc<api::StatsContainerResponse> {
        let stats = self.sandbox.container(&request.container_id)?.cgroup.stats();
        Ok(api::StatsContainerResponse { cgroup_stats: Some(stats).into(), ..Default::default() })
    }

    async fn pause_container(&self, _: &TtrpcContext, request: api::PauseContainerRequest) -> Rpc<Empty> {
        self.sandbox.container(&request.container_id)?.cgroup.freeze(true)?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: api::ResumeContainerRequest) -> Rpc<Empty> {
        self.sandbox.container(&request.container_id)?.cgroup.freeze(false)?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: api::ListProcessesRequest,
    ) -> Rpc<api::ListProcessesResponse> {
        if !matches!(request.format.as_str(), "" | "json") {
            return Err(Error::Unsupported(format!("the process list format {:?}", request.format)).into());
        }
        let pids = self.sandbox.container(&request.container_id)?.cgroup.pids();
        let text: Vec<_> = pids.iter().map(ToString::to_string).collect();
        let process_list = format!("[{}]", text.join(",")).into_bytes();
        Ok(api::ListProcessesResponse { process_list, ..Default::default() })
    }

    async fn write_stdin(&self, _: &TtrpcContext, request: api::WriteStreamRequest) -> Rpc<api::WriteStreamResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let process = container.process(&request.container_id, &request.exec_id)?;
        if request.data.is_empty() {
            process.stdio.close_stdin().await;
            return Ok(api::WriteStreamResponse::new());
        }
        // a process that has ended never takes it
        let len = tokio::select! {
            biased;
            written = process.stdio.write(&request.data) => written?,
            _ = process.wait() => return Err(Error::State("the process has exited".into()).into()),
        };
        Ok(api::WriteStreamResponse { len: len as u32, ..Default::default() })
    }

    async fn read_stdout(&self, _: &TtrpcContext, request: api::ReadStreamRequest) -> Rpc<api::ReadStreamResponse> {
        self.read(request, Output::Stdout).await
    }

    async fn read_stderr(&self, _: &TtrpcContext, request: api::ReadStreamRequest) -> Rpc<api::ReadStreamResponse> {
        self.read(request, Output::Stderr).await
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: api::CloseStdinRequest) -> Rpc<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        container.process(&request.container_id, &request.exec_id)?.stdio.close_stdin().await;
        Ok(Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, request: api::TtyWinResizeRequest) -> Rpc<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        container.process(&request.container_id, &request.exec_id)?.stdio.resize(request.row, request.column)?;
        Ok(Empty::new())
    }

    async fn update_interface(&self, _: &TtrpcContext, request: api::UpdateInterfaceRequest) -> Rpc<Interface> {
        Ok(self.network()?.update_interface(request.interface.unwrap_or_default()).await?)
    }

    async fn update_routes(&self, _: &TtrpcContext, request: api::UpdateRoutesRequest) -> Rpc<api::Routes> {
        Ok(self.network()?.update_routes(request.routes.unwrap_or_default()).await?)
    }

    async fn list_interfaces(&self, _: &TtrpcContext, _: api::ListInterfacesRequest) -> Rpc<api::Interfaces> {
        Ok(self.network()?.interfaces().await?)
    }

    async fn list_routes(&self, _: &TtrpcContext, _: api::ListRoutesRequest) -> Rpc<api::Routes> {
        Ok(self.network()?.routes().await?)
    }

    async fn add_arp_neighbors(&self, _: &TtrpcContext, request: api::AddARPNeighborsRequest) -> Rpc<Empty> {
        self.network()?.update_neighbours(request.neighbors.unwrap_or_default()).await?;
        Ok(Empty::new())
    }

    async fn online_cpu_mem(&self, _: &TtrpcContext, request: api::OnlineCPUMemRequest) -> Rpc<Empty> {
        guest::online(request.nb_cpus, request.cpu_only)
            .map_err(Error::failed("bringing processors and memory online"))?;
        Ok(Empty::new())
    }

    async fn reseed_random_dev(&self, _: &TtrpcContext, request: api::ReseedRandomDevRequest) -> Rpc<Empty> {
        guest::random_device()
            .and_then(|mut device| guest::reseed(&mut device, &request.data))
            .map_err(Error::failed("reseeding the random device"))?;
        Ok(Empty::new())
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        request: api::GuestDetailsRequest,
    ) -> Rpc<api::GuestDetailsResponse> {
        let (size, probe) = guest::memory_blocks();
        Ok(api::GuestDetailsResponse {
            mem_block_size_bytes: if request.mem_block_size { size } else { 0 },
            support_mem_hotplug_probe: request.mem_hotplug_probe && probe,
            agent_details: Some(api::AgentDetails {
                version: env!("CARGO_PKG_VERSION").into(),
                init_daemon: true,
                device_handlers: ["blk", "scsi"].map(String::from).into(),
                storage_handlers: storage::DRIVERS.map(String::from).into(),
                supports_seccomp: true,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
    }

    async fn set_guest_date_time(&self, _: &TtrpcContext, request: api::SetGuestDateTimeRequest) -> Rpc<Empty> {
        guest::set_clock(request.Sec, request.Usec).map_err(Error::failed("clock"))?;
        Ok(Empty::new())
    }

    async fn refresh_volume(&self, _: &TtrpcContext, volume: api::WatchedVolume) -> Rpc<Empty> {
        self.sandbox.watched.refresh(&volume)?;
        Ok(Empty::new())
    }

    async fn get_volume_stats(&self, _: &TtrpcContext, request: api::VolumeStatsRequest) -> Rpc<VolumeStatsResponse> {
        Ok(volume::stats(&request.volume_guest_path)?)
    }

    async fn resize_volume(&self, _: &TtrpcContext, request: api::ResizeVolumeRequest) -> Rpc<Empty> {
        volume::grow(&request.volume_guest_path, request.size, self.hotplug_timeout).await?;
        Ok(Empty::new())
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: api::GetOOMEventRequest) -> Rpc<api::OOMEvent> {
        let container_id = self.sandbox.oom.next().await;
        Ok(api::OOMEvent { container_id, ..Default::default() })
    }
}

struct Liveness;

#[async_trait]
impl Health for Liveness {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> Rpc<HealthCheckResponse> {
        Ok(HealthCheckResponse { status: ServingStatus::SERVING.into(), ..Default::default() })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> Rpc<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: agent_api::API_VERSION.into(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }
}
