//! Log URIs: a container's or an exec's output goes into a file, or to a program of the host, as with runc.

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api::CreateTaskRequest;
use e2e::{
    BOTH, Node, Runtime,
    events::Events,
    image, processes,
    task_api::{Bundle, Shim, specification},
    with_node,
};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(20);

/// A log program: what it was told, then all of stdout, then all of stderr; its id beside the log.
const KEEPS: &str = r#"exec >>"$2"; echo $$ >"$2.pid"; echo "$1 $CONTAINER_ID $CONTAINER_NAMESPACE"; exec 5>&-
cat <&3; cat <&4; echo drained"#;

/// Makes a log program, and returns its URI and the log's path.
fn program(folder: &Path, name: &str, text: &str) -> Result<(String, PathBuf)> {
    let (path, log) = (folder.join(name), folder.join(format!("{name}.log")));
    fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok((format!("binary://{}?log={}", path.display(), log.display()), log))
}

/// A zombie, whose parent has not looked yet, has no command line.
fn has_ended(log: &Path) -> Result<bool> {
    let pid = fs::read_to_string(format!("{}.pid", log.display())).context("the program's id")?;
    Ok(fs::read(Path::new("/proc").join(pid.trim()).join("cmdline")).unwrap_or_default().is_empty())
}

/// Lets a detached container come to its end, and deletes it.
fn to_the_end(node: &Node, events: &Events, runtime: Runtime, id: &str, uri: &str, script: &str) -> Result<()> {
    node.detached(runtime, id, &["--log-uri", uri], &["sh", "-c", script])?;
    events.wait_exit(id, SOON)?;
    node.remove(id)
}

#[test]
fn files_and_programs_get_the_output() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        for runtime in BOTH {
            let tag = runtime.tag();
            let file = node.dir().join(tag).join("new folder/log");
            let uri = format!("file://{}", file.display().to_string().replace(' ', "%20"));
            for n in 1..=2 {
                let script = format!("echo out-{n}; echo err-{n} >&2");
                to_the_end(node, &events, runtime, &format!("{tag}-f{n}"), &uri, &script)?;
            }
            let mut lines: Vec<_> = fs::read_to_string(&file)?.lines().map(str::to_owned).collect();
            // of two streams either may be first
            lines[..2].sort();
            lines[2..].sort();
            ensure!(lines == ["err-1", "out-1", "err-2", "out-2"], "{tag}: the log file has {lines:?}");

            let (uri, log) = program(node.dir(), &format!("{tag}-keeps"), KEEPS)?;
            let id = format!("{tag}-b");
            to_the_end(node, &events, runtime, &id, &uri, "seq 1 20000; echo err >&2; printf 'end\\n'")?;
            let wanted = (1..=20000).fold(format!("log {id} kata-e2e\n"), |text, line| text + &format!("{line}\n"));
            let text = fs::read_to_string(&log)?;
            // runc's shim sends TERM at once
            let wanted = wanted + if runtime == Runtime::Kata { "end\nerr\ndrained\n" } else { "end\n" };
            ensure!(text.starts_with(&wanted), "{tag}: the log has {} bytes instead of {}", text.len(), wanted.len());
            ensure!(has_ended(&log)?, "{tag}: the log program still runs");
        }
        Ok(())
    })
}

/// An exec's program is told the exec's id; it ends with the exec, and the container goes on.
#[test]
fn execs_have_logs_and_wrong_uris_are_refused() -> Result<()> {
    with_node(|node| {
        for runtime in BOTH {
            let (tag, id) = (runtime.tag(), format!("{}-c", runtime.tag()));
            node.detached(runtime, &id, &[], &["sleep", "1000"])?;
            let (uri, log) = program(node.dir(), &format!("{tag}-exec"), KEEPS)?;
            node.exec(&id, "x1", &["--log-uri", &uri], &["echo", "of an exec"]).output()?.ok()?;
            let text = fs::read_to_string(&log)?;
            ensure!(text.starts_with("log x1 kata-e2e\nof an exec\n"), "{tag}: the exec's log is {text:?}");
            ensure!(has_ended(&log)?, "{tag}: the exec's log program still runs");
            let file = node.dir().join(format!("{tag}-exec-file"));
            let uri = format!("file://{}", file.display());
            node.exec(&id, "x2", &["--log-uri", &uri], &["echo", "into a file"]).output()?.ok()?;
            ensure!(fs::read_to_string(&file)? == "into a file\n", "{tag}: the exec's file");
            for uri in ["npipe:////./pipe/x", "binary:///does/not/exist"] {
                let refused = node.exec(&id, "x3", &["--log-uri", uri], &["true"]).output()?;
                ensure!(refused.code != 0, "{tag}: {uri} was taken");
                let word = if uri.starts_with("npipe") { "unknown STDIO scheme npipe" } else { "/does/not/exist" };
                ensure!(refused.stderr.contains(word), "{tag}: {uri}: {}", refused.stderr);
            }
            node.remove(&id)?;
        }
        let args = ["run", "-d", "--runtime", Runtime::Kata.name(), "--log-uri", "npipe:////./pipe/x"];
        let refused = node.ctr([&args[..], &[image::NAME, "c1", "true"]].concat()).output()?;
        ensure!(refused.stderr.contains("stdout \"npipe:////./pipe/x\": unknown STDIO scheme"), "{}", refused.stderr);
        node.ctr(["container", "rm", "c1"]).output()?.ok()?;
        Ok(())
    })
}

