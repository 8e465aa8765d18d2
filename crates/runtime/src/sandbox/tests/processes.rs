//! Starts, execs, signals and ends of processes.

use super::*;
use crate::container::ExecSpec;
use crate::fakes::agent::Answer;
use crate::{ExecId, Exit, Status};

fn exec(id: &str, exec: &str) -> ProcessRef {
    ProcessRef { exec: Some(ExecId::try_from(exec).expect("an id")), ..name(id) }
}

fn process(id: &ProcessRef) -> ExecSpec {
    let spec = serde_json::from_value(json!({"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"}));
    ExecSpec { process: id.clone(), spec: spec.expect("a process"), stdio: Stdio::default() }
}

impl Pod {
    /// The next end of a process that is told.
    async fn end_of(&mut self, id: &ProcessRef) -> Exit {
        loop {
            match self.events.recv().await.expect("the pod lives") {
                Event::Exit { process, exit, .. } if process == *id => return exit,
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn a_start_that_the_agent_refuses_can_be_tried_again() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&["one"]).await;
    world.driver.agent.answer("start_container", Answer::Refuse);
    assert_eq!(words(pod.sandbox.start_process(&name("one")).await), "refused");
    assert_eq!(pod.sandbox.view(&name("one")).expect("there").status, Status::Created);
    drop(pod.sandbox.start_process(&name("one")).await.expect("started"));
    let error = words(pod.sandbox.start_process(&name("one")).await);
    assert!(error.contains("cannot start a running process"), "{error}");
    pod.ends(&world).await;
}

#[tokio::test]
async fn a_start_that_the_agent_does_not_answer_can_be_tried_again() {
    let Some(world) = World::new(SHORT) else { return };
    let pod = world.pod(&["one"]).await;
    world.driver.agent.answer("start_container", Answer::Silent);
    let error = words(pod.sandbox.start_process(&name("one")).await);
    assert!(error.contains("the agent did not answer"), "{error}");
    drop(pod.sandbox.start_process(&name("one")).await.expect("started"));
    pod.ends(&world).await;
}

#[tokio::test]
async fn an_exec_that_fails_leaves_the_container_and_the_next_one_runs() {
    let Some(world) = World::new(SHORT) else { return };
    let mut pod = world.pod(&["one"]).await;
    drop(pod.sandbox.start_process(&name("one")).await.expect("started"));
    for answer in [Answer::Refuse, Answer::Silent] {
        let id = exec("one", "failing");
        pod.sandbox.exec(process(&id)).expect("added");
        world.driver.agent.answer("exec_process", answer);
        assert!(pod.sandbox.start_process(&id).await.is_err());
        let deleted = pod.sandbox.delete(&id).await.expect("one that never ran goes");
        assert!(deleted.exit.is_none_or(|exit| exit.status == 0));
    }
    let id = exec("one", "next");
    pod.sandbox.exec(process(&id)).expect("added");
    drop(pod.sandbox.start_process(&id).await.expect("started"));
    world.driver.agent.end("one", "next", 7);
    assert_eq!(pod.end_of(&id).await.status, 7);
    assert_eq!(pod.sandbox.delete(&id).await.expect("deleted").exit.map(|exit| exit.status), Some(7));
    pod.ends(&world).await;
}

#[tokio::test]
async fn a_signal_that_is_refused_or_not_answered_can_be_sent_again() {
    let Some(world) = World::new(SHORT) else { return };
    let mut pod = world.pod(&["one"]).await;
    drop(pod.sandbox.start_process(&name("one")).await.expect("started"));
    for answer in [Answer::Refuse, Answer::Silent] {
        world.driver.agent.answer("signal_process", answer);
        assert!(pod.sandbox.signal(&name("one"), 9, false).await.is_err());
        assert_eq!(pod.sandbox.view(&name("one")).expect("there").status, Status::Running);
    }
    pod.sandbox.signal(&name("one"), 9, false).await.expect("sent");
    assert_eq!(pod.end_of(&name("one")).await.status, 137);
    assert_eq!(pod.sandbox.delete(&name("one")).await.expect("deleted").exit.map(|exit| exit.status), Some(137));
    pod.ends(&world).await;
}

#[tokio::test]
async fn with_the_vm_every_process_ends() {
    let Some(world) = World::new(LONG) else { return };
    let mut pod = world.pod(&["one"]).await;
    drop(pod.sandbox.start_process(&name("one")).await.expect("started"));
    world.driver.fall();
    let mut ends = [pod.events.recv().await, pod.events.recv().await].map(|event| match event {
        Some(Event::Exit { process, exit, .. }) => (process.container.to_string(), exit.status),
        other => panic!("{other:?}"),
    });
    ends.sort();
    assert_eq!(ends, [("one".to_owned(), 255), (POD.to_owned(), 255)]);
    for id in ["one", POD] {
        pod.sandbox.delete(&name(id)).await.expect("deleted");
    }
    world.is_clean();
}
