//! The life of a container as `ctr` sees it, with the product and with runc: the same commands, the same answers.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Node, Runtime,
    events::Events,
    task_api::{Bundle, Shim},
    with_every_containerd, with_node,
};
use std::time::Duration;

/// A container that does what it is told by signals, and says when it is ready for them.
const OBEDIENT: &str = "trap 'exit 7' USR1; trap 'exit 143' TERM; echo ready; while :; do sleep 0.05; done";

#[test]
fn the_kernel_is_the_guests_own() -> Result<()> {
    with_every_containerd(|node| {
        let host = node.run(Runtime::Runc, "c1", &[], &["uname", "-r"]).output()?.ok()?.text();
        let guest = node.run(Runtime::Kata, "c1", &[], &["uname", "-r"]).output()?.ok()?.text();
        let built = std::fs::read(node.install().kernel())?;
        ensure!(guest != host, "both run {host}");
        let banner = format!("Linux version {guest} ");
        ensure!(
            built.windows(banner.len()).any(|w| w == banner.as_bytes()),
            "{guest} is not the kernel of {}",
            node.install().kernel().display()
        );
        Ok(())
    })
}

#[test]
fn exit_codes_of_a_run() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            for code in [0, 1, 42, 255] {
                let id = format!("{}-{code}", runtime.tag());
                let script = format!("echo out; echo err >&2; exit {code}");
                let done = node.run(runtime, &id, &[], &["sh", "-c", &script]).output()?.expect_code(code)?;
                ensure!(done.text() == "out", "{runtime:?}: stdout {:?}", done.text());
                ensure!(done.stderr.trim_end() == "err", "{runtime:?}: stderr {:?}", done.stderr);
            }
        }
        Ok(())
    })
}

#[test]
fn exec_in_a_running_container() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            let id = runtime.tag();
            node.detached(runtime, id, &[], &["sleep", "1000"])?;
            for code in [0, 1, 42, 255] {
                let script = format!("echo out; echo err >&2; exit {code}");
                let done = node.exec(id, &format!("x{code}"), &[], &["sh", "-c", &script]).output()?;
                let done = done.expect_code(code)?;
                ensure!(done.text() == "out" && done.stderr.trim_end() == "err", "{runtime:?}: {done:?}");
            }
            let shared = node.exec(id, "ps", &[], &["ps"]).output()?.ok()?.text();
            ensure!(shared.contains("sleep 1000"), "{runtime:?}: exec does not see the container: {shared}");
            let user = node.exec(id, "user", &["--user", "1000:1000"], &["id", "-u"]).output()?.ok()?.text();
            ensure!(user == "1000", "{runtime:?}: exec as user 1000 is {user}");
            let cwd = node.exec(id, "cwd", &["--cwd", "/etc"], &["pwd"]).output()?.ok()?.text();
            ensure!(cwd == "/etc", "{runtime:?}: exec in /etc is in {cwd}");
            // the same exec id may be used again once its process is gone
            node.exec(id, "cwd", &[], &["true"]).output()?.ok()?;
            node.remove(id)?;
        }
        Ok(())
    })
}

/// Kills a fresh container with `signal`; returns the exit status in the event and what `ctr task delete` says of it.
fn killed(node: &Node, runtime: Runtime, id: &str, signal: &str, script: &[&str]) -> Result<(u64, String)> {
    let events = Events::watch(node)?;
    node.detached(runtime, id, &[], script)?;
    events.wait("/tasks/start", id, Duration::from_secs(5))?;
    if script.len() == 3 {
        // traps are set once the shell has written this file
        let waits = ["sh", "-c", "while ! [ -e /ready ]; do sleep 0.02; done"];
        node.exec(id, "wait", &[], &waits).output()?.ok()?;
    }
    node.ctr(["task", "kill", "-s", signal, id]).output()?.ok()?;
    let (_, exit) = events.wait_exit(id, Duration::from_secs(15))?;
    ensure!(node.status(id)?.as_deref() == Some("STOPPED"), "{runtime:?}: status {:?}", node.status(id)?);
    let deleted = node.ctr(["task", "delete", id]).output()?.ok()?;
    node.ctr(["container", "rm", id]).output()?.ok()?;
    Ok((exit_status(&exit.content).context("no exit_status in the event")?, message(&deleted.stderr, id)))
}

#[test]
fn signals_end_containers_as_with_runc() -> Result<()> {
    with_every_containerd(|node| {
        let obedient = OBEDIENT.replace("echo ready", "touch /ready");
        let cases: [(&str, &str, &[&str], u64); 4] = [
            ("kill", "KILL", &["sleep", "1000"], 137),
            ("term", "TERM", &["sh", "-c", &obedient], 143),
            ("usr1", "USR1", &["sh", "-c", &obedient], 7),
            ("by-number", "9", &["sleep", "1000"], 137),
        ];
        for (name, signal, script, wanted) in cases {
            let mut said = Vec::new();
            for runtime in BOTH {
                let (code, message) = killed(node, runtime, &format!("{}-{name}", runtime.tag()), signal, script)?;
                ensure!(code == wanted, "{runtime:?}: {signal} ends {script:?} with {code} instead of {wanted}");
                said.push(message);
            }
            ensure!(said[0] == said[1], "delete says with runc {:?}, with kata {:?}", said[0], said[1]);
        }
        Ok(())
    })
}

