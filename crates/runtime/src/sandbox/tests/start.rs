//! The start of a pod.

use super::*;
use crate::fakes::agent::Answer;

/// The calls of a start, in order.
const CALLS: [&str; 3] = ["create_sandbox", "set_guest_date_time", "create_container"];

/// A start that fails, with what is in its error; then one that works in the folder that the first left.
async fn fails(world: &World, part: &str) {
    let failed = world.try_start(world.run(), &Notify::new()).await.err().expect("failed");
    assert!(failed.error.to_string().contains(part), "{}", failed.error);
    again(world, failed).await;
}

async fn again(world: &World, failed: FailedStart) {
    assert_eq!(world.driver.alive(), 0, "the VM of the start that failed");
    let run = failed.run.expect("all was undone");
    let left = fs::read_to_string(run.path().join("journal")).expect("a journal");
    assert_eq!(left, "", "in the journal");
    let pod = world.try_start(run, &Notify::new()).await.map_err(|failed| failed.error).expect("the next");
    pod.ends(world).await;
}

#[tokio::test]
async fn a_vm_that_cannot_be_launched() {
    let Some(world) = World::new(LONG) else { return };
    world.driver.refusals.refuse("launch");
    fails(&world, "refused").await;
}

#[tokio::test]
async fn an_agent_that_refuses_a_step() {
    for call in CALLS {
        let Some(world) = World::new(LONG) else { return };
        world.driver.agent.answer(call, Answer::Refuse);
        fails(&world, "refused").await;
    }
}

#[tokio::test]
async fn an_agent_that_is_silent_at_a_step() {
    for call in CALLS {
        let Some(world) = World::new(SHORT) else { return };
        world.driver.agent.answer(call, Answer::Silent);
        fails(&world, "the agent did not answer within 2s").await;
    }
}

#[tokio::test]
async fn an_agent_that_says_nonsense_at_a_step() {
    for call in CALLS {
        let Some(world) = World::new(SHORT) else { return };
        world.driver.agent.answer(call, Answer::Nonsense);
        fails(&world, "").await;
    }
}

#[tokio::test]
async fn an_agent_that_is_late_at_each_step() {
    let Some(world) = World::new(LONG) else { return };
    let when = std::sync::Arc::new(Notify::new());
    for call in CALLS {
        world.driver.agent.answer(call, Answer::Late(std::sync::Arc::clone(&when)));
    }
    let cancelled = Notify::new();
    let (pod, ()) = tokio::join!(world.try_start(world.run(), &cancelled), async {
        for call in CALLS {
            world.driver.agent.called(call).await;
            when.notify_one();
        }
    });
    pod.map_err(|failed| failed.error).expect("late, and in time").ends(&world).await;
}

#[tokio::test]
async fn a_vm_that_falls_over_at_a_step() {
    for call in CALLS {
        let Some(world) = World::new(LONG) else { return };
        world.driver.agent.answer(call, Answer::Silent);
        let cancelled = Notify::new();
        let (started, ()) = tokio::join!(world.try_start(world.run(), &cancelled), async {
            world.driver.agent.called(call).await;
            world.driver.fall();
        });
        let failed = started.err().expect("failed");
        assert!(failed.error.to_string().contains("it fell over"), "{}", failed.error);
        again(&world, failed).await;
    }
}

#[tokio::test]
async fn a_start_that_is_cancelled_at_a_step() {
    for call in CALLS {
        let Some(world) = World::new(LONG) else { return };
        world.driver.agent.answer(call, Answer::Silent);
        let cancelled = Notify::new();
        let (started, ()) = tokio::join!(world.try_start(world.run(), &cancelled), async {
            world.driver.agent.called(call).await;
            cancelled.notify_one();
        });
        let failed = started.err().expect("cancelled");
        assert!(failed.error.to_string().contains("cancelled"), "{}", failed.error);
        again(&world, failed).await;
    }
}

#[tokio::test]
async fn a_specification_that_the_host_does_not_give() {
    let Some(world) = World::new(SHORT) else { return };
    let file = world.container(POD).bundle.join("config.json");
    fs::remove_file(&file).expect("removed");
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).expect("made");
    let (tell, _events) = mpsc::unbounded_channel();
    let spec = SandboxSpec { id: name(POD).container, namespace: "tests".into(), run: world.run() };
    let first = ContainerSpec { bundle: file.parent().expect("a bundle").into(), ..plain(POD) };
    let started = Sandbox::start(world.env(), spec, first, tell, &Trace::default(), &Notify::new()).await;
    // lets the job go on, which the test's end waits for
    let written = fs::write(&file, "{}");
    let failed = started.err().expect("no answer");
    written.expect("read by the job");
    fs::remove_file(&file).expect("removed");
    let error = failed.error.to_string();
    assert!(error.contains("config.json: no answer from the host's file system within 2s"), "{error}");
    again(&world, failed).await;
}

fn plain(id: &str) -> ContainerSpec {
    ContainerSpec { id: name(id).container, bundle: PathBuf::new(), rootfs: Vec::new(), stdio: Stdio::default() }
}