/// By the Task API: `ctr` takes one or the other. And a terminal has the size that it was given before its start.
#[test]
fn terminals_have_logs_and_sizes() -> Result<()> {
    with_node(|node| {
        let (uri, log) = program(node.dir(), "terminal", KEEPS)?;
        let args = ["sh", "-c", "test -t 1 && echo terminal; exec sleep 1000"];
        let bundle = Bundle::make(node, "c1", &args)?;
        let mut spec = specification(&args);
        let mounts = spec["mounts"].as_array_mut().context("mounts")?;
        mounts.push(json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}));
        let options = ["newinstance", "ptmxmode=0666", "mode=0620"];
        mounts.push(json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": options}));
        bundle.write(&spec)?;
        let shim = Shim::start(node, "c1", &bundle)?;
        let (id, terminal, stdout) = ("c1".to_owned(), true, uri);
        shim.create_as(CreateTaskRequest { id, terminal, stdout, ..Default::default() })?;
        shim.start_container("c1")?;
        let file = node.dir().join("size");
        shim.exec_terminal("c1", "x1", &["stty", "size"], &format!("file://{}", file.display()))?;
        shim.resize("c1", "x1", 80, 24)?;
        shim.resize("c1", "x1", 132, 43)?;
        ensure!(shim.run_exec("c1", "x1")? == 0, "stty failed");
        let size = fs::read_to_string(&file)?;
        ensure!(size == "43 132\r\n", "the size is {size:?}");
        shim.kill("c1", 9)?;
        shim.wait("c1")?;
        shim.delete("c1")?;
        shim.shut_down()?;
        let text = fs::read_to_string(&log)?;
        ensure!(text == "log c1 kata-e2e\nterminal\r\ndrained\n" && has_ended(&log)?, "{text:?}");
        Ok(())
    })
}

/// A program that dies does not end the container, as it does with runc (by SIGPIPE); one that stalls holds up neither a
/// kill nor, for ever, a delete.
#[test]
fn a_program_that_dies_or_stalls_holds_nobody_up() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        let (uri, _) = program(node.dir(), "dies", "exit 3")?;
        // more than all pipes on the way hold
        let script = "seq 1 200000 && echo out && exit 7";
        node.detached(Runtime::Kata, "c1", &["--log-uri", &uri], &["sh", "-c", script])?;
        let (_, event) = events.wait_exit("c1", SOON)?;
        ensure!(event.content.contains("\"exit_status\":7"), "{}", event.content);
        node.remove("c1")?;

        let stalls = r#"echo $$ >"$2.pid"; exec 5>&-; exec sleep 1000"#;
        let (uri, log) = program(node.dir(), "stalls", stalls)?;
        node.detached(Runtime::Kata, "c2", &["--log-uri", &uri], &["sh", "-c", "seq 1 200000"])?;
        node.ctr(["task", "kill", "-s", "KILL", "c2"]).output()?.ok()?;
        events.wait_exit("c2", SOON)?;
        node.remove("c2")?;
        ensure!(has_ended(&log)?, "the stalled program still runs");
        Ok(())
    })
}

/// What was written before the shim's end reaches the log, and then its program ends too.
#[test]
fn a_program_outlives_the_shim_by_what_it_has_to_read() -> Result<()> {
    with_node(|node| {
        let events = Events::watch(node)?;
        let (uri, log) = program(node.dir(), "keeps", KEEPS)?;
        node.detached(Runtime::Kata, "c1", &["--log-uri", &uri], &["sh", "-c", "echo words; exec sleep 1000"])?;
        let (stalls, stalled) = program(node.dir(), "stalls", r#"echo $$ >"$2.pid"; exec 5>&-; exec sleep 1000"#)?;
        node.exec("c1", "x1", &["-d", "--log-uri", &stalls], &["sleep", "1000"]).output()?.ok()?;
        let end = Instant::now() + SOON;
        while !fs::read_to_string(&log).unwrap_or_default().contains("words") {
            if Instant::now() > end {
                bail!("the log has {:?}", fs::read_to_string(&log));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        processes::wait_for(node.tag(), "containerd-shim-kata", SOON)?.kill()?;
        events.wait("/tasks/delete", "c1", SOON)?;
        ensure!(fs::read_to_string(&log)? == "log c1 kata-e2e\nwords\ndrained\n", "{:?}", fs::read_to_string(&log)?);
        ensure!(has_ended(&log)? && has_ended(&stalled)?, "a log program still runs");
        node.ctr(["container", "rm", "c1"]).output()?.ok()?;
        Ok(())
    })
}