#[test]
fn an_exec_dies_of_term_with_143() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            let id = runtime.tag();
            node.detached(runtime, id, &[], &["sleep", "1000"])?;
            let exec = node.exec(id, "victim", &[], &["sh", "-c", "echo ready; exec sleep 500"]).spawn()?;
            let mut exec = exec;
            wait_ready(&mut exec)?;
            node.ctr(["task", "kill", "-s", "TERM", "--exec-id", "victim", id]).output()?.ok()?;
            exec.finish()?.expect_code(143)?;
            node.remove(id)?;
        }
        Ok(())
    })
}

/// Between create and start, where a client that dies leaves it; another then ends and deletes it.
#[test]
fn a_container_that_was_not_started_can_be_ended() -> Result<()> {
    with_node(|node| {
        let bundle = Bundle::make(node, "unborn", &["sleep", "1000"])?;
        let shim = Shim::start(node, "unborn", &bundle)?;
        let ended = (|| {
            shim.create("unborn")?;
            shim.kill("unborn", 9)?;
            let (status, deleted) = (shim.wait("unborn")?, shim.delete("unborn")?);
            ensure!((status, deleted) == (137, 137), "wait says {status}, delete says {deleted}");
            Ok(())
        })();
        shim.shut_down()?;
        ended
    })
}

/// Reads the line `ready`.
fn wait_ready(running: &mut e2e::ctr::Running) -> Result<()> {
    use std::io::Read as _;
    let mut line = [0; 6];
    running.stdout.as_mut().context("stdout")?.read_exact(&mut line)?;
    ensure!(&line == b"ready\n", "instead of ready: {line:?}");
    Ok(())
}

#[test]
fn pause_and_resume() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            let id = runtime.tag();
            node.detached(runtime, id, &[], &["sh", "-c", "while :; do echo x >> /ticks; sleep 0.02; done"])?;
            node.ctr(["task", "pause", id]).output()?.ok()?;
            let paused = node.status(id)?;
            ensure!(paused.as_deref() == Some("PAUSED"), "{runtime:?}: {paused:?} after pause");
            node.ctr(["task", "resume", id]).output()?.ok()?;
            let resumed = node.status(id)?;
            ensure!(resumed.as_deref() == Some("RUNNING"), "{runtime:?}: {resumed:?} after resume");
            let goes_on = "a=$(wc -l < /ticks); while [ $(wc -l < /ticks) -le $a ]; do sleep 0.02; done";
            node.exec(id, "goes-on", &[], &["sh", "-c", goes_on]).output()?.ok()?;
            node.remove(id)?;
        }
        Ok(())
    })
}

#[test]
fn ps_lists_the_processes() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            let id = runtime.tag();
            node.detached(runtime, id, &[], &["sh", "-c", "sleep 1000 & sleep 1000 & touch /ready; wait"])?;
            let waits = ["sh", "-c", "while ! [ -e /ready ]; do sleep 0.02; done"];
            node.exec(id, "wait", &[], &waits).output()?.ok()?;
            let list = node.ctr(["task", "ps", id]).output()?.ok()?.text();
            let pids: Vec<_> = list.lines().skip(1).filter_map(|l| l.split_whitespace().next()).collect();
            // clients look them up on the host, where the guest's are none: the task's own stands for them
            let task = node.task_pid(id)?.to_string();
            let expected = if runtime == Runtime::Kata { 1 } else { 3 };
            ensure!(
                pids.len() == expected && pids.contains(&task.as_str()),
                "{runtime:?}: the task's pid is {task}:\n{list}"
            );
            node.remove(id)?;
        }
        Ok(())
    })
}

/// The paths of all objects in a JSON document.
fn objects(of: &serde_json::Value, at: &str) -> Vec<String> {
    let Some(fields) = of.as_object() else { return Vec::new() };
    let below = fields.iter().flat_map(|(name, value)| objects(value, &format!("{at}/{name}")));
    std::iter::once(at.to_owned()).chain(below).collect()
}

