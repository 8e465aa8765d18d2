//! Calls into the guest: every one bounded in time, and ended by the VM's end.

use std::future::Future;
use std::time::Duration;

use agent_api::agent::GuestDetailsRequest;
use agent_api::agent_ttrpc::AgentServiceClient;
use agent_api::port_ttrpc::PortClient;
use agent_api::resolver_ttrpc::ResolverClient;
use agent_api::ttrpc;
use agent_api::ttrpc::r#async::{Client, transport::Socket};
use agent_api::ttrpc::context::Context;
use agent_api::wake::{DownRequest, Rescan, UpRequest};
use agent_api::wake_ttrpc::WakeClient;
use hypervisor::{Console, Vm, VmExit};
use tokio::sync::watch;

use crate::Error;

/// How long after a broken connection the VMM's end is waited for, so that the error can tell the cause.
const CAUSE_WAIT: Duration = Duration::from_millis(800);

/// What ends a call early, and what an error then shows.
#[derive(Debug, Clone)]
pub(crate) struct VmWatch {
    exit: watch::Receiver<Option<VmExit>>,
    console: Console,
}

impl VmWatch {
    pub(crate) fn new(vm: &dyn Vm) -> Self {
        Self { exit: vm.exit(), console: vm.console().clone() }
    }

    /// Resolves when the VMM is gone.
    pub(crate) async fn gone(&self, what: &str) -> Error {
        let mut exit = self.exit.clone();
        let (reason, fault) = match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.as_ref().map(|exit| (exit.to_string(), exit.fault.clone())).unwrap_or_default(),
            Err(_) => ("its exit status is unknown".into(), None),
        };
        Error::VmGone { what: what.into(), reason, console: self.console_tail(), fault }
    }

    /// Runs `work`, or says why it cannot be done any more.
    pub(crate) async fn unless_gone<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            done = work => done,
            gone = self.gone(what) => Err(gone),
        }
    }

    /// What the guest writes.
    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// The error for a guest that did not answer.
    pub(crate) fn silent(&self, what: &str, limit: Duration) -> Error {
        Error::AgentSilent { what: what.into(), limit, console: self.console_tail() }
    }

    /// The error for a connection that failed: the end of the VMM where that is the cause, else `reason`.
    pub(crate) async fn broken<T>(&self, what: &str, reason: &str) -> Result<T, Error> {
        self.broken_within(what, reason, CAUSE_WAIT).await
    }

    /// The same, where the end of the VMM would have been seen within `limit`.
    pub(crate) async fn broken_within<T>(&self, what: &str, reason: &str, limit: Duration) -> Result<T, Error> {
        if let Ok(gone) = tokio::time::timeout(limit, self.gone(what)).await {
            return Err(gone);
        }
        let (what, reason, console) = (what.into(), reason.to_owned(), self.console_tail());
        Err(Error::VmGone { what, reason, console, fault: None })
    }

    fn console_tail(&self) -> String {
        let tail = self.console.tail();
        if tail.is_empty() { tail } else { format!("\nguest console:\n{tail}") }
    }
}

/// The agent of one VM.
#[derive(Clone)]
pub(crate) struct AgentClient {
    client: AgentServiceClient,
    ports: PortClient,
    resolver: ResolverClient,
    wake: WakeClient,
    vm: VmWatch,
    deadline: Duration,
}

impl AgentClient {
    /// Calls over a connection to it; `deadline` is for each.
    pub(crate) fn over(socket: Socket, vm: VmWatch, deadline: Duration) -> Self {
        let client = Client::new(socket);
        Self {
            client: AgentServiceClient::new(client.clone()),
            ports: PortClient::new(client.clone()),
            resolver: ResolverClient::new(client.clone()),
            wake: WakeClient::new(client),
            vm,
            deadline,
        }
    }

    /// One call with the usual deadline. `what` is for errors.
    pub(crate) async fn call<'a, T, F>(
        &'a self,
        what: &str,
        call: impl FnOnce(&'a AgentServiceClient, Context) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.call_within(what, Some(self.deadline), call).await
    }

    /// One call with another deadline, or none: waiting for a process or its output may take for ever.
    pub(crate) async fn call_within<'a, T, F>(
        &'a self,
        what: &str,
        limit: Option<Duration>,
        call: impl FnOnce(&'a AgentServiceClient, Context) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.within(what, limit, call(&self.client, Context::default())).await
    }

    /// Asks for what is at hand. The answer comes after all answers that were ready before; what it is does not matter, nor
    /// whether there is any.
    pub(crate) async fn round_trip(&self) {
        let request = GuestDetailsRequest::new();
        let asked = self.call("requesting the guest's details", |client, context| async {
            client.get_guest_details(context, &request).await
        });
        let _ = asked.await;
    }

    /// One call about a connection to a port of the guest. Such a call may take for as long as its other end likes.
    pub(crate) async fn port_call<'a, T, F>(
        &'a self,
        what: &str,
        call: impl FnOnce(&'a PortClient, Context) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.within(what, None, call(&self.ports, Context::default())).await
    }

    /// One call about names that the guest asks for. To wait for a question may take for ever.
    pub(crate) async fn resolver_call<'a, T, F>(
        &'a self,
        what: &str,
        limit: Option<Duration>,
        call: impl FnOnce(&'a ResolverClient, Context) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.within(what, limit, call(&self.resolver, Context::default())).await
    }

    /// The last call to a guest that is to be saved, or to wait, which is answered when that has run for `age`.
    /// `rescan` is where it is to look for what comes meanwhile.
    pub(crate) async fn lull(&self, age: Duration, rescan: hypervisor::Rescan) -> Result<(), Error> {
        let age_ms = u32::try_from(age.as_millis()).unwrap_or(u32::MAX);
        let rescan = Rescan {
            bridge: rescan.bridge.unwrap_or_default().into(),
            acpi_event: rescan.acpi_event.unwrap_or_default().into(),
            ..Default::default()
        };
        let request = DownRequest { age_ms, rescan: Some(rescan).into(), ..Default::default() };
        let limit = self.deadline.saturating_add(age);
        self.within("preparing the guest for its snapshot", Some(limit), self.wake.down(Context::default(), &request))
            .await
            .map(drop)
    }

    /// The first call to a clone, which runs within `limit`.
    pub(crate) async fn wake(&self, limit: Duration, request: UpRequest) -> Result<(), Error> {
        self.within("resuming the clone", Some(limit), self.wake.up(Context::default(), &request)).await.map(drop)
    }

    /// The limit is kept here, by the host's clock: the guest's may run differently, and its agent would drop a call half
    /// done.
    async fn within<T>(
        &self,
        what: &str,
        limit: Option<Duration>,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        let expired = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = answer => match answer {
                Ok(value) => Ok(value),
                Err(ttrpc::Error::RpcStatus(status)) => {
                    Err(Error::Agent { code: status.code(), message: status.message().to_owned() })
                }
                Err(error) => self.vm.broken(what, &format!("the connection to the agent was lost ({error})")).await,
            },
            gone = self.vm.gone(what) => Err(gone),
            () = expired => Err(self.vm.silent(what, limit.unwrap_or_default())),
        }
    }
}
