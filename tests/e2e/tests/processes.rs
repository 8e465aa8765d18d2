//! How a process begins: its environment, limits, capabilities, streams, mounts and settings are those that runc gives it.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Node, Outcome, Runtime,
    compile::compile,
    ctr::Invocation,
    image,
    task_api::{Bundle, Shim, specification},
    with_node,
};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    time::Duration,
};

/// A root file system for specifications that name it by its path.
fn root(node: &Node) -> Result<PathBuf> {
    let root = node.dir().join("image");
    if !root.exists() {
        image::lay_out(&root)?;
        fs::create_dir_all(root.join("data/sub"))?;
        fs::write(root.join("data/sub/file"), "of the image\n")?;
        fs::set_permissions(root.join("data/sub/file"), fs::Permissions::from_mode(0o4750))?;
        fs::set_permissions(root.join("data/sub"), fs::Permissions::from_mode(0o711))?;
        fs::set_permissions(root.join("data"), fs::Permissions::from_mode(0o1751))?;
        nix::unistd::chown(&root.join("data/sub"), Some(5.into()), Some(6.into()))?;
        std::os::unix::fs::symlink("sub/file", root.join("data/link"))?;
    }
    Ok(root)
}

/// A specification that runs a shell script there.
fn shell(node: &Node, script: &str) -> Result<Value> {
    let mut spec = specification(&["/bin/sh", "-c", script]);
    spec["root"]["path"] = root(node)?.display().to_string().into();
    let dev = json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]});
    spec["mounts"].as_array_mut().context("mounts")?.push(dev);
    Ok(spec)
}

/// `ctr run` of a specification.
fn run(node: &Node, runtime: Runtime, name: &str, options: &[&str], spec: &Value) -> Result<Invocation> {
    let path = node.dir().join(format!("{name}.json"));
    fs::write(&path, spec.to_string())?;
    let file = path.display().to_string();
    Ok(node.ctr([&["run", "--rm", "--runtime", runtime.name()], options, &["--config", &file, name]].concat()))
}

/// What both say of a specification, which must be equal; returns it.
fn same(node: &Node, name: &str, spec: &Value) -> Result<Outcome> {
    let mut said = Vec::new();
    for runtime in BOTH {
        said.push(run(node, runtime, &format!("{name}-{}", runtime.tag()), &[], spec)?.output_with(b"input\n")?);
    }
    let told = |of: &Outcome| (of.code, of.text(), of.stderr.trim_end().to_owned());
    let (runc, kata) = (told(&said[0]), told(&said[1]));
    ensure!(runc == kata, "{name}\nrunc: {runc:#?}\nkata: {kata:#?}");
    said.pop().context("an outcome")
}

