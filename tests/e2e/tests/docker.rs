//! Docker as people use it, beside runc, in a world of its own: the host must be in the end what it was.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    Containerd, NodeSetup, Runtime,
    docker::{Docker, with_docker},
    ports::get,
    world::ADDRESS,
};
use std::{collections::BTreeSet, fs, time::Duration};

/// Serves its own name on port 80.
const SERVER: &str =
    "mkdir -p /www; echo \"served by $NAME\" > /www/index.html; echo ready; exec httpd -f -p 80 -h /www";

const PATIENCE: Duration = Duration::from_secs(180);

/// With runc twice, for what Docker makes once and for what it leaves each time; then with kata, which must leave no more.
fn with_both(setup: NodeSetup, test: impl Fn(&Docker<'_>, Runtime) -> Result<()> + Send + Sync) -> Result<()> {
    with_docker(setup, |docker| {
        test(docker, Runtime::Runc).context("runc")?;
        let before = docker.host()?;
        test(docker, Runtime::Runc).context("runc, again")?;
        let between = docker.host()?;
        test(docker, Runtime::Kata).context("kata")?;
        docker.expect_host(&between, &before.changes(&between)).context("after kata")
    })
}

fn serve(docker: &Docker<'_>, runtime: Runtime, name: &str, options: &[&str]) -> Result<()> {
    let variable = format!("NAME={name}");
    let options = [&["-d", "--name", name, "-e", &variable], options].concat();
    docker.container(runtime, &options, &["sh", "-c", SERVER]).limit(PATIENCE).output()?.ok()?;
    docker.logs_with(name, "ready").map(drop)
}

/// What a container gets from another one, by name or address.
fn ask(docker: &Docker<'_>, from: &str, whom: &str) -> Result<String> {
    let script = format!("for i in 1 2 3 4 5 6 7 8 9; do timeout 10 wget -qO- http://{whom}/ && break; sleep 1; done");
    docker.sh(from, &script)
}

/// `make test` has this much of it.
#[test]
fn containers_are_reached_by_port_and_by_name() -> Result<()> {
    with_both(NodeSetup::default(), |docker, runtime| {
        let look = ["sh", "-c", "ip -4 -o addr show dev eth0; ip route; cat /etc/hostname"];
        let seen = docker.container(runtime, &["--rm", "--hostname", "seen"], &look).limit(PATIENCE).output()?.ok()?;
        let seen = seen.text();
        ensure!(
            seen.contains("inet 172.17.0.") && seen.contains("default via 172.17.0.1") && seen.contains("seen"),
            "{seen}"
        );
        docker.say(["network", "create", "pair"])?;
        serve(docker, runtime, "one", &["-p", "18082:80", "--network", "pair"])?;
        serve(docker, runtime, "two", &["--network", "pair"])?;
        for address in ["127.0.0.1", ADDRESS] {
            ensure!(get(address, 18082)? == "served by one", "by {address}");
        }
        ensure!(ask(docker, "one", "two")? == "served by two", "one asks two by name");
        ensure!(ask(docker, "two", "one")? == "served by one", "two asks one by name");
        // while it runs
        docker.say(["network", "connect", "bridge", "two"])?;
        let address = "{{(index .NetworkSettings.Networks \"bridge\").IPAddress}}";
        let address = docker.say(["inspect", "-f", address, "two"])?;
        ensure!(get(&address, 80)? == "served by two", "by its second network");
        docker.say(["network", "disconnect", "bridge", "two"])?;
        let script =
            "for i in 1 2 3 4 5 6 7 8 9; do test -e /sys/class/net/eth1 || break; sleep 1; done; ls /sys/class/net";
        let links = docker.sh("two", script)?;
        ensure!(links.split_whitespace().eq(["eth0", "lo"]), "after a disconnect: {links}");
        // files, whole
        ensure!(docker.sh("one", "cat /etc/resolv.conf")?.contains("nameserver 127.0.0.11"), "resolv.conf");
        let file = docker.node.dir().join("copied");
        fs::write(&file, format!("for {}", runtime.tag()))?;
        docker.say(["cp", &file.display().to_string(), "one:/www/copied"])?;
        ensure!(docker.sh("one", "cat /www/copied")? == format!("for {}", runtime.tag()), "copied into the container");
        docker.say(["cp", "one:/www/index.html", &file.display().to_string()])?;
        ensure!(fs::read_to_string(&file)? == "served by one\n", "copied out of the container");
        let failed =
            docker.run(["exec", "one", "sh", "-c", "echo out; echo err >&2; exit 9"]).output()?.expect_code(9)?;
        ensure!((failed.text().as_str(), failed.stderr.trim()) == ("out", "err"), "{failed:?}");
        docker.say(["rm", "-f", "one", "two"])?;
        docker.say(["network", "rm", "pair"])?;
        Ok(())
    })
}

#[test]
#[ignore = "minutes: `make clients` runs it"]
fn a_container_is_watched_updated_and_outlives_the_daemon() -> Result<()> {
    let setup = NodeSetup { containerd: Containerd::V2, ..NodeSetup::default() };
    with_both(setup, |docker, runtime| {
        let health = ["--health-cmd", "test -e /tmp/well", "--health-interval", "1s", "--health-retries", "1"];
        serve(docker, runtime, "web", &[&health[..], &["-p", "18083:80", "--memory", "128m"]].concat())?;
        docker.wait_shown("web", "{{.State.Health.Status}}", "unhealthy")?;
        docker.sh("web", "touch /tmp/well")?;
        docker.wait_shown("web", "{{.State.Health.Status}}", "healthy")?;
        let stats = docker.say(["stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}} {{.PIDs}}", "web"])?;
        ensure!(stats.starts_with("web ") && stats.contains("128MiB") && !stats.ends_with(" 0"), "{stats}");
        let top = docker.run(["top", "web"]).output()?;
        ensure!(
            top.text().contains("httpd") || (top.code != 0 && top.stderr.contains("virtual machine")),
            "top: {top:?}"
        );
        ensure!(!top.text().contains("kthreadd"), "top shows the host: {top:?}");
        // smaller is always possible; more may be refused, and is not taken back silently
        docker.say(["update", "--memory", "100m", "--memory-swap", "100m", "web"])?;
        ensure!(docker.say(["stats", "--no-stream", "--format", "{{.MemUsage}}", "web"])?.contains("100MiB"), "update");
        docker.restart_daemon()?;
        ensure!(docker.say(["inspect", "-f", "{{.State.Running}}", "web"])? == "true", "it outlives the daemon");
        ensure!(docker.sh("web", "echo $((6 * 7))")? == "42", "exec after the daemon's end");
        ensure!(get("127.0.0.1", 18083)? == "served by web", "its port after the daemon's end");
        docker.say(["restart", "-t", "1", "web"])?;
        ensure!(get("127.0.0.1", 18083)? == "served by web", "its port after a restart");
        docker.say(["rm", "-f", "web"])?;
        // in the foreground, with its exit code and both streams
        let ended = docker.container(runtime, &["--rm", "-i"], &["sh", "-c", "cat; echo err >&2; exit 5"]);
        let ended = ended.output_with(b"in\n")?.expect_code(5)?;
        ensure!((ended.text().as_str(), ended.stderr.trim()) == ("in", "err"), "{ended:?}");
        // a policy: the daemon starts it again
        let again = ["sh", "-c", "echo life; sleep 1"];
        docker.container(runtime, &["-d", "--name", "again", "--restart", "always"], &again).output()?.ok()?;
        docker.logs_with("again", "life\nlife")?;
        docker.say(["rm", "-f", "again"])?;
        Ok(())
    })
}

/// One run in the foreground that is reached by its port and then ended.
fn reached(docker: &Docker<'_>, runtime: Runtime, name: &str, port: u16) -> Result<()> {
    let (published, variable) = (format!("{port}:80"), format!("NAME={name}"));
    let options = ["--rm", "--name", name, "-p", &published, "-e", &variable];
    let running = docker.container(runtime, &options, &["sh", "-c", SERVER]).limit(PATIENCE).spawn()?;
    let served = get("127.0.0.1", port);
    docker.say(["kill", name])?;
    running.finish()?.expect_code(137)?;
    let served = served.with_context(|| name.to_owned())?;
    ensure!(served == format!("served by {name}"), "{name}: {served}");
    Ok(())
}

/// The host is as it was before, once the daemon has made what it makes for every published port.
fn with_a_daemon_in_use(test: impl FnOnce(&Docker<'_>) -> Result<()> + Send) -> Result<()> {
    with_docker(NodeSetup::default(), |docker| {
        reached(docker, Runtime::Runc, "warm", 18100)?;
        let before = docker.host()?;
        test(docker)?;
        docker.expect_host(&before, &BTreeSet::new())
    })
}

#[test]
#[ignore = "minutes: `make clients` runs it"]
fn thirty_in_a_row_are_each_reached() -> Result<()> {
    with_a_daemon_in_use(|docker| {
        (0..30).try_for_each(|number| reached(docker, Runtime::Kata, &format!("row{number}"), 18100))
    })
}

#[test]
#[ignore = "minutes: `make clients` runs it"]
fn ten_at_once_are_each_reached() -> Result<()> {
    with_a_daemon_in_use(|docker| {
        std::thread::scope(|scope| {
            let at_once: Vec<_> = (0..10)
                .map(|number| {
                    scope.spawn(move || reached(docker, Runtime::Kata, &format!("once{number}"), 18110 + number))
                })
                .collect();
            let ended = at_once.into_iter().map(|one| one.join().map_err(|_| anyhow::anyhow!("panicked"))?);
            ended.collect::<Result<Vec<_>>>().map(drop)
        })
    })
}
