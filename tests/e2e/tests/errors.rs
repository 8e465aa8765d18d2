//! What cannot be started: the words and the codes are runc's, and nothing stays behind.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Node, NodeSetup, Outcome, Runtime, events::Events, image, install::Install, with_every_containerd, with_node,
    with_node_setup,
};
use std::time::Duration;

/// What follows these words is meant for the user, whichever runtime says it.
const UNABLE: &str = "unable to start container process: ";

/// (name, options, command, a word that must be in the error)
const CASES: [(&str, &[&str], &[&str], &str); 4] = [
    ("by-name", &[], &["no-such-program"], "no-such-program"),
    ("by-path", &[], &["/no/such/program"], "/no/such/program"),
    ("not-executable", &[], &["/etc/not-executable"], "/etc/not-executable"),
    ("cwd-is-file", &["--cwd", "/etc/passwd"], &["pwd"], "/etc/passwd"),
];

/// The part of an error that both runtimes must word alike.
fn reason(done: &Outcome, runtime: Runtime) -> Result<String> {
    let at = done.stderr.find(UNABLE).with_context(|| format!("{runtime:?}: no {UNABLE:?} in {:?}", done.stderr))?;
    let text = done.stderr[at + UNABLE.len()..].trim_end();
    Ok(text.strip_suffix(": unknown").unwrap_or(text).to_owned())
}

fn compare(name: &str, done: &[Outcome], wanted: &str) -> Result<()> {
    let reasons: Vec<_> = BOTH.iter().zip(done).map(|(r, d)| reason(d, *r)).collect::<Result<_>>()?;
    ensure!(reasons[0] == reasons[1], "{name}:\nrunc: {}\nkata: {}", reasons[0], reasons[1]);
    ensure!(reasons[1].contains(wanted), "{name}: {wanted} is not named in {:?}", reasons[1]);
    ensure!(done[0].code == done[1].code, "{name}: code {} of runc, {} of kata", done[0].code, done[1].code);
    Ok(())
}

/// Collects the failures of all cases, so that one run shows them all.
fn every(cases: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let failed: Vec<_> = cases.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

#[test]
fn a_run_that_cannot_start() -> Result<()> {
    with_every_containerd(|node| {
        every(CASES.map(|(name, options, command, wanted)| {
            let attempt = |runtime| node.run(runtime, name, options, command).output();
            compare(name, &[attempt(Runtime::Runc)?, attempt(Runtime::Kata)?], wanted)
        }))
    })
}

/// Runc makes a missing working directory when it starts a container, and does not when it executes something in one.
#[test]
fn a_missing_working_directory() -> Result<()> {
    with_node(|node| {
        for runtime in BOTH {
            let made = node.run(runtime, "cwd", &["--cwd", "/no/such/dir"], &["pwd"]).output()?.ok()?.text();
            ensure!(made == "/no/such/dir", "{runtime:?}: {made:?}");
            node.detached(runtime, runtime.tag(), &[], &["sleep", "1000"])?;
        }
        let attempt = |runtime: Runtime| node.exec(runtime.tag(), "cwd", &["--cwd", "/no/such/dir"], &["pwd"]).output();
        let compared = compare("exec", &[attempt(Runtime::Runc)?, attempt(Runtime::Kata)?], "/no/such/dir");
        node.remove(Runtime::Runc.tag())?;
        node.remove(Runtime::Kata.tag())?;
        compared
    })
}

/// Runc's words for this one depend on the Go that it was built with; Debian 12's says that permission is denied.
#[test]
fn a_directory_is_no_program() -> Result<()> {
    with_node(|node| {
        let done = node.run(Runtime::Kata, "dir", &[], &["/etc"]).output()?;
        let reason = reason(&done, Runtime::Kata)?;
        let known = ["exec: \"/etc\": is a directory", "exec: \"/etc\": permission denied"];
        ensure!(known.contains(&reason.as_str()), "{reason}");
        ensure!(done.code != 0, "code 0");
        Ok(())
    })
}

#[test]
fn an_exec_that_cannot_start_leaves_the_container_alone() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            node.detached(runtime, runtime.tag(), &[], &["sleep", "1000"])?;
        }
        let cases = every(CASES.map(|(name, options, command, wanted)| {
            let attempt = |runtime: Runtime| node.exec(runtime.tag(), name, options, command).output();
            compare(name, &[attempt(Runtime::Runc)?, attempt(Runtime::Kata)?], wanted)
        }));
        for runtime in BOTH {
            let again = node.exec(runtime.tag(), "again", &[], &["echo", "alive"]).output()?.ok()?.text();
            ensure!(again == "alive", "{runtime:?}: {again:?}");
            node.remove(runtime.tag())?;
        }
        cases
    })
}

/// What `ctr` said at last, without the time.
fn last_words(done: &Outcome, runtime: Runtime) -> Result<String> {
    ensure!(done.code != 0, "{runtime:?}: an unknown user was accepted: {done:?}");
    let said = done.stderr.trim_end().rsplit("ctr: ").next().unwrap_or_default();
    // the snapshot is mounted under another name each time
    Ok(said.split_whitespace().filter(|word| !word.contains("containerd-mount")).collect::<Vec<_>>().join(" "))
}