#[test]
fn a_process_begins_as_with_runc() -> Result<()> {
    with_node(|node| {
        let script = "tr '\\0' '\\n' < /proc/1/environ; grep ^Cap /proc/1/status; cat /proc/1/limits; \
             cat /proc/sys/kernel/shmmax /proc/sys/net/ipv4/conf/lo/rp_filter /proc/sys/net/ipv4/conf/lo/accept_local; \
             cat /proc/sys/kernel/hostname; hostname; \
             ls -ldn /data /data/* | sed 's/ [A-Z][a-z][a-z] .* \\// \\//'; cat /data/sub/file; \
             ls -ldn /plain /new | sed 's/ [A-Z][a-z][a-z] .* \\// \\//'; touch /new/x /data/x; \
             cat /over/low /over-ro/low; cp /over/low /over/copy && rm /over/low && ls /over; touch /over-ro/x; \
             awk '$2 ~ /^.(over|data)/ {print $2}' /proc/mounts; exit 7";
        let mut spec = shell(node, script)?;
        spec.as_object_mut().context("a specification")?.remove("hostname");
        let env = ["PATH=/nowhere", "A=1", "HOME=", "B=x=y", "A=2", "PATH=/bin", "E="];
        spec["process"]["env"] = json!(env);
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_OF_TOMORROW", "cap_setuid", "SETGID"],
            "permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_OF_TOMORROW"], "effective": ["CAP_KILL", "CAP_CHOWN"],
            "inheritable": ["CAP_CHOWN"], "ambient": ["CAP_KILL", "CAP_CHOWN"],
        });
        spec["linux"]["sysctl"] = json!({
            "kernel/shmmax": "77777", "net/ipv4/conf/lo/rp_filter": "2", "net.ipv4.conf.lo.accept_local": "1",
        });
        let root = root(node)?;
        fs::create_dir(root.join("plain"))?;
        fs::set_permissions(root.join("plain"), fs::Permissions::from_mode(0o710))?;
        for runtime in BOTH {
            let layer = |name: &str| node.dir().join(runtime.tag()).join(name);
            for name in ["lower", "second", "up", "work"] {
                fs::create_dir_all(layer(name))?;
            }
            fs::write(layer("lower").join("low"), "below\n")?;
        }
        let mut said = Vec::new();
        for runtime in BOTH {
            let mut spec = spec.clone();
            // the mount point is made by who mounts, and its permissions are another thing when it is there
            let _ = fs::remove_dir(root.join("new"));
            let layer = |name: &str| node.dir().join(runtime.tag()).join(name).display().to_string();
            let lower = format!("lowerdir={}", layer("lower"));
            let layers = [lower.clone(), format!("upperdir={}", layer("up")), format!("workdir={}", layer("work"))];
            spec["mounts"].as_array_mut().context("mounts")?.extend([
                json!({"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m"]}),
                json!({"destination": "/plain", "type": "tmpfs", "source": "tmpfs"}),
                json!({"destination": "/new", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}),
                json!({"destination": "/over", "type": "overlay", "source": "overlay", "options": layers}),
                json!({"destination": "/over-ro", "type": "overlay", "source": "overlay",
                    "options": ["ro", format!("{lower}:{}", layer("second"))]}),
            ]);
            let done = run(node, runtime, runtime.tag(), &[], &spec)?.output()?;
            let upper = node.dir().join(runtime.tag()).join("up");
            let copied = fs::read_to_string(upper.join("copy")).unwrap_or_default();
            let removed = fs::symlink_metadata(upper.join("low")).map(|meta| (meta.mode(), meta.rdev())).ok();
            said.push((done.code, done.text(), done.stderr, copied, removed));
        }
        ensure!(said[0] == said[1], "runc: {:#?}\nkata: {:#?}", said[0], said[1]);
        let (code, text, ..) = &said[1];
        ensure!(*code == 7 && text.contains("\nA=2\nHOME=/root\nB=x=y\nE=\n"), "{code} {text}");
        Ok(())
    })
}

#[test]
fn what_runc_refuses_is_refused_in_its_words() -> Result<()> {
    with_node(|node| {
        let reason =
            |of: &Outcome| of.stderr.rsplit_once("error during container init: ").map(|(_, why)| why.to_owned());
        for (name, part, key, value) in [
            ("none", "process", "env", json!(["PATH=/bin", "A"])),
            ("empty", "process", "env", json!(["PATH=/bin", "=x"])),
            ("sysctl", "linux", "sysctl", json!({"net.no.such": "1"})),
            ("value", "linux", "sysctl", json!({"kernel.shm_rmid_forced": "x"})),
        ] {
            let mut spec = shell(node, "true")?;
            spec[part][key] = value;
            let mut said = Vec::new();
            for runtime in BOTH {
                let done = run(node, runtime, &format!("{name}-{}", runtime.tag()), &[], &spec)?.output()?;
                said.push((done.code, reason(&done).with_context(|| format!("{done:?}"))?.trim_end().to_owned()));
            }
            ensure!(said[0] == said[1], "runc: {:?}\nkata: {:?}", said[0], said[1]);
        }
        // nobody's but its own, outside of a pod
        let done = node.run(Runtime::Kata, "joins", &["--with-ns", "pid:/proc/1/ns/pid"], &["true"]).output()?;
        ensure!(done.stderr.contains("the pid namespace /proc/1/ns/pid cannot be joined"), "{done:?}");
        let mut spec = shell(node, "true")?;
        let throttled = json!([{"major": 8, "minor": 0, "rate": 1024}]);
        spec["linux"]["resources"] = json!({"blockIO": {"throttleReadBpsDevice": throttled}});
        let done = run(node, Runtime::Kata, "throttled", &[], &spec)?.output()?;
        ensure!(done.stderr.contains("block I/O limits name the host's devices"), "{done:?}");
        Ok(())
    })
}

