//! The ways by which the host's files reach the guest: 9p, virtio-fs with its keys, and none.

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Node, NodeSetup, Runtime,
    compile::compile,
    cri::{Network, with_cri},
    ctr::Invocation,
    install::Install,
    processes, with_node_setup,
};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

fn with(changes: &[(&str, toml::Value)], test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let config = Some(Install::locate()?.config_with(changes)?);
    with_node_setup(NodeSetup { config, ..NodeSetup::default() }, test)
}

fn with_9p(test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    with(&[("shared_fs", "virtio-9p".into())], test)
}

/// A volume of a container's: its folder on the host and the option that mounts it.
fn volume(node: &Node, name: &str, how: &str) -> Result<(PathBuf, String)> {
    let folder = node.dir().join(name);
    fs::create_dir(&folder)?;
    let option = format!("type=bind,src={},dst=/data,options=rbind:{how}", folder.display());
    Ok((folder, option))
}

/// Writes 1 MiB through a shared memory map that another process of the container reads in its own map, and checks locks.
const MAPS: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
enum { SIZE = 1 << 20 };
int main(int argc, char **argv) {
    int file = open(argv[1], O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, SIZE)) return 1;
    char *map = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return 2;
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(file, F_SETLK, &lock)) return 3;
    pid_t child = fork();
    if (!child) {
        int other = open(argv[1], O_RDWR);
        struct flock mine = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        if (!fcntl(other, F_SETLK, &mine)) _exit(4);
        memset(map, 'k', SIZE);
        _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    char bytes[4];
    if (pread(file, bytes, 4, SIZE - 4) != 4) return 5;
    printf("map %d %.4s\n", WEXITSTATUS(status), bytes);
    return 0;
}
"#;

/// What a shell sees of a file system. The same lines are wanted of runc. Pipes, sockets and devices are not among them:
/// QEMU's 9p server makes none since it refuses to open them (docs/filesystem.md).
const SEEN: &str = r"
    cd /data
    cat from-host; cat link 2> /dev/null || echo no link
    echo one > plain && echo two >> plain && cat plain
    mkdir -p a/b && mv plain a/b/moved && cat a/b/moved
    ln a/b/moved hard && stat -c '%h %s' hard && ln -s a/b/moved soft && readlink soft && cat soft
    chmod 4750 hard && chown 12:34 hard && stat -c '%a %u %g' a/b/moved
    touch -d '2001-02-03 04:05:06' hard && stat -c %Y hard
    echo new > over && echo newer > more && mv more over && cat over
    exec 3> gone && rm gone && echo still >&3 && echo written && exec 3>&-
    dd if=/dev/zero of=sparse bs=1 count=1 seek=5368709120 2> /dev/null && stat -c %s sparse
    n=$(printf '%0255d' 7) && echo long > $n && cat $n && rm $n
    printf 'x' > $(printf 'na\377me') && ls na* | od -c | head -1
    for i in $(seq 200); do : > f$i; done; ls f* | wc -l; rm f*; ls
    rmdir a 2> /dev/null || echo not empty
    cp maps /tmp/m && /tmp/m mapped
    echo 'nobody:x:65534:65534::/:/bin/sh' >> /etc/passwd
    su -s /bin/sh nobody -c 'echo no > mine' 2> /dev/null || echo refused
    chmod 777 . && su -s /bin/sh nobody -c 'echo yes > mine && stat -c %U mine'
";

#[test]
fn a_volume_by_9p_is_as_with_runc() -> Result<()> {
    with_9p(|node| {
        let maps = compile(node.dir(), "maps", MAPS)?;
        let mut seen = Vec::new();
        for runtime in BOTH {
            let (folder, option) = volume(node, runtime.tag(), "rw")?;
            fs::write(folder.join("from-host"), "hello\n")?;
            fs::write(folder.join("maps"), &maps)?;
            fs::set_permissions(folder.join("maps"), fs::metadata(node.install().shim())?.permissions())?;
            // of the host, which the container must not follow to the host's file
            fs::write(node.dir().join("secret"), "secret\n")?;
            symlink(node.dir().join("secret"), folder.join("link"))?;
            let done = node.run(runtime, runtime.tag(), &["--mount", &option], &["sh", "-c", SEEN]).output()?.ok()?;
            // what was written is on the host when the container's end is known
            let mapped = fs::read(folder.join("mapped"))?;
            let whole = mapped.len() == 1 << 20 && mapped.iter().all(|byte| *byte == b'k');
            let (meta, moved) = (fs::metadata(folder.join("hard"))?, fs::read_to_string(folder.join("a/b/moved"))?);
            let owner = fs::metadata(folder.join("mine"))?.uid();
            seen.push(format!("{}\n{whole} {:o} {} {moved} {owner}", done.text(), meta.mode(), meta.uid()));
        }
        ensure!(seen[0] == seen[1], "runc:\n{}\nkata:\n{}", seen[0], seen[1]);
        ensure!(seen[1].contains("map 0 kkkk") && seen[1].contains("no link"), "{}", seen[1]);
        Ok(())
    })
}

