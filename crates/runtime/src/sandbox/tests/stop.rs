//! Deletions and the pod's end.

use super::*;
use crate::cleanup::Step;
use crate::fakes::agent::Answer;

impl Pod {
    /// Something of the pod's that cannot be given back for as long as the file is there, which this returns.
    async fn holds_data(&self, world: &World) -> PathBuf {
        let folder = world.root.path().join("staging");
        fs::create_dir(&folder).expect("made");
        let data = folder.join("data");
        fs::write(&data, "somebody's").expect("written");
        let host = self.sandbox.0.host.lock().await;
        host.as_ref().expect("it runs").run.journal().push(Step::Staging(folder)).expect("written");
        data
    }
}

#[tokio::test]
async fn a_removal_that_the_agent_refuses_or_does_not_answer_can_be_tried_again() {
    let Some(world) = World::new(SHORT) else { return };
    let pod = world.pod(&["one"]).await;
    for answer in [Answer::Refuse, Answer::Silent] {
        world.driver.agent.answer("remove_container", answer);
        assert!(pod.sandbox.delete(&name("one")).await.is_err());
        pod.sandbox.view(&name("one")).expect("it is still there");
    }
    pod.sandbox.delete(&name("one")).await.expect("deleted");
    assert!(matches!(pod.sandbox.delete(&name("one")).await, Err(Error::NotFound(_))));
    pod.sandbox.create_container(world.container("one")).await.expect("its name is free");
    pod.ends(&world).await;
}

#[tokio::test]
async fn a_disk_that_the_guest_keeps_does_not_keep_its_container() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&["one"]).await;
    world.driver.refusals.refuse("unplug");
    pod.sandbox.delete(&name("one")).await.expect("deleted");
    pod.ends(&world).await;
}

#[tokio::test]
async fn a_guest_that_does_not_say_goodbye_is_ended() {
    for answer in [Answer::Refuse, Answer::Silent, Answer::Nonsense] {
        let Some(world) = World::new(SHORT) else { return };
        let pod = world.pod(&["one"]).await;
        world.driver.agent.answer("destroy_sandbox", answer);
        pod.ends(&world).await;
    }
}

#[tokio::test]
async fn a_vm_that_does_not_stop_is_ended_by_the_journal_and_told() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    world.driver.refusals.refuse("stop");
    let error = words(pod.sandbox.stop().await);
    assert!(error.contains("refused"), "{error}");
    assert!(!world.run_folder().exists(), "everything else was given back");
    pod.ends(&world).await;
}

#[tokio::test]
async fn a_stop_that_fails_goes_on_with_the_next() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&["one"]).await;
    let data = pod.holds_data(&world).await;
    for _ in 0..2 {
        let error = words(pod.sandbox.stop().await);
        assert!(error.contains("cleaning up"), "{error}");
        assert_eq!(world.driver.alive(), 0, "the VM ends all the same");
        assert!(world.run_folder().exists(), "what is left is written down");
    }
    fs::remove_file(data).expect("removed");
    pod.ends(&world).await;
}

#[tokio::test]
async fn a_deletion_of_the_last_container_goes_on_with_the_next() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    let data = pod.holds_data(&world).await;
    assert!(pod.sandbox.delete(&name(POD)).await.is_err());
    assert!(!pod.sandbox.is_empty(), "nobody is told that all is gone");
    fs::remove_file(data).expect("removed");
    pod.sandbox.delete(&name(POD)).await.expect("deleted");
    world.is_clean();
}

#[tokio::test]
async fn a_second_stop_waits_for_the_first() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&["one"]).await;
    let when = std::sync::Arc::new(Notify::new());
    world.driver.agent.answer("destroy_sandbox", Answer::Late(std::sync::Arc::clone(&when)));
    let second = async {
        world.driver.agent.called("destroy_sandbox").await;
        let second = pod.sandbox.stop();
        when.notify_one();
        second.await.expect("stopped");
        world.is_clean();
    };
    let (first, ()) = tokio::join!(pod.sandbox.stop(), second);
    first.expect("stopped");
}
