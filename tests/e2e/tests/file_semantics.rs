//! What programs may expect of a file system, in a volume and in the root file system, beside runc: a program that tries
//! it all prints what it saw.

use anyhow::{Result, ensure};
use e2e::{
    BOTH, NodeSetup,
    compile::compile,
    cri::{Network, with_cri},
    ctr::Invocation,
    with_node,
};
use serde_json::json;
use std::{fs, os::unix::fs::PermissionsExt as _};

const PROGRAM: &str = include_str!("file_semantics.c");

/// Where Linux' FUSE differs, and docs/design/009-volumes.md says so: `O_TMPFILE`.
const KNOWN: [&str; 1] = ["nameless: "];

#[test]
fn a_program_sees_the_same_as_with_runc() -> Result<()> {
    with_node(|node| {
        let mut all = Vec::new();
        for runtime in BOTH {
            let folder = node.dir().join(runtime.tag());
            fs::create_dir(&folder)?;
            fs::write(folder.join("program"), compile(node.dir(), "semantics", PROGRAM)?)?;
            let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.display());
            let script = "cp /data/program /bin/program && chmod 755 /bin/program && mkdir /data/work /work && \
                          /bin/program /data/work && /bin/program /work";
            let id = format!("semantics-{}", runtime.tag());
            let out = node.run(runtime, &id, &["--mount", &mount], &["sh", "-c", script]).output()?.ok()?;
            all.push(out.text());
        }
        let differences: Vec<_> = all[0]
            .lines()
            .zip(all[1].lines())
            .filter(|(runc, kata)| runc != kata && !KNOWN.iter().any(|known| runc.starts_with(known)))
            .collect();
        ensure!(
            all[0].lines().count() == all[1].lines().count() && differences.is_empty(),
            "{differences:#?}\n{}",
            all[1]
        );
        Ok(())
    })
}

#[test]
fn access_lists_of_the_host_and_of_the_guest_are_the_same() -> Result<()> {
    with_node(|node| {
        let mut all = Vec::new();
        for runtime in BOTH {
            let folder = node.dir().join(runtime.tag());
            fs::create_dir(&folder)?;
            let program = folder.join("program");
            fs::write(&program, compile(node.dir(), "semantics", PROGRAM)?)?;
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
            let on_host = |what: &str, name: &str| {
                let words = [what.to_owned(), folder.join(name).display().to_string()];
                Invocation::new(&program.display().to_string(), words).output()?.ok()
            };
            fs::write(folder.join("host"), "host's")?;
            on_host("give", "host")?;
            let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.display());
            let script = "cd /data && chmod 755 . && ./program show host && echo > guest && ./program give guest";
            let id = format!("lists-{}", runtime.tag());
            let out = node.run(runtime, &id, &["--mount", &mount], &["sh", "-c", script]).output()?.ok()?;
            // by its path on the host, which is another
            let host = on_host("show", "guest")?.text().replace(&folder.display().to_string(), "");
            all.push(out.text() + &host);
        }
        ensure!(all[0] == all[1], "runc:\n{}\nkata:\n{}", all[0], all[1]);
        ensure!(all[1].contains("2:1234:4") && all[1].contains("may 99:2345: 6"), "{}", all[1]);
        Ok(())
    })
}

#[test]
fn locks_and_maps_are_shared_by_a_pods_containers() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let mut all = Vec::new();
        for runtime in BOTH {
            let folder = cri.node.dir().join(runtime.tag());
            fs::create_dir(&folder)?;
            fs::write(folder.join("program"), compile(cri.node.dir(), "semantics", PROGRAM)?)?;
            let pod = cri.run_pod(runtime, &format!("locks-{}", runtime.tag()), &json!({}))?;
            let mounts = json!({"mounts": [{"container_path": "/data", "host_path": folder}]});
            let forever = ["sleep", "100000"];
            let one = cri.run(&pod, "one", &forever, &mounts)?;
            let two = cri.run(&pod, "two", &forever, &mounts)?;
            for container in [&one, &two] {
                cri.sh(container, "cp /data/program /bin/program; chmod 755 /bin/program")?;
            }
            let mut seen = Vec::new();
            for kind in ["flock", "fcntl", "ofd", "map"] {
                cri.sh(
                    &one,
                    &format!(
                        "(program hold {kind} /data/{kind} > /tmp/{kind} 2>&1 &) > /dev/null 2>&1 < /dev/null; \
                                       until grep -q held /tmp/{kind}; do sleep 0.1; done"
                    ),
                )?;
                seen.push(cri.sh(&two, &format!("program try {kind} /data/{kind}"))?);
                // let go of, also by whoever waits
                cri.sh(&one, "killall program; true")?;
                seen.push(cri.sh(&two, &format!("program wait {kind} /data/{kind}"))?);
            }
            all.push(seen);
            cri.remove(&pod)?;
        }
        ensure!(all[0] == all[1], "runc {:#?} kata {:#?}", all[0], all[1]);
        ensure!(all[0].iter().any(|seen| seen.contains("busy")), "{:#?}", all[0]);
        Ok(())
    })
}