#[test]
fn a_user_that_does_not_exist() -> Result<()> {
    with_node(|node| {
        let mut said = Vec::new();
        for runtime in BOTH {
            let run = node.run_image(runtime, image::FOR_NOBODY, "user", &[], &["true"]).output()?;
            // ctr leaves the container that it made before it looked
            let _ = node.ctr(["container", "rm", "user"]).output()?;
            node.detached(runtime, runtime.tag(), &[], &["sleep", "1000"])?;
            let exec = node.exec(runtime.tag(), "user", &["--user", "no-such-user"], &["true"]).output()?;
            node.remove(runtime.tag())?;
            said.push([last_words(&run, runtime)?, last_words(&exec, runtime)?]);
        }
        ensure!(said[0] == said[1], "runc: {:?}\nkata: {:?}", said[0], said[1]);
        ensure!(said[1][0].contains("no-such-user") || said[1][0].contains("no users found"), "{:?}", said[1]);
        Ok(())
    })
}

/// What `ctr` says to calls that come at the wrong time or name nobody: code and words.
fn wrong_calls(node: &Node, events: &Events, runtime: Runtime) -> Result<Vec<String>> {
    let (up, down) = (format!("{}-up", runtime.tag()), format!("{}-down", runtime.tag()));
    node.detached(runtime, &up, &[], &["sleep", "1000"])?;
    node.detached(runtime, &down, &[], &["true"])?;
    events.wait_exit(&down, Duration::from_secs(20))?;
    let ended = &format!("{}-ended", runtime.tag());
    node.exec(&up, ended, &["-d"], &["true"]).output()?.ok()?;
    events.wait("/tasks/exit", ended, Duration::from_secs(20))?;
    let calls: [&[&str]; 14] = [
        &["kill", "-a", &down],
        &["kill", &down],
        &["kill", "-a", "--exec-id", "nobody", &down],
        &["kill", "--exec-id", "nobody", &up],
        &["kill", "-a", "--exec-id", ended, &up],
        &["kill", "--exec-id", ended, &up],
        &["kill", "nobody"],
        &["delete", "--exec-id", "nobody", &up],
        &["delete", &up],
        &["exec", "--exec-id", "x1", &down, "true"],
        &["exec", "--exec-id", ended, &up, "true"],
        &["pause", &down],
        &["resume", &up],
        &["metrics", &down],
    ];
    let mut said = Vec::new();
    for call in calls {
        let done = node.ctr([&["task"], call].concat()).output()?;
        // what went wrong, without its class, which runc's shim mostly does not know
        let words = done.stderr.lines().last().unwrap_or_default().rsplit_once(": ").map_or("", |(words, class)| {
            if ["unknown", "failed precondition"].contains(&class) { words } else { done.stderr.trim_end() }
        });
        let text = format!("{}: code {} {words}", call.join(" "), done.code);
        said.push(
            [(&up, "UP"), (&down, "DOWN"), (ended, "ENDED")]
                .iter()
                .fold(text, |text, (id, name)| text.replace(*id, name)),
        );
    }
    ensure!(node.status(&up)?.as_deref() == Some("RUNNING"), "{runtime:?}: {up} does not run any more");
    node.remove(&up)?;
    node.remove(&down)?;
    Ok(said)
}

#[test]
fn calls_at_the_wrong_time_are_refused_in_runcs_words() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        let runc = wrong_calls(node, &events, Runtime::Runc)?;
        let kata = wrong_calls(node, &events, Runtime::Kata)?;
        let both = || runc.iter().zip(&kata);
        let differ: Vec<_> = both().filter(|(runc, kata)| runc != kata).collect();
        ensure!(differ.is_empty(), "{differ:#?}");
        Ok(())
    })
}

fn second_run(node: &Node, runtime: Runtime) -> Result<()> {
    node.run(runtime, "same", &[], &["no-such-program"]).output()?;
    let again = node.run(runtime, "same", &[], &["echo", "now"]).output()?.ok()?.text();
    ensure!(again == "now", "{runtime:?}: {again:?}");
    Ok(())
}

#[test]
fn an_id_is_free_after_a_failed_start() -> Result<()> {
    with_node(|node| every(BOTH.map(|runtime| second_run(node, runtime))))
}

/// The error tells what the guest said at last, and not what ended because of it.
#[test]
fn a_guest_that_dies_at_its_boot() -> Result<()> {
    let config = Install::locate()?.config_with(&[("kernel_params", "rdinit=/nowhere root=/dev/nothing".into())])?;
    with_node_setup(NodeSetup { config: Some(config), ..NodeSetup::default() }, |node| {
        for round in 0..3 {
            let done = node.run(Runtime::Kata, &format!("dies{round}"), &[], &["true"]).output()?;
            let told = done.stderr.contains("QEMU ended") && done.stderr.contains("Kernel panic");
            ensure!(done.code != 0 && told, "{}", done.stderr);
        }
        Ok(())
    })
}
