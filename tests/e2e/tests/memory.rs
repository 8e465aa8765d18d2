//! What of the host's memory a pod has, and gives back.

use anyhow::{Context as _, Result, ensure};
use e2e::{Node, NodeSetup, Runtime, events::Events, install::Install, processes, with_node, with_node_setup};
use std::{
    fs,
    time::{Duration, Instant},
};

/// What the machine of the node's only pod holds, MiB.
fn held(node: &Node) -> Result<u64> {
    let machine = processes::wait_for(node.tag(), "qemu-system", Duration::from_secs(5))?;
    Ok(machine.pss_kib()? >> 10)
}

#[test]
fn what_the_guest_has_freed_goes_back() -> Result<()> {
    let config = Install::locate()?.config_with(&[("reclaim_guest_freed_memory", true.into())])?;
    with_node_setup(NodeSetup { config: Some(config), ..NodeSetup::default() }, |node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let before = held(node)?;
        // tail keeps all of a line
        let eater = "head -c 300m /dev/zero | { tail | wc -c; echo full > /dev/null; }";
        let run = node.exec("c1", "eat", &[], &["sh", "-c", eater]).spawn()?;
        let mut most = before;
        let done = loop {
            most = most.max(held(node)?);
            if most > before + 280 {
                break run;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        done.finish()?.ok()?;
        most = most.max(held(node)?);
        let freed = Instant::now();
        let wanted = most - (most - before) * 8 / 10;
        let mut now = most;
        while freed.elapsed() < Duration::from_secs(30) && now > wanted {
            std::thread::sleep(Duration::from_millis(200));
            now = held(node)?;
        }
        eprintln!("before {before}, at most {most}, {now} MiB {:?} after the end", freed.elapsed());
        ensure!(now <= wanted, "of {} MiB the host has {} back after 30 s", most - before, most - now);
        node.remove("c1").context("removing it")
    })
}

/// The VM is gone at once after the end, and with it what was not told.
#[test]
fn that_it_was_killed_for_memory_is_told_before_its_end() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        for round in 0..8 {
            let id = format!("hungry{round}");
            let limit = ["--rm", "--memory-limit", "20971520"];
            let killed = node.run(Runtime::Kata, &id, &limit, &["tail", "/dev/zero"]).output()?;
            ensure!(killed.code == 137, "{killed:?}");
            events.wait("/tasks/delete", &id, Duration::from_secs(10))?;
            let topics: Vec<_> = events.of(&id).into_iter().map(|event| event.topic).collect();
            let ends = ["/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"];
            ensure!(topics.ends_with(&ends.map(str::to_owned)), "round {round}: {topics:?}");
        }
        Ok(())
    })
}

/// The host's switch for merging, as it was once this goes.
struct Ksm(Vec<(&'static str, String)>);

const KSM: &str = "/sys/kernel/mm/ksm";

impl Ksm {
    /// Starts the kernel's search, quick enough for a test.
    fn start() -> Result<Self> {
        let mut before = Self(Vec::new());
        for (name, value) in [("pages_to_scan", "20000"), ("sleep_millisecs", "10"), ("run", "1")] {
            let path = format!("{KSM}/{name}");
            before.0.push((name, fs::read_to_string(&path).with_context(|| format!("{path}: a kernel without KSM"))?));
            fs::write(&path, value).with_context(|| path)?;
        }
        Ok(before)
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (name, value) in self.0.iter().rev() {
            let _ = fs::write(format!("{KSM}/{name}"), value);
        }
    }
}

/// Whether each VM of the node has memory that the kernel may merge (proc(5): "mg"), and how many pages it has merged.
fn merged(node: &Node) -> Result<Vec<(bool, u64)>> {
    let machines = processes::of_node(node.tag()).into_iter().filter(|process| process.name.starts_with("qemu-system"));
    let look = |pid: i32| {
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let may = maps.lines().any(|line| line.starts_with("VmFlags:") && line.split_whitespace().any(|f| f == "mg"));
        let counts = fs::read_to_string(format!("/proc/{pid}/ksm_stat")).unwrap_or_default();
        let count = counts.lines().find_map(|line| line.strip_prefix("ksm_merging_pages ")?.trim().parse().ok());
        Ok((may, count.unwrap_or_default()))
    };
    machines.map(|process| look(process.pid)).collect()
}

#[test]
fn guests_have_pages_in_common_for_those_who_ask() -> Result<()> {
    with_node(|node| {
        node.detached(Runtime::Kata, "apart", &[], &["sleep", "1000"])?;
        ensure!(merged(node)? == [(false, 0)], "merged by itself: {:?}", merged(node)?);
        node.remove("apart")?;
        let changes = [("merge_guest_memory", true.into()), ("shared_fs", "virtio-9p".into())];
        let config = node.dir().join("merged.toml");
        fs::write(&config, node.install().config_with(&changes)?)?;
        let options = ["--runtime-config-path", &config.display().to_string()];
        for id in ["one", "two"] {
            node.detached(Runtime::Kata, id, &options, &["sleep", "1000"])?;
        }
        let _ksm = Ksm::start()?;
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let now = merged(node)?;
            ensure!(now.len() == 2 && now.iter().all(|(may, _)| *may), "not to be merged: {now:?}");
            // a MiB of each at least: they have the same kernel
            if now.iter().all(|(_, pages)| *pages > 256) {
                break;
            }
            ensure!(Instant::now() < end, "nothing is merged: {now:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        ["one", "two"].into_iter().try_for_each(|id| node.remove(id))?;
        // what cannot work is refused
        fs::write(&config, node.install().config_with(&[("merge_guest_memory", true.into())])?)?;
        let refused = node.run(Runtime::Kata, "no", &options, &["true"]).output()?;
        ensure!(refused.code != 0 && refused.stderr.contains("merge_guest_memory"), "{}", refused.stderr);
        Ok(())
    })
}
