//! An agent that answers by a script, over a socket pair, in the real protocol. What is not in the script works: containers
//! run until they are killed.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::agent as api;
use agent_api::agent_ttrpc::{AgentService, create_agent_service};
use agent_api::ports;
use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::ttrpc::asynchronous::transport::Listener;
use agent_api::ttrpc::asynchronous::{Server, TtrpcContext};
use agent_api::ttrpc::{self, Code};
use async_trait::async_trait;
use futures_util::StreamExt;
use tokio::sync::{Notify, watch};

/// What an agent says to one call.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// No.
    Refuse,
    /// Nothing, for ever.
    Silent,
    /// What it would say otherwise, when it is told to.
    Late(Arc<Notify>),
    /// Bytes that are no message.
    Nonsense,
}

/// The agent. Clones are the same.
#[derive(Clone)]
pub(crate) struct FakeAgent(Arc<State>);

struct State {
    script: Mutex<HashMap<&'static str, VecDeque<Answer>>>,
    calls: watch::Sender<Vec<String>>,
    /// Exit statuses by container and process.
    ended: watch::Sender<HashMap<(String, String), i32>>,
    wire: Mutex<Option<UnixStream>>,
}

impl FakeAgent {
    pub(crate) fn new() -> Self {
        Self(Arc::new(State {
            script: Mutex::default(),
            calls: watch::Sender::default(),
            ended: watch::Sender::default(),
            wire: Mutex::default(),
        }))
    }

    /// Answers the next call of that name so; several such calls one after the other.
    pub(crate) fn answer(&self, call: &'static str, answer: Answer) -> &Self {
        lock(&self.0.script).entry(call).or_default().push_back(answer);
        self
    }

    /// Waits for a call that begins like that.
    pub(crate) async fn called(&self, call: &str) {
        let mut calls = self.0.calls.subscribe();
        calls.wait_for(|calls| calls.iter().any(|one| one.starts_with(call))).await.expect("it lives");
    }

    /// Ends a process of a container; an empty `exec` is its first, which has the container's name.
    pub(crate) fn end(&self, container: &str, exec: &str, status: i32) {
        let exec = if exec.is_empty() { container } else { exec };
        self.0.ended.send_modify(|ended| {
            ended.entry((container.into(), exec.into())).or_insert(status);
        });
    }

    /// Starts to serve, and returns the host's end of its channel, on which it has said that it is there.
    pub(crate) fn serve(&self) -> OwnedFd {
        let (host, guest) = UnixStream::pair().expect("a pair");
        (&guest).write_all(ports::SERIAL_HELLO).expect("written");
        guest.set_nonblocking(true).expect("set");
        *lock(&self.0.wire) = Some(guest.try_clone().expect("cloned"));
        let guest = tokio::net::UnixStream::from_std(guest).expect("watched");
        let once = futures_util::stream::iter([Ok(guest)]).chain(futures_util::stream::pending());
        let service = create_agent_service(Arc::new(self.clone()));
        tokio::spawn(async move {
            let mut server = Server::new().add_listener(Listener::new(once)).register_service(service);
            server.start().await.expect("served");
            // as long as the test
            std::future::pending::<()>().await;
        });
        host.into()
    }

    async fn say(&self, call: &'static str, about: &str) -> ttrpc::Result<Empty> {
        self.0.calls.send_modify(|calls| calls.push(format!("{call} {about}").trim_end().to_owned()));
        let answer = lock(&self.0.script).get_mut(call).and_then(VecDeque::pop_front);
        match answer {
            None => Ok(Empty::new()),
            Some(Answer::Refuse) => {
                Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, "refused".to_owned())))
            }
            Some(Answer::Silent) => std::future::pending().await,
            Some(Answer::Late(when)) => {
                when.notified().await;
                Ok(Empty::new())
            }
            Some(Answer::Nonsense) => {
                if let Some(mut wire) = lock(&self.0.wire).as_ref() {
                    wire.write_all(&[0xff; 64]).expect("written");
                }
                std::future::pending().await
            }
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl AgentService for FakeAgent {
    async fn create_sandbox(&self, _: &TtrpcContext, _: api::CreateSandboxRequest) -> ttrpc::Result<Empty> {
        self.say("create_sandbox", "").await
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: api::DestroySandboxRequest) -> ttrpc::Result<Empty> {
        self.say("destroy_sandbox", "").await
    }

    async fn set_guest_date_time(&self, _: &TtrpcContext, _: api::SetGuestDateTimeRequest) -> ttrpc::Result<Empty> {
        self.say("set_guest_date_time", "").await
    }

    async fn create_container(&self, _: &TtrpcContext, of: api::CreateContainerRequest) -> ttrpc::Result<Empty> {
        self.0.ended.send_modify(|ended| ended.retain(|(container, _), _| *container != of.container_id));
        self.say("create_container", &of.container_id).await
    }

    async fn start_container(&self, _: &TtrpcContext, of: api::StartContainerRequest) -> ttrpc::Result<Empty> {
        self.say("start_container", &of.container_id).await
    }

    async fn remove_container(&self, _: &TtrpcContext, of: api::RemoveContainerRequest) -> ttrpc::Result<Empty> {
        self.say("remove_container", &of.container_id).await
    }

    async fn exec_process(&self, _: &TtrpcContext, of: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.say("exec_process", &format!("{} {}", of.container_id, of.exec_id)).await
    }

    async fn signal_process(&self, _: &TtrpcContext, of: api::SignalProcessRequest) -> ttrpc::Result<Empty> {
        let said = self.say("signal_process", &format!("{} {}", of.container_id, of.signal)).await;
        if said.is_ok() && of.signal == 9 {
            self.end(&of.container_id, &of.exec_id, 137);
        }
        said
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        of: api::WaitProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        self.say("wait_process", &format!("{} {}", of.container_id, of.exec_id)).await?;
        let key = (of.container_id, of.exec_id);
        let mut ended = self.0.ended.subscribe();
        let ended = ended.wait_for(|ended| ended.contains_key(&key)).await.expect("it lives");
        Ok(api::WaitProcessResponse { status: ended[&key], ..Default::default() })
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        of: api::ReadStreamRequest,
    ) -> ttrpc::Result<api::ReadStreamResponse> {
        self.say("read_stdout", &of.container_id).await.map(|_| api::ReadStreamResponse::new())
    }

    async fn read_stderr(&self, _: &TtrpcContext, _: api::ReadStreamRequest) -> ttrpc::Result<api::ReadStreamResponse> {
        Ok(api::ReadStreamResponse::new())
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        _: api::GuestDetailsRequest,
    ) -> ttrpc::Result<api::GuestDetailsResponse> {
        Ok(api::GuestDetailsResponse::new())
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: api::GetOOMEventRequest) -> ttrpc::Result<api::OOMEvent> {
        std::future::pending().await
    }
}
