//! nerdctl as people use it, beside runc, in a world of its own: the host must be in the end what it was.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Containerd, NodeSetup, Runtime,
    cri::Cri,
    nerdctl::{Nerdctl, with_nerdctl},
    ports::get,
    pty::Terminal,
    world::ADDRESS,
};
use std::{fs, time::Duration};

const PATIENCE: Duration = Duration::from_secs(60);

/// Serves its own name on port 80.
const SERVER: &str =
    "mkdir -p /www; echo \"served by $NAME\" > /www/index.html; echo ready; exec httpd -f -p 80 -h /www";

/// With runc twice, for what nerdctl makes once and for what it leaves each time; then with kata, which must leave no more.
fn with_both(setup: NodeSetup, test: impl Fn(&Nerdctl<'_>, Runtime) -> Result<()> + Send + Sync) -> Result<()> {
    with_nerdctl(setup, |nerdctl| {
        test(nerdctl, Runtime::Runc).context("runc")?;
        let before = nerdctl.host()?;
        test(nerdctl, Runtime::Runc).context("runc, again")?;
        let between = nerdctl.host()?;
        test(nerdctl, Runtime::Kata).context("kata")?;
        nerdctl.expect_host(&between, &before.changes(&between)).context("after kata")
    })
}

fn logs_with(nerdctl: &Nerdctl<'_>, name: &str, text: &str) -> Result<String> {
    Cri::until(|| {
        let logs = nerdctl.say(["logs", name])?;
        Ok((logs.contains(text), logs))
    })
}

fn serve(nerdctl: &Nerdctl<'_>, runtime: Runtime, name: &str, options: &[&str]) -> Result<()> {
    let variable = format!("NAME={name}");
    let options = [&["-d", "--name", name, "-e", &variable], options].concat();
    nerdctl.container(runtime, &options, &["sh", "-c", SERVER])?;
    logs_with(nerdctl, name, "ready").map(drop)
}

/// `make test` has this much of it.
#[test]
fn a_server_is_run_reached_looked_at_and_removed() -> Result<()> {
    with_both(NodeSetup::default(), |nerdctl, runtime| {
        let look = ["sh", "-c", "ip -4 -o addr show dev eth0; ip route; cat /etc/resolv.conf /etc/hostname"];
        let seen = nerdctl.container(runtime, &["--rm", "--hostname", "seen"], &look)?;
        ensure!(
            seen.contains("inet 10.4.0.") && seen.contains("default via 10.4.0.1") && seen.contains("seen"),
            "{seen}"
        );
        serve(nerdctl, runtime, "web", &["-p", "18080:80"])?;
        for address in ["127.0.0.1", ADDRESS] {
            ensure!(get(address, 18080)? == "served by web", "by {address}");
        }
        ensure!(nerdctl.say(["exec", "web", "sh", "-c", "echo $((6 * 7))"])? == "42");
        let file = nerdctl.node.dir().join("copied");
        fs::write(&file, format!("for {}", runtime.tag()))?;
        nerdctl.say(["cp", &file.display().to_string(), "web:/www/copied"])?;
        let inside = nerdctl.say(["exec", "web", "cat", "/www/copied"])?;
        ensure!(inside == format!("for {}", runtime.tag()), "copied into the container: {inside}");
        nerdctl.say(["cp", "web:/www/index.html", &file.display().to_string()])?;
        ensure!(fs::read_to_string(&file)? == "served by web\n", "copied out of the container");
        nerdctl.say(["restart", "-t", "1", "web"])?;
        ensure!(get("127.0.0.1", 18080)? == "served by web", "after a restart");
        nerdctl.say(["rm", "-f", "web"])?;
        ensure!(get_nothing(18080), "the port is still served");
        Ok(())
    })
}

fn get_nothing(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_err()
}

#[test]
#[ignore = "minutes: `make clients` runs it"]
fn the_rest_of_it_with_the_newest_containerd() -> Result<()> {
    let setup = NodeSetup { containerd: Containerd::V2, ..NodeSetup::default() };
    with_both(setup, |nerdctl, runtime| {
        serve(nerdctl, runtime, "web", &["-p", "18080:80", "--memory", "128m"])?;
        // a terminal, whose size the shell has from its first moment
        let mut args = nerdctl.arguments();
        args.extend(["exec", "-it", "web", "sh"].map(str::to_owned));
        let mut terminal = Terminal::start(&nerdctl.program(), &args, 41, 143)?;
        terminal.send("stty size; echo e''nd\n")?;
        let shown = terminal.expect("\nend", PATIENCE)?;
        ensure!(shown.contains("41 143") && !shown.contains("level="), "{shown}");
        terminal.send("exit 3\n")?;
        // nerdctl has one exit code for all of them
        let (_, shown) = terminal.finish(PATIENCE)?;
        ensure!(shown.contains("exit code 3"), "the shell's end: {shown}");
        let stats = nerdctl.say(["stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}} {{.PIDs}}", "web"])?;
        ensure!(stats.starts_with("web ") && stats.contains("128MiB") && !stats.ends_with(" 0"), "{stats}");
        let top = nerdctl.run(["top", "web"]).output()?;
        // runc's is the host's ps; ours shows the same, or is refused in so many words
        ensure!(
            top.text().contains("httpd") || (top.code != 0 && top.stderr.contains("virtual machine")),
            "top: {top:?}"
        );
        ensure!(!top.text().contains("kthreadd"), "top shows the host: {top:?}");
        let failed = nerdctl.run(["exec", "web", "sh", "-c", "echo out; echo err >&2; exit 9"]).output()?;
        let has = |word: &str| failed.stderr.contains(word);
        ensure!(failed.text() == "out" && has("err") && has("exit code 9"), "{failed:?}");
        nerdctl.say(["rm", "-f", "web"])?;
        // a policy: containerd's monitor starts it again
        nerdctl.container(
            runtime,
            &["-d", "--name", "again", "--restart", "always"],
            &["sh", "-c", "echo life; sleep 1"],
        )?;
        Cri::until(|| {
            let logs = nerdctl.say(["logs", "again"])?;
            Ok((logs.matches("life").count() >= 2, logs))
        })?;
        nerdctl.say(["rm", "-f", "again"])?;
        Ok(())
    })
}

#[test]
#[ignore = "minutes: `make clients` runs it"]
fn compose_brings_services_up_that_find_each_other() -> Result<()> {
    with_both(NodeSetup::default(), |nerdctl, runtime| {
        let file = nerdctl.node.dir().join("compose.yaml");
        let service = |name: &str, more: &str| {
            format!(
                "  {name}:\n    image: kata-test\n    pull_policy: never\n    runtime: {}\n    environment: [NAME={name}]\n    \
                     command: ['sh', '-c', '{}']\n{more}",
                runtime.name(),
                // compose has its own meaning of a dollar
                SERVER.replace('$', "$$"),
            )
        };
        let volumes = "    volumes: ['kept:/kept']\n";
        let text = format!(
            "name: pair\nservices:\n{}{}volumes:\n  kept: {{}}\n",
            service("one", &format!("    ports: ['18081:80']\n{volumes}")),
            service("two", volumes),
        );
        fs::write(&file, text)?;
        let compose = |words: &[&str]| {
            let file = file.display().to_string();
            nerdctl.run([&["compose", "-f", &file][..], words].concat()).limit(PATIENCE * 3).output()?.ok()
        };
        let tested = (|| {
            compose(&["up", "-d"])?;
            ensure!(get("127.0.0.1", 18081)? == "served by one", "the published port");
            for (from, to) in [("one", "two"), ("two", "one")] {
                let script = format!("for i in 1 2 3 4 5 6 7 8 9; do wget -qO- http://{to}/ && break; sleep 1; done");
                let heard = compose(&["exec", "-T", from, "sh", "-c", &script])?.text();
                ensure!(heard == format!("served by {to}"), "{from} asks {to}: {heard}");
            }
            compose(&["exec", "-T", "one", "sh", "-c", "echo word > /kept/file"])?;
            ensure!(compose(&["exec", "-T", "two", "cat", "/kept/file"])?.text() == "word", "the volume");
            ensure!(compose(&["logs"])?.text().matches("ready").count() == 2, "logs");
            ensure!(compose(&["ps"])?.text().contains("pair-one"), "ps");
            Ok(())
        })();
        let down = compose(&["down", "-v"]);
        tested.and(down.map(drop))
    })
}
