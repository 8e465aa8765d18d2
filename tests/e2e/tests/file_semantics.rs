//! What programs may expect of a file system, in a volume and in the root file system, beside runc: a program that tries
//! it all prints what it saw.

use anyhow::{Result, ensure};
use e2e::{
    BOTH, Node, NodeSetup, Runtime,
    compile::compile,
    cri::{Network, with_cri},
    ctr::Invocation,
    install::Install,
    with_node, with_node_setup,
};
use serde_json::json;
use std::{fs, io::Write as _, os::unix::fs::PermissionsExt as _};

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

/// A container with two logs that stay open, and what it said of the maps of files that append.
const APPENDS: &str = "
    cp /data/program /bin/program && chmod 755 /bin/program && mkdir /work && cd /work || exit 1
    (program append root; cd /data && program append volume) > /data/said 2>&1
    cd /dev/shm && mkfifo shell words done && exec 7<>shell 8<>words 9<>done 3>>/data/shell.log
    program words /data/words.log <&8 >&9 & touch /data/ready
    while read word <&7; do echo $word >&3; echo written >&9; done";

/// Returns what was said.
fn append(node: &Node, runtime: Runtime) -> Result<String> {
    let folder = node.dir().join(runtime.tag());
    fs::create_dir(&folder)?;
    fs::write(folder.join("program"), compile(node.dir(), "semantics", PROGRAM)?)?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.display());
    node.detached(runtime, runtime.tag(), &["--mount", &mount], &["sh", "-c", APPENDS])?;
    let logs = ["shell.log", "words.log"].map(|name| folder.join(name));
    let write = |word: &str, wanted: &str| {
        let script = format!(
            "until [ -e /data/ready ]; do sleep 0.1; done; exec 6</dev/shm/done; \
             for to in shell words; do echo {word} > /dev/shm/$to; read said <&6; echo $said; done"
        );
        let said = node.exec(runtime.tag(), word, &[], &["sh", "-c", &script]).output()?.ok()?.text();
        let found = [fs::read_to_string(&logs[0])?, fs::read_to_string(&logs[1])?];
        ensure!(said == "written\nwritten" && found == [wanted, wanted], "{runtime:?} {word}: {said:?} {found:?}");
        Ok(())
    };
    write("one", "one\n")?;
    for log in &logs {
        fs::File::options().write(true).open(log)?.set_len(0)?;
    }
    write("two", "two\n")?;
    for log in &logs {
        fs::File::options().append(true).open(log)?.write_all(b"host\n")?;
    }
    write("three", "two\nhost\nthree\n")?;
    node.remove(runtime.tag())?;
    // what is mapped is on the host, too
    let mapped = fs::read(folder.join("volume"))?;
    Ok(format!("{}host: {} {:?}", fs::read_to_string(folder.join("said"))?, mapped.len(), mapped.get(4096..4102)))
}

#[test]
fn what_is_appended_or_mapped_of_an_appending_file_goes_where_it_belongs() -> Result<()> {
    let mut runc = String::new();
    for kind in ["virtio-9p", "virtio-fs"] {
        let config = Some(Install::locate()?.config_with(&[("shared_fs", kind.into())])?);
        with_node_setup(NodeSetup { config, ..NodeSetup::default() }, |node| {
            if runc.is_empty() {
                runc = append(node, Runtime::Runc)?;
            }
            let kata = append(node, Runtime::Kata)?;
            // docs/filesystem.md: by 9p a file without a name cannot be opened again
            let differs =
                |said: &&str| kind == "virtio-9p" && ["map without", "after it"].iter().any(|a| said.starts_with(a));
            let of = |said: &str| said.lines().filter(|line| !differs(line)).map(str::to_owned).collect::<Vec<_>>();
            ensure!(of(&runc) == of(&kata), "runc:\n{runc}\n{kind}:\n{kata}");
            Ok(())
        })?;
    }
    ensure!(runc.contains("size 8196: a child end+"), "{runc}");
    Ok(())
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
