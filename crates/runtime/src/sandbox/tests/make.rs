//! A container that joins the pod.

use std::sync::Arc;

use super::*;
use crate::Status;
use crate::fakes::agent::Answer;

/// A create that fails with `part` in its error, and the next one of the same name, which works.
async fn fails(world: &World, pod: Pod, part: &str) {
    let error = words(pod.sandbox.create_container(world.container("one")).await);
    assert!(!error.is_empty() && error.contains(part), "{error:?}");
    again(world, pod).await;
}

async fn again(world: &World, pod: Pod) {
    assert!(matches!(pod.sandbox.view(&name("one")), Err(Error::NotFound(_))), "it is no container");
    pod.sandbox.create_container(world.container("one")).await.expect("the next");
    pod.ends(world).await;
}

#[tokio::test]
async fn a_disk_that_cannot_be_plugged() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    world.driver.refusals.refuse("plug");
    fails(&world, pod, "refused").await;
}

#[tokio::test]
async fn a_disk_that_is_not_there() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    let mut from = world.container("one");
    from.rootfs[0].source += ".not";
    let error = words(pod.sandbox.create_container(from).await);
    assert!(error.contains("disk.not"), "{error}");
    again(&world, pod).await;
}

#[tokio::test]
async fn an_agent_that_refuses() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    world.driver.agent.answer("create_container", Answer::Refuse);
    fails(&world, pod, "refused").await;
}

#[tokio::test]
async fn an_agent_that_is_silent() {
    let Some(world) = World::new(SHORT) else { return };
    let pod = world.pod(&[]).await;
    world.driver.agent.answer("create_container", Answer::Silent);
    fails(&world, pod, "the agent did not answer within 2s").await;
}

#[tokio::test]
async fn a_name_is_taken_while_the_agent_is_late() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    let when = Arc::new(Notify::new());
    world.driver.agent.answer("create_container", Answer::Late(Arc::clone(&when)));
    let (made, ()) = tokio::join!(pod.sandbox.create_container(world.container("one")), async {
        world.driver.agent.called("create_container one").await;
        let error = words(pod.sandbox.create_container(world.container("one")).await);
        assert!(error.contains("already exists"), "{error}");
        when.notify_one();
    });
    made.expect("late, and in time");
    pod.ends(&world).await;
}

#[tokio::test]
async fn a_creator_that_goes_away_leaves_a_container_that_a_deletion_waits_for() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    let when = Arc::new(Notify::new());
    world.driver.agent.answer("create_container", Answer::Late(Arc::clone(&when)));
    tokio::select! {
        _ = pod.sandbox.create_container(world.container("one")) => panic!("it is late"),
        () = world.driver.agent.called("create_container one") => {}
    }
    let one = name("one");
    let (deleted, ()) = tokio::join!(pod.sandbox.delete(&one), async { when.notify_one() });
    deleted.expect("deleted");
    again(&world, pod).await;
}

#[tokio::test]
async fn one_whose_files_do_not_answer_is_seen_and_can_be_killed_or_deleted() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&["two"]).await;
    for is_killed in [true, false] {
        let from = world.container("one");
        let file = from.bundle.join("config.json");
        fs::remove_file(&file).expect("removed");
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let asked = async {
            pod.sandbox.settled(&name("one").container).await;
            let view = pod.sandbox.view(&name("one")).expect("it is being made");
            assert_eq!((view.pid, view.status), (0, Status::Created));
            pod.sandbox.pid(&name("two").container).expect("the others are as they were");
            if is_killed {
                pod.sandbox.signal(&name("one"), 9, true).await.expect("killed");
            } else {
                assert!(matches!(pod.sandbox.delete(&name("one")).await, Err(Error::NotFound(_))));
            }
        };
        let (made, ()) = tokio::join!(pod.sandbox.create_container(from), asked);
        let error = words(made);
        assert!(error.ends_with(": cancelled"), "{error}");
        fs::write(&file, "{}").expect("read by the job");
        fs::remove_file(&file).expect("removed");
    }
    again(&world, pod).await;
}

#[tokio::test]
async fn the_pods_end_does_not_wait_for_one_whose_files_do_not_answer() {
    let Some(world) = World::new(LONG) else { return };
    let pod = world.pod(&[]).await;
    let from = world.container("one");
    let file = from.bundle.join("config.json");
    fs::remove_file(&file).expect("removed");
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).expect("made");
    let (made, ()) = tokio::join!(pod.sandbox.create_container(from), async {
        pod.sandbox.settled(&name("one").container).await;
        pod.sandbox.delete(&name(POD)).await.expect("deleted");
        world.is_clean();
        assert!(pod.sandbox.is_empty());
    });
    assert!(made.is_err());
    fs::write(&file, "{}").expect("read by the job");
}
