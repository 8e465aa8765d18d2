//! What a process in a container may and may not: the same words of the kernel about it as with runc.

use anyhow::{Context as _, Result, ensure};
use e2e::{BOTH, Node, NodeSetup, Runtime, image, install::Install, with_node, with_node_setup};
use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

/// The output of one script with both runtimes, which must be equal; returns it.
fn same(node: &Node, name: &str, options: &[&str], script: &str) -> Result<String> {
    let mut outputs = Vec::new();
    for runtime in BOTH {
        let done = node.run(runtime, name, options, &["sh", "-c", script]).output()?;
        outputs.push((done.code, done.text(), done.stderr.trim_end().to_owned()));
    }
    ensure!(outputs[0] == outputs[1], "{name}: {script}\nrunc: {:?}\nkata: {:?}", outputs[0], outputs[1]);
    Ok(std::mem::take(&mut outputs[1].1))
}

/// Runs all cases and shows all that fail.
fn every(cases: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let failed: Vec<_> = cases.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

const STATUS: &str =
    "grep -E '^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status";

#[test]
fn the_process_status_is_the_same() -> Result<()> {
    // the two kernels may know different capabilities, so that "all of them" differ; those are compared otherwise
    let cases: [(&str, &[&str]); 6] = [
        ("default", &[]),
        ("seccomp", &["--seccomp"]),
        ("cap-add", &["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_NET_ADMIN"]),
        ("cap-drop", &["--cap-drop", "CAP_CHOWN", "--cap-drop", "CAP_KILL"]),
        ("privileged", &["--privileged"]),
        ("new-privs", &["--allow-new-privs"]),
    ];
    with_node(|node| {
        every(cases.map(|(name, options)| {
            let shown = same(node, name, options, STATUS)?;
            ensure!(shown.lines().count() == 10, "{name}: {shown}");
            Ok(())
        }))
    })
}

#[test]
fn seccomp_denies() -> Result<()> {
    with_node(|node| {
        let script = "unshare -U true && echo allowed; mount -t tmpfs x /tmp && echo allowed; echo done";
        let shown = same(node, "seccomp", &["--seccomp"], script)?;
        ensure!(shown == "done", "{shown}");
        Ok(())
    })
}

#[test]
fn limits_names_and_paths_are_the_same() -> Result<()> {
    let cases: [(&str, &[&str], &str); 8] = [
        ("rlimits", &[], "grep -E '^Max (open files|core)' /proc/self/limits"),
        ("hostname", &[], "hostname | tr -d '[:alnum:]._-' | wc -c"),
        ("cwd", &["--cwd", "/etc"], "pwd"),
        (
            "env",
            &["--env", "ONE=1", "--env", "TWO=a b"],
            "echo $ONE-$TWO; env | grep -vE '^(HOSTNAME|SHLVL|HOME)=' | sort",
        ),
        // by the shell alone: of two programs in a pipe the first may have looked before the second is there
        ("pid", &[], "echo $$; set -- /proc/[0-9]*; echo $#"),
        ("masked", &[], "cat /proc/kcore 2>&1 | wc -c; ls /sys/firmware | wc -l; cat /proc/keys | wc -c"),
        ("read-only", &["--read-only"], "touch /x; touch /dev/shm/y && echo shm"),
        ("proc-ro", &[], "echo 1 > /proc/sys/kernel/panic; touch /sys/x; echo end"),
    ];
    with_node(|node| {
        every(cases.map(|(name, options, script)| {
            let shown = same(node, name, options, script)?;
            ensure!(!shown.is_empty(), "{name}: nothing shown");
            Ok(())
        }))
    })
}

#[test]
fn mounts_and_devices_are_the_same() -> Result<()> {
    let cases = [
        ("devices", "ls /dev | sort | tr '\\n' ' '; stat -c '%n %F %t:%T %a' /dev/null /dev/zero /dev/full /dev/tty"),
        (
            "mounts",
            "awk '{print $2, $3}' /proc/mounts | grep -vE '^(/ |/dev/console |/sys/fs/cgroup|/proc/sysrq-trigger )' | sort",
        ),
        ("denied", "mknod /tmp/d b 7 0 && dd if=/tmp/d of=/dev/null count=1; mknod /tmp/m c 1 1; cat /tmp/m; echo end"),
        ("allowed", "mknod /tmp/z c 1 5 && head -c 4 /tmp/z | od -An -tx1; head -c 9 /dev/urandom | wc -c"),
    ];
    with_node(|node| {
        every(cases.map(|(name, script)| {
            let shown = same(node, name, &[], script)?;
            ensure!(!shown.is_empty(), "{name}: nothing shown");
            Ok(())
        }))
    })
}

#[test]
fn bind_mounts() -> Result<()> {
    with_node(|node| {
        let dir = node.dir().join("shared");
        fs::create_dir(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
        fs::write(dir.join("from-host"), "of the host\n")?;
        let file = dir.join("from-host").display().to_string();
        let dir_option = |mode: &str| format!("type=bind,src={},dst=/shared,options=rbind:{mode}", dir.display());
        let file_option = |mode: &str| format!("type=bind,src={file},dst=/etc/one,options=bind:{mode}");
        let write = "echo c > /shared/new; cat /shared/new; rm /shared/new";
        let cases = [
            (
                "dir-ro",
                dir_option("ro"),
                "cat /shared/from-host; touch /shared/x; ls /shared",
                "of the host\nfrom-host",
            ),
            ("file-ro", file_option("ro"), "cat /etc/one; echo x > /etc/one; cat /etc/one", "of the host\nof the host"),
            ("dir-rw", dir_option("rw"), write, "c"),
            ("file-rw", file_option("rw"), "echo changed > /etc/one; cat /etc/one", "changed"),
        ];
        every(cases.map(|(name, option, script, wanted)| {
            let shown = same(node, name, &["--mount", &option], script)?;
            ensure!(shown == wanted, "{name}: {shown:?}");
            Ok(())
        }))?;
        ensure!(fs::read_to_string(&file)? == "changed\n", "the host does not see what the container wrote");

        // a file that the host changes while the container runs
        let live = dir_option("ro");
        node.detached(Runtime::Kata, "live", &["--mount", &live], &["sleep", "1000"])?;
        fs::write(dir.join("later"), "later\n")?;
        let seen = node.exec("live", "x", &[], &["cat", "/shared/later"]).output()?.ok()?.text();
        ensure!(seen == "later", "{seen:?}");
        node.remove("live")
    })
}

#[test]
fn a_missing_bind_source_is_named() -> Result<()> {
    with_node(|node| {
        for runtime in BOTH {
            let option = "type=bind,src=/no/such/source,dst=/x,options=rbind:ro";
            let done = node.run(runtime, "c1", &["--mount", option], &["true"]).output()?;
            ensure!(done.code != 0, "{runtime:?}: started without its mount");
            ensure!(done.stderr.contains("/no/such/source"), "{runtime:?}: {}", done.stderr);
        }
        Ok(())
    })
}

#[test]
fn cgroup_limits_hold_in_the_guest() -> Result<()> {
    with_node(|node| {
        let cgroup = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev";
        let options =
            ["--mount", cgroup, "--memory-limit", "67108864", "--cpu-quota", "50000", "--cpu-period", "100000"];
        // the container's own cgroup, as its processes see it
        let script = "cd /sys/fs/cgroup && cat memory.max cpu.max";
        let shown = node.run(Runtime::Kata, "c1", &options, &["sh", "-c", script]).output()?.ok()?.text();
        ensure!(shown == "67108864\n50000 100000", "{shown:?}");
        // tail keeps what it reads until the end of its input: more than it may
        let script = "head -c 200m /dev/zero | tail > /dev/null; echo $?";
        let killed = node.run(Runtime::Kata, "c2", &options, &["sh", "-c", script]).output()?.text();
        ensure!(killed == "137", "a process beyond its memory limit ended with {killed:?}");
        // one that may write there divides what it has itself, by whatever there is
        let own = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw:nosuid:noexec:nodev";
        let script = "cd /sys/fs/cgroup && mkdir all part && echo $$ > all/cgroup.procs && \
                      echo '+cpu +cpuset +memory +pids +io' > cgroup.subtree_control && \
                      echo '20000 100000' > part/cpu.max && cat part/cpu.max";
        let shown = node.run(Runtime::Kata, "c3", &["--mount", own], &["sh", "-c", script]).output()?.ok()?.text();
        ensure!(shown == "20000 100000", "{shown:?}");
        Ok(())
    })
}

/// One that has as many processes as it may, and one that has divided its cgroup and lives in a part of it.
#[test]
fn whatever_a_container_does_with_its_cgroup_others_join_it() -> Result<()> {
    with_node(|node| {
        let own = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw:nosuid:noexec:nodev";
        let divided = "cd /sys/fs/cgroup && mkdir init && echo $$ > init/cgroup.procs && \
                       echo '+memory +pids' > cgroup.subtree_control && : > /mark/done && exec sleep 1000";
        let full = "cd /sys/fs/cgroup && echo 1 > pids.max && : > /mark/done && exec sleep 1000";
        for (id, script, place) in [("divided", divided, "0::/init"), ("full", full, "0::/")] {
            // a process of ours in there would be in the way while it divides
            let mark = node.dir().join(id);
            fs::create_dir(&mark)?;
            let mount = format!("type=bind,src={},dst=/mark,options=rbind:rw", mark.display());
            node.detached(Runtime::Kata, id, &["--mount", own, "--mount", &mount], &["sh", "-c", script])?;
            e2e::cri::Cri::until(|| Ok((mark.join("done").exists(), "no mark".into()))).context(id)?;
            let shown = node.exec(id, "look", &[], &["cat", "/proc/self/cgroup"]).output()?.ok().context(id)?.text();
            ensure!(shown == place, "{id}: {shown:?}");
            node.remove(id)?;
        }
        let frozen = "echo 1 > /sys/fs/cgroup/cgroup.freeze; exec sleep 1000";
        node.detached(Runtime::Kata, "frozen", &["--mount", own], &["sh", "-c", frozen])?;
        // nothing tells of it; a process that comes while it freezes would stand still with it
        std::thread::sleep(Duration::from_secs(1));
        let tried = node.exec("frozen", "try", &[], &["true"]).limit(Duration::from_secs(20)).output()?;
        ensure!(tried.stderr.contains("cannot exec in a paused container"), "{tried:?}");
        node.remove("frozen")
    })
}

#[test]
fn a_kernel_may_lack_a_controller() -> Result<()> {
    let parameters = "cgroup_disable=memory clearcpuid=avx2";
    let config = Install::locate()?.config_with(&[("kernel_params", parameters.into())])?;
    with_node_setup(NodeSetup { config: Some(config), ..NodeSetup::default() }, |node| {
        let shown = node.run(Runtime::Kata, "c1", &[], &["cat", "/proc/cmdline"]).output()?.ok()?.text();
        ensure!(shown.contains("cgroup_disable=memory clearcpuid=cx16,avx2"), "{shown}");
        Ok(())
    })
}

#[test]
fn users_and_groups_are_the_same() -> Result<()> {
    with_node(|node| {
        let script = format!("{STATUS}; echo $HOME; id; touch /etc/x; touch /tmp/x && stat -c '%u:%g' /tmp/x");
        let mut shown = Vec::new();
        for runtime in BOTH {
            let run = node.run_image(runtime, image::FOR_APP, "app", &[], &["sh", "-c", &script]).output()?;
            let mut all = vec![run.text(), run.stderr];
            node.detached(runtime, runtime.tag(), &[], &["sleep", "1000"])?;
            for (n, user) in ["app", "1000:2000", "1000", "4000:4000"].iter().enumerate() {
                let options = ["--user", user];
                let exec = node.exec(runtime.tag(), &format!("x{n}"), &options, &["sh", "-c", &script]).output()?;
                all.extend([exec.text(), exec.stderr]);
            }
            node.remove(runtime.tag())?;
            shown.push(all);
        }
        ensure!(shown[0] == shown[1], "runc: {:#?}\nkata: {:#?}", shown[0], shown[1]);
        ensure!(shown[1][0].contains("uid=1000(app)"), "{:?}", shown[1][0]);
        Ok(())
    })
}