/// Says how each stream can be opened again.
const AGAIN: &str = "for name in stdin stdout stderr; do \
    stat -L -c \"$name %u:%g %a %F\" /dev/$name; done; \
    echo out > /dev/stdout; echo err > /dev/stderr; head -n 1 /dev/stdin; : < /proc/self/fd/0 && echo in; \
    : > /proc/self/fd/1; : > /proc/self/fd/2; id -u";

#[test]
fn streams_are_their_users() -> Result<()> {
    with_node(|node| {
        let mut spec = shell(node, AGAIN)?;
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let done = same(node, "user", &spec)?;
        ensure!(done.text().contains("out\ninput\nin") && done.stderr == "err\n", "{done:?}");
        let changed = format!("setuidgid app sh -c '{AGAIN}'");
        same(node, "changed", &shell(node, &changed)?)?;

        let mut said = Vec::new();
        for runtime in BOTH {
            let id = runtime.tag();
            node.detached(runtime, id, &[], &["sleep", "1000"])?;
            let mut all = Vec::new();
            for (exec, options, script) in [
                ("user", &["--user", "app"][..], AGAIN),
                ("root", &[], AGAIN),
                ("changed", &[], &changed),
                ("limits", &[], "cat /proc/self/limits"),
            ] {
                let done = node.exec(id, exec, options, &["sh", "-c", script]).output_with(b"input\n")?;
                all.push((exec, done.code, done.text(), done.stderr));
            }
            node.remove(id)?;
            said.push(all);
        }
        ensure!(said[0] == said[1], "runc: {:#?}\nkata: {:#?}", said[0], said[1]);
        ensure!(said[1][0].2.contains("out\ninput\nin") && said[1][0].3 == "err\n", "{:?}", said[1][0]);
        Ok(())
    })
}

#[test]
fn a_user_begins_in_a_folder_that_it_may_not_enter() -> Result<()> {
    with_node(|node| {
        let script = "pwd; ls; id -u; cd /closed";
        let mut spec = shell(node, script)?;
        let closed = root(node)?.join("closed");
        fs::create_dir(&closed)?;
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700))?;
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
        spec["process"]["cwd"] = json!("/closed");
        let done = same(node, "begins", &spec)?;
        ensure!(done.text() == "/closed\n1000" && done.stderr.contains("Permission denied"), "{done:?}");

        let mut said = Vec::new();
        for runtime in BOTH {
            let id = runtime.tag();
            node.detached(runtime, id, &[], &["sleep", "1000"])?;
            node.exec(id, "make", &[], &["mkdir", "-m", "700", "/closed"]).output()?.ok()?;
            let options = ["--user", "1000", "--cwd", "/closed"];
            let done = node.exec(id, "begins", &options, &["sh", "-c", "pwd; id -u; ls"]).output()?;
            said.push((done.code, done.text(), done.stderr));
            node.remove(id)?;
        }
        ensure!(said[0] == said[1], "runc: {:#?}\nkata: {:#?}", said[0], said[1]);
        ensure!(said[1].1.starts_with("/closed\n1000"), "{:?}", said[1]);
        Ok(())
    })
}