#[test]
fn a_9p_container_lives_and_both_sides_see_what_the_other_writes() -> Result<()> {
    with_9p(|node| {
        let (folder, option) = volume(node, "rw", "rw")?;
        node.detached(Runtime::Kata, "c1", &["--mount", &option], &["sh", "-c", "echo up > /data/up; sleep 1000"])?;
        let all = processes::of_node(node.tag());
        ensure!(!all.iter().any(|process| process.name.starts_with("virtiofsd")), "{all:?}");
        let exec = |name: &str, script: &str| -> Result<String> {
            Ok(node.exec("c1", name, &[], &["sh", "-c", script]).output()?.ok()?.text())
        };
        let mounts = exec("x0", "cat /proc/mounts")?;
        ensure!(mounts.lines().any(|line| line.contains(" / 9p ") && line.contains("msize=131072")), "{mounts}");
        for round in 0..3 {
            fs::write(folder.join("word"), format!("host {round}"))?;
            // the file stays open in between, and is not the longer for it
            let said = exec(&format!("x1{round}"), &format!("cat /data/word; echo guest {round} > /data/answer"))?;
            ensure!(said == format!("host {round}"), "round {round}: {said:?}");
            let answer = fs::read_to_string(folder.join("answer"))?;
            ensure!(answer == format!("guest {round}\n"), "round {round}: {answer:?}");
        }
        // what is written is on the host although the file was not closed
        exec("x2", "(echo not closed; sleep 1000) > /data/open &")?;
        let end = std::time::Instant::now() + Duration::from_secs(3);
        while fs::read_to_string(folder.join("open")).unwrap_or_default() != "not closed\n" {
            ensure!(std::time::Instant::now() < end, "what was written is not on the host");
            std::thread::sleep(Duration::from_millis(20));
        }
        // the root file system can be written, and that is nobody else's
        ensure!(exec("x3", "echo root > /root-file && cat /root-file")? == "root", "the root file system");
        node.remove("c1")
    })
}

#[test]
fn a_read_only_volume_by_9p_is_not_written() -> Result<()> {
    with_9p(|node| {
        let (folder, option) = volume(node, "ro", "ro")?;
        fs::write(folder.join("word"), "host")?;
        // also not by a container that may mount what it likes
        let script =
            "cat /data/word; echo x > /data/word; touch /data/new; mount -o remount,rw /data; echo y > /data/word";
        let done = node.run(Runtime::Kata, "ro", &["--privileged", "--mount", &option], &["sh", "-c", script]);
        let done = done.output()?;
        ensure!(done.text() == "host", "{done:?}");
        ensure!(fs::read_to_string(folder.join("word"))? == "host" && !folder.join("new").exists(), "{done:?}");
        Ok(())
    })
}

#[test]
fn a_pods_containers_share_a_volume_by_9p() -> Result<()> {
    let config = Some(Install::locate()?.config_with(&[("shared_fs", "virtio-9p".into())])?);
    with_cri(NodeSetup { config, ..NodeSetup::default() }, Network::default(), |cri| {
        let pod = cri.run_pod(Runtime::Kata, "shared", &json!({}))?;
        let folder = tempfile::tempdir_in("/var/tmp")?;
        let mounts = json!({"mounts": [{"container_path": "/data", "host_path": folder.path()}]});
        let one = cri.run(&pod, "one", &["sleep", "1000"], &mounts)?;
        let two = cri.run(&pod, "two", &["sleep", "1000"], &mounts)?;
        cri.sh(&one, "echo from one > /data/word")?;
        ensure!(cri.sh(&two, "cat /data/word; cat /etc/hostname")?.starts_with("from one"), "the other container");
        cri.remove(&pod)
    })
}

#[test]
fn without_a_shared_file_system_what_needs_one_is_refused() -> Result<()> {
    with(&[("shared_fs", "none".into())], |node| {
        let done = node.run(Runtime::Kata, "none", &[], &["true"]).output()?;
        for words in ["shared_fs = \"none\" is set", "the container's root file system", "block device"] {
            ensure!(done.code != 0 && done.stderr.contains(words), "{words:?} is missing in {}", done.stderr);
        }
        Ok(())
    })
}

/// The command line of a process of the node's.
fn command(node: &Node, name: &str) -> Result<String> {
    Ok(processes::wait_for(node.tag(), name, Duration::from_secs(5))?.command)
}