/// Clients look into messages without asking whether they are there: CRI-O ends by a nil pointer.
#[test]
fn metrics_have_what_runcs_have() -> Result<()> {
    // what is never zero, as the host's version 1 or 2 calls it
    const NUMBERS: [(&str, &str); 17] = [
        ("/pids/current", "/pids/current"),
        ("/cpu/usage/total", "/cpu/usage_usec"),
        ("/memory/cache", "/memory/file"),
        ("/memory/total_cache", "/memory/file"),
        ("/memory/rss", "/memory/anon"),
        ("/memory/total_rss", "/memory/anon"),
        ("/memory/pg_fault", "/memory/pgfault"),
        ("/memory/total_pg_fault", "/memory/pgfault"),
        ("/memory/hierarchical_memory_limit", "/memory/usage_limit"),
        ("/memory/hierarchical_swap_limit", "/memory/swap_limit"),
        ("/memory/usage/limit", "/memory/usage_limit"),
        ("/memory/usage/usage", "/memory/usage"),
        ("/memory/usage/max", "/memory/usage"),
        ("/memory/swap/limit", "/memory/swap_limit"),
        ("/memory/kernel/usage", "/memory/slab"),
        ("/memory/kernel/limit", "/memory/usage_limit"),
        ("/memory/kernel_tcp/limit", "/memory/usage_limit"),
    ];
    with_every_containerd(|node| {
        let mut seen = Vec::new();
        for runtime in BOTH {
            let id = runtime.tag();
            // a program's memory, and a file's
            let work = "head -c 1m /dev/urandom > /file; cat /file > /dev/null; echo done; sleep 1000";
            node.detached(runtime, id, &["--memory-limit", "67108864"], &["sh", "-c", work])?;
            node.exec(id, "x", &[], &["sh", "-c", "until [ $(stat -c %s /file) = 1048576 ]; do :; done"])
                .output()?
                .ok()?;
            let shown = node.ctr(["task", "metrics", "--format", "json", id]).output()?.ok()?.text();
            let metrics: serde_json::Value = serde_json::from_str(&shown).context(shown.clone())?;
            let mut found = objects(&metrics, "");
            found.sort();
            println!("{runtime:?}: {} messages: {}", found.len(), found.join(" "));
            let is_one = found.iter().any(|path| path == "/memory/usage");
            for (one, two) in NUMBERS {
                let path = if is_one { one } else { two };
                let number = metrics.pointer(path).and_then(serde_json::Value::as_u64);
                ensure!(number.is_some_and(|n| n > 0), "{runtime:?}: {path} is {number:?} in {shown}");
            }
            let limit = metrics.pointer(if is_one { "/memory/usage/limit" } else { "/memory/usage_limit" });
            ensure!(limit.and_then(serde_json::Value::as_u64) == Some(64 << 20), "{runtime:?}: a limit of {limit:?}");
            seen.push(found);
            node.remove(id)?;
        }
        ensure!(seen[0] == seen[1], "messages of runc {:?}\nof kata {:?}", seen[0], seen[1]);
        Ok(())
    })
}

#[test]
fn delete_of_a_running_task_is_refused() -> Result<()> {
    with_every_containerd(|node| {
        let mut said = Vec::new();
        for runtime in BOTH {
            node.detached(runtime, "c1", &[], &["sleep", "1000"])?;
            let refused = node.ctr(["task", "delete", "c1"]).output()?;
            ensure!(refused.code != 0, "{runtime:?}: a running task was deleted");
            said.push(message(&refused.stderr, "c1"));
            let state = node.status("c1")?;
            ensure!(state.as_deref() == Some("RUNNING"), "{runtime:?}: {state:?} after a refused delete");
            node.remove("c1")?;
        }
        ensure!(said[0] == said[1], "runc: {}\nkata: {}", said[0], said[1]);
        Ok(())
    })
}

/// The events of a life with everything in it: their topics, and the exit status where there is one.
fn life(node: &Node, runtime: Runtime, id: &str) -> Result<Vec<(String, Option<u64>)>> {
    let events = Events::watch(node)?;
    node.detached(runtime, id, &[], &["sleep", "1000"])?;
    node.exec(id, "x1", &[], &["sh", "-c", "exit 3"]).output()?.expect_code(3)?;
    node.ctr(["task", "pause", id]).output()?.ok()?;
    node.ctr(["task", "resume", id]).output()?.ok()?;
    node.ctr(["task", "kill", "-s", "KILL", id]).output()?.ok()?;
    events.wait_exit(id, Duration::from_secs(10))?;
    node.ctr(["task", "delete", id]).output()?.ok()?;
    node.ctr(["container", "rm", id]).output()?.ok()?;
    events.wait("/tasks/delete", id, Duration::from_secs(10))?;
    Ok(events.of(id).into_iter().map(|e| (e.topic, exit_status(&e.content))).collect())
}

#[test]
fn events_come_in_the_same_order() -> Result<()> {
    with_every_containerd(|node| {
        let kata = life(node, Runtime::Kata, "kata-ev")?;
        // containerd 2's shim for runc ends now and then before it has told of the delete
        let mut runc = life(node, Runtime::Runc, "runc-ev");
        for n in 0..3 {
            if runc.is_ok() {
                break;
            }
            runc = life(node, Runtime::Runc, &format!("runc-ev{n}"));
        }
        let runc = runc?;
        ensure!(runc == kata, "runc: {runc:#?}\nkata: {kata:#?}");
        Ok(())
    })
}

/// What `ctr` said, without the time and with the container's id left out.
fn message(stderr: &str, id: &str) -> String {
    let said = stderr.split_once(" level=").map_or(stderr, |(_, rest)| rest);
    said.replace(id, "ID")
}

/// The `exit_status` of an event, where it has one.
fn exit_status(content: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(content).ok()?.get("exit_status")?.as_u64()
}
