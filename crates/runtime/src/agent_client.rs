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

    /// Of a VM that is not there; it is gone when `exit` says so.
    #[cfg(test)]
    pub(crate) fn of_a_test(exit: watch::Receiver<Option<VmExit>>) -> Self {
        Self { exit, console: Console::default() }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use agent_api::agent::{RemoveContainerRequest, StartContainerRequest};
    use tokio::sync::Notify;

    use super::*;
    use crate::agent_channel::AgentChannel;
    use crate::fakes::agent::{Answer, FakeAgent};

    const LIMIT: Duration = Duration::from_secs(1);

    struct Guest {
        agent: FakeAgent,
        client: AgentClient,
        vm: watch::Sender<Option<VmExit>>,
    }

    /// A guest whose calls may take so long.
    async fn guest(limit: Duration) -> Guest {
        let agent = FakeAgent::new();
        let (vm, exit) = watch::channel(None);
        let config = config::Config::parse("[hypervisor.qemu]\n", std::path::Path::new("/c")).expect("right").agent;
        let config = config::Agent { request_timeout: limit, ..config };
        let watch = VmWatch::of_a_test(exit);
        let client = AgentChannel::Serial.connect(Some(agent.serve()), watch, &config).await.expect("connected");
        Guest { agent, client, vm }
    }

    impl Guest {
        async fn start(&self, id: &str) -> Result<(), Error> {
            let request = StartContainerRequest { container_id: id.into(), ..Default::default() };
            let call = |client, context| call_start(client, context, &request);
            self.client.call("starting", call).await
        }

        async fn remove(&self, id: &str) -> Result<(), Error> {
            let request = RemoveContainerRequest { container_id: id.into(), ..Default::default() };
            let removed = self
                .client
                .call("removing", |client, context| async { client.remove_container(context, &request).await });
            removed.await.map(drop)
        }
    }

    async fn call_start(
        client: &AgentServiceClient,
        context: Context,
        request: &StartContainerRequest,
    ) -> ttrpc::Result<()> {
        client.start_container(context, request).await.map(drop)
    }

    #[tokio::test]
    async fn a_silent_agent_is_waited_for_as_long_as_is_allowed() {
        let guest = guest(LIMIT).await;
        guest.agent.answer("start_container", Answer::Silent);
        let error = guest.start("c1").await.expect_err("nothing was said").to_string();
        assert!(error.starts_with("starting: the agent did not answer within 1s"), "{error}");
        // the next call has its own answer
        guest.remove("c1").await.expect("removed");
    }

    #[tokio::test]
    async fn a_refusal_has_the_agents_code_and_words() {
        let guest = guest(Duration::from_secs(60)).await;
        guest.agent.answer("start_container", Answer::Refuse);
        match guest.start("c1").await {
            Err(Error::Agent { code: ttrpc::Code::INTERNAL, message }) => assert_eq!(message, "refused"),
            other => panic!("{other:?}"),
        }
        guest.start("c1").await.expect("the next");
    }

    #[tokio::test]
    async fn a_late_answer_is_taken_in_time_and_is_nobodys_after_that() {
        let late = guest(Duration::from_secs(60)).await;
        let when = Arc::new(Notify::new());
        late.agent.answer("start_container", Answer::Late(Arc::clone(&when)));
        let (started, ()) = tokio::join!(late.start("c1"), async {
            late.agent.called("start_container").await;
            when.notify_one();
        });
        started.expect("late, and in time");

        let late = guest(LIMIT).await;
        late.agent.answer("start_container", Answer::Late(Arc::clone(&when)));
        assert!(matches!(late.start("c1").await, Err(Error::AgentSilent { .. })));
        when.notify_one();
        late.agent.answer("remove_container", Answer::Refuse);
        // not the answer to the call before
        assert!(matches!(late.remove("c1").await, Err(Error::Agent { .. })));
        late.remove("c1").await.expect("removed");
    }

    #[tokio::test]
    async fn what_is_no_message_is_no_answer() {
        let guest = guest(LIMIT).await;
        guest.agent.answer("start_container", Answer::Nonsense);
        for _ in 0..2 {
            guest.start("c1").await.expect_err("nothing was said");
        }
        guest.remove("c1").await.expect_err("nobody knows where a message begins");
    }

    #[tokio::test]
    async fn the_end_of_the_vm_ends_every_call() {
        let guest = guest(Duration::from_secs(60)).await;
        guest.agent.answer("start_container", Answer::Silent);
        let (started, ()) = tokio::join!(guest.start("c1"), async {
            guest.agent.called("start_container").await;
            let exit = VmExit { reason: "it fell over".into(), is_success: false, stderr: String::new(), fault: None };
            guest.vm.send_replace(Some(exit));
        });
        assert!(started.expect_err("gone").to_string().contains("it fell over"));
    }
}