#[test]
fn virtio_fs_has_what_its_keys_say_by_whatever_path() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("virtiofsd");
    fs::copy("/usr/lib/qemu/virtiofsd", &copy)?;
    let keys = [
        ("virtio_fs_daemon", copy.display().to_string().into()),
        ("shared_fs", "virtio-fs".into()),
        ("virtio_fs_cache", "never".into()),
        ("virtio_fs_queue_size", 128.into()),
        ("virtio_fs_extra_args", toml::Value::Array(vec!["-o".into(), "log_level=err".into()])),
    ];
    with(&keys, |node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let daemon = command(node, "virtiofsd")?;
        ensure!(daemon.contains(",cache=none,") && daemon.ends_with("-o log_level=err"), "{daemon}");
        let qemu = command(node, "qemu-system")?;
        ensure!(qemu.contains("queue-size=128"), "{qemu}");
        node.remove("c1")
    })
}

#[test]
fn what_virtiofsd_does_not_take_is_told() -> Result<()> {
    let strange = toml::Value::Array(vec!["--no-such-option".into()]);
    for (name, key, value, words) in [
        (
            "metadata",
            "virtio_fs_cache",
            "metadata".into(),
            ["is the C virtiofsd", "set `virtio_fs_daemon` to the Rust"],
        ),
        ("argument", "virtio_fs_extra_args", strange, ["virtiofsd ended", "no-such-option"]),
        ("program", "virtio_fs_daemon", "/bin/true".into(), ["/bin/true", "not a virtiofsd"]),
    ] {
        with(&[(key, value)], |node| {
            let done = node.run(Runtime::Kata, name, &[], &["true"]).output()?;
            let told = words.iter().all(|words| done.stderr.contains(words));
            ensure!(done.code != 0 && told, "{name}: {}", done.stderr);
            Ok(())
        })?;
    }
    Ok(())
}

/// Says that it runs, and does until it is ended.
const READY: &str = r#"
#include <stdio.h>
#include <unistd.h>
int main(void) {
    puts("ready");
    fflush(stdout);
    pause();
}
"#;

/// Copies a program and starts it four times, many times, with others between: pages of programs become other programs'.
const MANY: &str = r"
i=0
while [ $i -lt 100 ]; do
    i=$((i + 1)); cp /data/ready /bin/r$i
    for v in a b c d; do { /bin/r$i > /tmp/$v$i; code=$?; [ $code = 143 ] || echo $i: $code; } & done
    for v in a b c d; do
        tries=0
        until grep -q ready /tmp/$v$i; do tries=$((tries + 1)); [ $tries -lt 300 ] || break; done
    done
    killall r$i; wait; rm /bin/r$i /tmp/?$i
done 2>/dev/null
echo done
";

/// What virtiofsd writes into memory the translator does not see: it ran what had been there before.
#[test]
fn programs_are_what_was_read() -> Result<()> {
    with(&[("shared_fs", "virtio-fs".into())], |node| {
        let (folder, option) = volume(node, "programs", "ro")?;
        fs::write(folder.join("ready"), compile(node.dir(), "ready", READY)?)?;
        Invocation::new("chmod", [Path::new("755"), &folder.join("ready")]).output()?.ok()?;
        let said = node.run(Runtime::Kata, "programs", &["--mount", &option], &["sh", "-c", MANY]).output()?.ok()?;
        ensure!(said.text() == "done", "{}", said.text());
        Ok(())
    })
}

/// Debian 12 has no Rust virtiofsd; `cargo install virtiofsd` makes one.
#[test]
#[ignore = "needs the Rust virtiofsd: RUST_VIRTIOFSD is its path"]
fn the_rust_virtiofsd_serves_files() -> Result<()> {
    let program = std::env::var("RUST_VIRTIOFSD").context("RUST_VIRTIOFSD is not set")?;
    ensure!(Path::new(&program).is_file(), "{program}: no such file");
    for cache in ["auto", "never", "metadata", "always"] {
        with(&[("virtio_fs_daemon", program.clone().into()), ("virtio_fs_cache", cache.into())], |node| {
            let (folder, option) = volume(node, "rw", "rw")?;
            fs::write(folder.join("word"), "host")?;
            let script = "cat /data/word; echo guest > /data/answer";
            let said = node.run(Runtime::Kata, "rust", &["--mount", &option], &["sh", "-c", script]).output()?.ok()?;
            ensure!(said.text() == "host", "{cache}: {said:?}");
            ensure!(fs::read_to_string(folder.join("answer"))? == "guest\n", "{cache}: {said:?}");
            Ok(())
        })?;
    }
    Ok(())
}
