//! Starts, execs and signals: what containerd asks of one process of the pod.

use std::sync::Arc;

use agent_api::{agent as api, oci};

use super::{Host, Sandbox, Started, finished, to_the_end, watch};
use crate::container::{Container, Process, inherit, io, spec};
use crate::network::Following;
use crate::{Error, ExecSpec, Exit, ProcessRef, Status};

impl Sandbox {
    /// Starts a created process. Its end is told when what this returns is dropped. Goes on to its end also when nobody
    /// waits for it any more: the guest does not know that.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless it is created; or what the guest said.
    pub async fn start_process(&self, name: &ProcessRef) -> Result<Started, Error> {
        let (sandbox, name) = (self.clone(), name.clone());
        to_the_end("starting", async move { sandbox.start_now(&name).await }).await
    }

    async fn start_now(&self, name: &ProcessRef) -> Result<Started, Error> {
        let process = self.process(name)?;
        let changing = Arc::clone(&process.changing).lock_owned().await;
        if process.status() != Status::Created {
            return Err(Error::WrongState(format!("cannot start a {} process", process.status().name())));
        }
        if name.exec.is_none() {
            self.network_settled().await;
            let container = self.container(&name.container)?;
            self.answer_names(&container).await;
        }
        let input = io::Input::open(&process.stdio, &self.0.work).await?;
        let outputs = match name.exec {
            Some(_) => {
                let open = io::Outputs::open(&process.stdio, name, &self.0.logging);
                Some(self.0.work.wait(&io::Outputs::name(&process.stdio), open).await?)
            }
            None => None,
        };
        match &process.spec {
            None => {
                let request =
                    api::StartContainerRequest { container_id: name.container.as_str().into(), ..Default::default() };
                self.0
                    .agent
                    .call("starting the container", |client, context| async {
                        client.start_container(context, &request).await
                    })
                    .await?;
            }
            Some(spec) => {
                let mut spec = spec.clone();
                if let Some((width, height)) = process.kept_size() {
                    let size = oci::Box { Width: width, Height: height, ..Default::default() };
                    spec.ConsoleSize = Some(size).into();
                }
                let request = api::ExecProcessRequest {
                    container_id: name.container.as_str().into(),
                    exec_id: name.wire_exec(),
                    process: Some(spec).into(),
                    ..Default::default()
                };
                self.0
                    .agent
                    .call("starting the process", |client, context| async {
                        client.exec_process(context, &request).await
                    })
                    .await?;
            }
        }
        process.advance(Status::Running)?;
        input.copy(&self.0.agent, &process);
        if let Some(outputs) = outputs {
            watch::process(&self.0, process, outputs);
        }
        if name.exec.is_none() {
            let container = self.container(&name.container)?;
            container.hooks.started(container.anchor.pid()).await;
        }
        Ok(Started(changing))
    }

    /// What hooks and clients have made in the pod's network namespace until now is in the guest, as it would be without a VM.
    async fn network_settled(&self) {
        let settle = self.0.host.lock().await.as_ref().and_then(|host| host.following.as_ref().map(Following::settle));
        if let Some(settle) = settle {
            settle.settled().await;
        }
    }

    /// Lets the guest ask the name server of the pod's network namespace, if this container is to use it.
    async fn answer_names(&self, container: &Container) {
        let Some(file) = container.resolver_file.clone() else { return };
        let what = format!("name servers in {}", file.display());
        match self.0.work.run(&what, move |_| Ok(crate::network::names_are_wanted(&file))).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return tracing::warn!(%error, "names of the pod's network are not answered in the guest"),
        }
        let has_names = |host: &Host| host.names.is_some();
        if self.0.host.lock().await.as_ref().is_none_or(has_names) {
            return;
        }
        // the host's side is not held while the guest is asked
        let names = match self.0.namespace.names(&self.0.agent).await {
            Ok(names) => names,
            Err(error) => {
                tracing::warn!(%error, "names of the pod's network are not answered in the guest");
                return;
            }
        };
        match self.0.host.lock().await.as_mut() {
            Some(host) if !has_names(host) => host.names = Some(names),
            _ => names.stop().await,
        }
    }

    /// Adds a process to a running container; it starts with [`Sandbox::start_process`].
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::WrongState`] when the container does not run.
    pub fn exec(&self, from: ExecSpec) -> Result<(), Error> {
        let Some(exec) = from.process.exec.clone() else {
            return Err(Error::Invalid("an exec needs an id".into()));
        };
        let container = self
            .in_state(&from.process.container, Status::Running, |status| format!("cannot exec in a {status} state"))?;
        if from.spec.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(Error::Invalid("process.args must not be empty".into()));
        }
        spec::working_folder(from.spec.cwd())?;
        let mut wire = agent_api::oci_convert::process(&from.spec)?;
        spec::unlabel(&mut wire);
        inherit::streams(&mut wire, &from.stdio);
        if !wire.Rlimits.is_empty() {
            // without any it has its container's, which the guest knows
            inherit::limits(&mut wire);
        }
        container.add(exec, Arc::new(Process::new(from.process, from.stdio, Some(wire))))
    }

    /// Sends a signal; with `all` and a container's first process to every process of the container.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it has ended; but all of nothing have got it.
    pub async fn signal(&self, name: &ProcessRef, signal: u32, all: bool) -> Result<(), Error> {
        if let Some(done) = self.signal_making(name, signal).await {
            return done;
        }
        let process = self.process(name)?;
        let all = all && name.exec.is_none();
        match process.status() {
            Status::Stopped if all => return Ok(()),
            Status::Stopped => return Err(finished()),
            // an exec that was not started has no process in the guest
            Status::Created if name.exec.is_some() => {
                return Err(Error::WrongState("process not created".into()));
            }
            _ => {}
        }
        // on the wire an empty exec id with signal 9 means all
        let exec_id = if all { String::new() } else { name.wire_exec() };
        let request = api::SignalProcessRequest {
            container_id: name.container.as_str().into(),
            exec_id,
            signal,
            ..Default::default()
        };
        self.0
            .agent
            .call("sending a signal", |client, context| async { client.signal_process(context, &request).await })
            .await
            .map(drop)
            // with the VM its processes have ended, whether that has been seen yet or not
            .map_err(|error| if matches!(error, Error::VmGone { .. }) { finished() } else { error })
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn wait(&self, name: &ProcessRef) -> Result<Exit, Error> {
        let process = self.process(name)?;
        process.wait().await.ok_or_else(|| Error::NotFound(format!("process of {}", name.container)))
    }
}