#[test]
fn no_input_is_the_end_of_input() -> Result<()> {
    const SCRIPT: &str =
        "cat > /mark/read; { stat -L -c '%F %t:%T' /dev/stdin; readlink /proc/self/fd/0; } > /mark/kind";
    with_node(|node| {
        let mut said = Vec::new();
        for runtime in BOTH {
            let mark = node.dir().join(runtime.tag());
            fs::create_dir(&mark)?;
            let mount = format!("type=bind,src={},dst=/mark,options=rbind:rw", mark.display());
            let options = ["--null-io", "--mount", &mount];
            let done = node.run(runtime, runtime.tag(), &options, &["sh", "-c", SCRIPT]);
            done.limit(Duration::from_secs(30)).output()?.ok()?;
            said.push((fs::read_to_string(mark.join("read"))?, fs::read_to_string(mark.join("kind"))?));
        }
        ensure!(said[0] == said[1] && said[1].0.is_empty(), "runc: {:?}\nkata: {:?}", said[0], said[1]);

        // as CRI's exec probes
        let bundle = Bundle::make(node, "input", &["/bin/sleep", "1000"])?;
        let mut spec = specification(&["/bin/sleep", "1000"]);
        // more than the guest's kernel allows by itself
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 2_000_000}]);
        bundle.write(&spec)?;
        let shim = Shim::start(node, "input", &bundle)?;
        shim.create("input")?;
        shim.start_container("input")?;
        let code = shim.exec("input", "probe", &["/bin/sh", "-c", "cat; exit 5"])?;
        ensure!(code == 5, "exit code {code}");
        // what an exec does not say is its container's
        let limited = "test \"$(ulimit -Sn) $(ulimit -Hn)\" = '77 2000000'";
        let code = shim.exec("input", "limited", &["/bin/sh", "-c", limited])?;
        ensure!(code == 0, "exit code {code}");
        shim.kill("input", 9)?;
        shim.wait("input")?;
        shim.delete("input")?;
        shim.shut_down()
    })
}

/// Says what becomes of calls, by their numbers.
const CALLS: &str = r#"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        errno = 0;
        long got = syscall(strtol(argv[i], 0, 0), -1L, -1L, -1L, -1L, -1L, -1L);
        printf("%s: %ld %s\n", argv[i], got < 0 ? -1L : 0L, errno == ENOSYS ? "ENOSYS" : errno == EPERM ? "EPERM" : "other");
    }
    return 0;
}
"#;

#[test]
fn calls_that_a_profile_cannot_know_do_not_exist() -> Result<()> {
    with_node(|node| {
        compile(node.dir(), "calls", CALLS)?;
        let mount = format!("type=bind,src={},dst=/bin/calls,options=bind:ro", node.dir().join("calls").display());
        // a denied one, denied ones that the profile's author knew, some that nobody knows yet, x32's
        let numbers = ["/bin/calls", "175", "313", "442", "449", "460", "1000", "100000", "0x40000000", "0x40001000"];
        let mut said = Vec::new();
        for runtime in BOTH {
            let done = node.run(runtime, "c1", &["--seccomp", "--mount", &mount], &numbers).output()?.ok()?;
            said.push(done.text());
        }
        ensure!(said[0] == said[1], "runc: {}\nkata: {}", said[0], said[1]);
        ensure!(said[1].contains("1000: -1 ENOSYS") && said[1].contains("175: -1 EPERM"), "{}", said[1]);
        Ok(())
    })
}

/// The pattern is the guest's kernel's own, so that there is nothing to compare with.
#[test]
fn a_core_file_is_where_the_pattern_says() -> Result<()> {
    with_node(|node| {
        let script = "ulimit -c unlimited && cat /proc/sys/kernel/core_pattern && cd /tmp && \
             { sleep 1000 & kill -SEGV $!; wait $!; echo $?; } && ls /tmp && head -c 4 /tmp/core* | od -An -c";
        let done = node.run(Runtime::Kata, "c1", &[], &["sh", "-c", script]).output()?.ok()?;
        let text = done.text();
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        ensure!(
            lines.len() == 4 && lines[..3] == ["core", "139", "core"] && lines[3].starts_with("177   E   L   F"),
            "{text}"
        );
        Ok(())
    })
}
