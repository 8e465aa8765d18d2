//! A container whose processes want more time than there is: what is asked of its guest is answered all the same.

use anyhow::{Result, ensure};
use e2e::{Runtime, events::Events, with_node};
use std::time::{Duration, Instant};

/// Each makes two, and all want to run for ever.
const BOMB: &str = "b() { echo; test $1 = 0 || { b $(($1 - 1)) & b $(($1 - 1)) & }; while :; do :; done; }; b 9";
/// So many of 1023 are enough: each of them lets the others run for some milliseconds at a time.
const MANY: u64 = 500;
/// It took 3 s and longer, and the end two minutes; now it is some 30 ms and a second.
const ANSWER: Duration = Duration::from_secs(5);

#[test]
fn a_fork_bomb_is_measured_and_killed() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        let log = node.dir().join("log");
        let uri = format!("file://{}", log.display());
        let end = Instant::now() + Duration::from_secs(120);
        node.detached(Runtime::Kata, "c1", &["--log-uri", &uri], &["sh", "-c", BOMB])?;
        while std::fs::metadata(&log)?.len() < MANY {
            ensure!(Instant::now() < end, "only {} processes came to be", std::fs::metadata(&log)?.len());
            std::thread::sleep(Duration::from_millis(50));
        }
        let metrics = node.ctr(["task", "metrics", "c1"]).limit(ANSWER).output()?.ok()?;
        let kill = node.ctr(["task", "kill", "-s", "KILL", "c1"]).limit(ANSWER).output()?.ok()?;
        let killed = Instant::now();
        events.wait_exit("c1", Duration::from_secs(30))?;
        println!("metrics in {:?}, KILL in {:?}, the end after {:?}", metrics.took, kill.took, killed.elapsed());
        node.remove("c1")
    })
}
