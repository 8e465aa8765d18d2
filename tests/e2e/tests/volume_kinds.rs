//! Every kind of volume that a pod mounts, beside runc: what its containers see and do, and what the host sees of it.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{
    BOTH, NodeSetup, Runtime,
    compile::compile,
    cri::{Cri, Network, Pod, with_cri},
    mounts, with_node,
};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const FOREVER: [&str; 2] = ["sleep", "100000"];

/// A folder as kubelet lays a pod's volumes out in it.
struct Kubelet(PathBuf);

impl Kubelet {
    fn new(cri: &Cri<'_>, name: &str) -> Result<Self> {
        let path = cri.node.dir().join(format!("kubelet-{name}"));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// A volume's own folder, with the mode that kubelet gives it.
    fn volume(&self, plugin: &str, name: &str) -> Result<PathBuf> {
        let path = self.0.join(format!("volumes/kubernetes.io~{plugin}/{name}"));
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
        Ok(path)
    }

    /// An emptyDir of medium Memory.
    fn memory(&self, name: &str, options: &str) -> Result<PathBuf> {
        let path = self.volume("empty-dir", name)?;
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
        Ok(path)
    }

    /// A part of a volume, bound elsewhere as kubelet does it.
    fn part(&self, volume: &Path, part: &str, number: usize) -> Result<PathBuf> {
        let name = volume.file_name().context("a name")?;
        let at = self.0.join("volume-subpaths").join(name).join("one").join(number.to_string());
        let from = volume.join(part);
        if from.is_file() {
            fs::create_dir_all(at.parent().context("a folder")?)?;
            fs::write(&at, "")?;
        } else {
            // what is there is as it is: it may be a link to a folder of this machine's
            if !from.exists() {
                fs::create_dir_all(&from)?;
                fs::set_permissions(&from, fs::Permissions::from_mode(0o750))?;
            }
            fs::create_dir_all(&at)?;
        }
        mount(Some(&from), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(at)
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        mounts::unmount_below(std::slice::from_ref(&self.0));
    }
}

/// Writes a volume's files and swaps them in, as kubelet does with configMaps and their like.
fn swap(volume: &Path, time: &str, files: &[(String, String)]) -> Result<()> {
    let data = volume.join("..data");
    let old = fs::read_link(&data).ok();
    for (name, content) in files {
        let path = volume.join(time).join(name);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
        chown(&path, Some(0), Some(2000))?;
    }
    symlink(time, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), &data)?;
    for (name, _) in files {
        let first = name.split('/').next().unwrap_or_default();
        if volume.join(first).symlink_metadata().is_err() {
            symlink(Path::new("..data").join(first), volume.join(first))?;
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old))?;
    }
    Ok(())
}

fn files(count: usize, content: &str) -> Vec<(String, String)> {
    (0..count).map(|number| (format!("key{number}"), format!("{content}{number}"))).collect()
}

fn at(container: &str, host: &Path) -> Value {
    json!({"container_path": container, "host_path": host})
}

fn read_only(container: &str, host: &Path) -> Value {
    json!({"container_path": container, "host_path": host, "readonly": true})
}

/// The script's output once it is `wanted`; a guest asks again for what it knows after a second.
fn until(cri: &Cri<'_>, container: &str, script: &str, wanted: &str) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let seen = cri.sh(container, script)?;
        if seen == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{script}: not {wanted:?} within 10 s but {seen:?}");
    }
}

/// What is seen in each runtime, by what it was seen of.
type Seen = Vec<(String, String)>;

/// Does the same with both and compares all that was seen.
fn in_both(setup: NodeSetup, test: impl Fn(&Cri<'_>, &Kubelet, Runtime, &mut Seen) -> Result<()>) -> Result<()> {
    with_cri(setup, Network::default(), |cri| {
        let mut all = Vec::new();
        for runtime in BOTH {
            let kubelet = Kubelet::new(cri, runtime.tag())?;
            let mut seen = Seen::new();
            test(cri, &kubelet, runtime, &mut seen).with_context(|| format!("with {}", runtime.tag()))?;
            all.push(seen);
        }
        let (runc, kata) = (&all[0], &all[1]);
        let differences: Vec<_> = runc.iter().zip(kata).filter(|(one, other)| one != other).collect();
        ensure!(runc.len() == kata.len() && differences.is_empty(), "runc and kata differ: {differences:#?}");
        Ok(())
    })
}

fn pod(cri: &Cri<'_>, runtime: Runtime, name: &str) -> Result<Pod> {
    cri.run_pod(runtime, &format!("{name}-{}", runtime.tag()), &json!({}))
}

/// Shows a tree with owners, modes, times and contents.
const TREE: &str = "find . | sort | while read f; do echo $(stat -c '%A %u %g %n' $f) $(test -L $f && readlink $f) \
                    $(test -f $f && stat -c %Y $f && cat $f); done";

#[test]
fn folders_files_and_devices() -> Result<()> {
    in_both(NodeSetup::default(), |cri, kubelet, runtime, seen| {
        let folder = kubelet.volume("host-path", "folder")?;
        let (file, fixed, fifo) = (kubelet.0.join("file"), kubelet.0.join("fixed"), kubelet.0.join("fifo"));
        fs::write(&file, "one\n")?;
        fs::write(&fixed, "fixed\n")?;
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o622))?;
        let link = kubelet.0.join("link");
        symlink(&folder, &link)?;
        let volumes = [
            at("/folder", &folder),
            at("/link", &link),
            at("/file", &file),
            read_only("/fixed", &fixed),
            at("/fifo", &fifo),
            at("/null", Path::new("/dev/null")),
        ];
        let pod = pod(cri, runtime, "plain")?;
        let one = cri.run(&pod, "one", &FOREVER, &json!({"mounts": volumes}))?;
        for (name, script) in [
            ("a folder", "cd /folder && mkdir sub && echo x > sub/y && cd /link && find . | sort"),
            ("a file", "cat /file; echo two >> /file; cat /file; mv /file /other; rm /file 2> /dev/null; echo $?"),
            ("a read-only file", "cat /fixed; (echo no > /fixed) 2> /dev/null; echo $?; ls -l /fixed | cut -c 1-10"),
            ("a fifo", "ls -l /fifo | cut -c 1-10; (echo through > /fifo &); cat /fifo"),
            ("a device", "stat -c '%F %t %T' /null; echo x > /null; wc -c < /null"),
        ] {
            seen.push((name.into(), cri.sh(&one, &format!("({script}) 2>&1"))?));
        }
        seen.push(("the host's file".into(), fs::read_to_string(&file)?));
        seen.push(("the host's folder".into(), fs::read_to_string(folder.join("sub/y"))?));
        cri.remove(&pod)
    })
}

#[test]
fn a_hosts_socket_is_refused() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let path = cri.node.dir().join("server.sock");
        let _server = std::os::unix::net::UnixListener::bind(&path)?;
        let pod = pod(cri, Runtime::Kata, "socket")?;
        let socket = json!({"mounts": [at("/server.sock", &path)]});
        let refused = cri.try_create(&pod, "one", &FOREVER, &socket)?;
        let id =
            if refused.code == 0 { cri.crictl(["start", &refused.text()]).output()?.stderr } else { refused.stderr };
        ensure!(id.contains("unix socket of the host") && id.contains("/server.sock"), "{id}");
        // in a folder it is a file to which nobody listens, and the container's own sockets work there
        let folder = cri.node.dir().join("folder");
        fs::create_dir(&folder)?;
        let _server = std::os::unix::net::UnixListener::bind(folder.join("host.sock"))?;
        let two = cri.run(&pod, "two", &FOREVER, &json!({"mounts": [at("/sockets", &folder)]}))?;
        let refused = cri.sh(&two, "nc local:/sockets/host.sock < /dev/null 2>&1; echo $?")?;
        ensure!(refused.contains("refused") || refused.ends_with('1'), "{refused}");
        cri.remove(&pod)
    })
}

/// Tells of what inotify(7) says of a folder.
const LISTENER: &str = r#"
#include <limits.h>
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>
int main(int argc, char **argv) {
    int fd = inotify_init();
    if (inotify_add_watch(fd, argv[1], IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO) < 0) return 1;
    setlinebuf(stdout);
    puts("ready");
    char buffer[8192] __attribute__((aligned(8)));
    for (long length; (length = read(fd, buffer, sizeof buffer)) > 0;)
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (void *)at;
            printf("%s%s%s%s%s %s\n", event->mask & IN_ISDIR ? "folder " : "", event->mask & IN_CREATE ? "made" : "",
                   event->mask & IN_DELETE ? "gone" : "", event->mask & IN_MOVED_FROM ? "moved from" : "",
                   event->mask & IN_MOVED_TO ? "moved to" : "", event->name);
            at += sizeof *event + event->len;
        }
}
"#;

#[test]
fn what_kubelet_swaps_is_seen_and_heard() -> Result<()> {
    in_both(NodeSetup::default(), |cri, kubelet, runtime, seen| {
        let plugins = ["configmap", "secret", "projected", "downward-api"];
        let mut volumes = Vec::new();
        for plugin in plugins {
            let volume = kubelet.volume(plugin, plugin)?;
            let mut content = files(3, "old");
            content.push(("deep/er/key".into(), "old".into()));
            swap(&volume, "..2026_01_01", &content)?;
            volumes.push(read_only(&format!("/{plugin}"), &volume));
        }
        let large = kubelet.volume("configmap", "large")?;
        swap(&large, "..2026_01_01", &files(40, "old"))?;
        volumes.push(read_only("/large", &large));
        let part = kubelet.part(&kubelet.volume("secret", "secret")?, "..data/key0", 0)?;
        volumes.push(read_only("/part", &part));
        let tools = kubelet.volume("host-path", "tools")?;
        fs::write(tools.join("listen"), compile(cri.node.dir(), "listen", LISTENER)?)?;
        volumes.push(at("/tools", &tools));
        let pod = pod(cri, runtime, "swapped")?;
        let mounts = json!({"mounts": volumes});
        let one = cri.run(&pod, "one", &FOREVER, &mounts)?;
        let two = cri.run(&pod, "two", &FOREVER, &mounts)?;
        for plugin in plugins {
            let times = if plugin == "projected" { TREE } else { "find . | sort; cat key0 deep/er/key" };
            let masked = times.replace("stat -c %Y $f && ", "");
            seen.push((plugin.into(), cri.sh(&one, &format!("cd /{plugin}; {masked}"))?));
            seen.push((format!("writing to {plugin}"), cri.sh(&one, &format!("touch /{plugin}/x 2>&1; echo $?"))?));
        }
        let listen = "cp /tools/listen /bin/listen; chmod 755 /bin/listen; \
                      for v in configmap secret projected downward-api; do listen /$v > /tmp/$v 2>&1 & done; \
                      for v in configmap secret projected downward-api; do until grep -q ready /tmp/$v; do :; done; done";
        for container in [&one, &two] {
            cri.sh(container, &format!("({listen}) 2>&1 < /dev/null"))?;
        }
        let began = Instant::now();
        for plugin in plugins {
            let mut content = files(4, "new");
            content.remove(1);
            swap(&kubelet.volume(plugin, plugin)?, "..2026_02_02", &content)?;
        }
        swap(&large, "..2026_02_02", &files(40, "new"))?;
        for (container, plugin) in [&one, &two].into_iter().flat_map(|one| plugins.map(|plugin| (one, plugin))) {
            until(
                cri,
                container,
                &format!("cat /{plugin}/key0 /{plugin}/key3; grep -c gone /tmp/{plugin}"),
                "new0new31",
            )?;
            // in which order a folder's old and new are seen is the kernel's and ours; what is heard is the same
            let heard = cri.sh(container, &format!("sort /tmp/{plugin}"))?;
            seen.push((format!("what is heard of {plugin}"), heard));
            seen.push((format!("{plugin} after it"), cri.sh(container, &format!("find /{plugin} | sort"))?));
        }
        println!("{}: all seen after {:?}", runtime.tag(), began.elapsed());
        until(cri, &one, "cat /large/key0 /large/key39", "new0new39")?;
        seen.push(("a part stays as it was".into(), cri.sh(&one, "cat /part")?));
        cri.remove(&pod)
    })
}

#[test]
fn empty_dirs_and_their_parts() -> Result<()> {
    in_both(NodeSetup::default(), |cri, kubelet, runtime, seen| {
        let disk = kubelet.volume("empty-dir", "disk")?;
        let memory = kubelet.memory("memory", "size=4m")?;
        let group = kubelet.memory("group", "size=1m")?;
        chown(&group, None, Some(2000))?;
        fs::set_permissions(&group, fs::Permissions::from_mode(0o2775))?;
        let volumes = json!([
            at("/disk", &disk),
            at("/memory", &memory),
            at("/group", &group),
            at("/disk-part", &kubelet.part(&disk, "a/part", 0)?),
            at("/memory-part", &kubelet.part(&memory, "a/part", 0)?),
        ]);
        let pod = pod(cri, runtime, "empty")?;
        let one = cri.run(&pod, "one", &FOREVER, &json!({"mounts": volumes}))?;
        let two = cri.run(&pod, "two", &FOREVER, &json!({"mounts": volumes}))?;
        cri.sh(&one, "for v in disk memory group; do echo $v > /$v/word; done; echo m > /memory-part/word")?;
        cri.sh(&one, "echo d > /disk-part/word")?;
        for (name, script) in [
            ("the other's words", "cat /disk/word /memory/word /group/word"),
            ("parts in their volumes", "cat /disk/a/part/word /memory/a/part/word; stat -c %a /disk-part /memory-part"),
            ("sizes", "df -k /memory /group | awk '{print $2}'; stat -f -c %T /memory /memory-part"),
            ("owners", "stat -c '%a %u %g' /disk /memory /group /group/word"),
            ("full", "dd if=/dev/zero of=/memory/big bs=1M count=8 2>&1 | grep -o 'No space.*'; rm /memory/big"),
        ] {
            seen.push((name.into(), cri.sh(&two, script)?));
        }
        // they live as long as the pod
        for id in [&one, &two] {
            cri.say(["stop", "--timeout", "0", id])?;
            cri.say(["rm", id])?;
        }
        let three = cri.run(&pod, "three", &FOREVER, &json!({"mounts": volumes}))?;
        seen.push(("after all containers".into(), cri.sh(&three, "cat /disk/word /memory/word /memory-part/word")?));
        // what is in memory is the virtual machine's
        let is_on_host = memory.join("word").exists();
        ensure!(is_on_host == (runtime == Runtime::Runc), "{} on the host", memory.display());
        ensure!(disk.join("word").exists(), "{} on the host", disk.display());
        // a container's links lead nowhere when a part is made
        cri.sh(&three, "mkdir -p /memory/b && ln -s /../../../../../../../etc /memory/b/part")?;
        let part = at("/escape", &kubelet.part(&memory, "b/part", 7)?);
        if runtime == Runtime::Kata {
            let four = cri.run(&pod, "four", &FOREVER, &json!({"mounts": [part]}));
            if let Ok(four) = four {
                ensure!(!cri.sh(&four, "ls /escape")?.contains("resolv.conf"), "the guest's own /etc");
            }
        }
        cri.remove(&pod)
    })
}

#[test]
fn empty_dirs_may_be_the_machines_own() -> Result<()> {
    let config = fs::read_to_string(e2e::install::Install::locate()?.config())?;
    let config = config.replace("#disable_guest_empty_dir = true", "disable_guest_empty_dir = false");
    ensure!(config.contains("\ndisable_guest_empty_dir = false"), "no such key in the configuration");
    let setup = NodeSetup { config: Some(config), ..NodeSetup::default() };
    in_both(setup, |cri, kubelet, runtime, seen| {
        let disk = kubelet.volume("empty-dir", "disk")?;
        chown(&disk, None, Some(2000))?;
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o2777))?;
        let volumes = json!([at("/disk", &disk), at("/part", &kubelet.part(&disk, "deep/part", 0)?)]);
        let pod = pod(cri, runtime, "own")?;
        let one = cri.run(&pod, "one", &FOREVER, &json!({"mounts": volumes}))?;
        cri.sh(&one, "echo word > /disk/word; echo part > /part/word")?;
        cri.say(["stop", "--timeout", "0", &one])?;
        cri.say(["rm", &one])?;
        let two = cri.run(&pod, "two", &FOREVER, &json!({"mounts": volumes}))?;
        seen.push((
            "words".into(),
            cri.sh(&two, "cat /disk/word /disk/deep/part/word; stat -c '%a %u %g' /disk /part")?,
        ));
        ensure!(disk.join("word").exists() == (runtime == Runtime::Runc), "on the host with {}", runtime.tag());
        cri.remove(&pod)
    })
}

#[test]
fn mounts_of_ctr() -> Result<()> {
    with_node(|node| {
        let data = node.dir().join("data");
        fs::create_dir_all(data.join("sub"))?;
        mount(Some(&data), &data, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        let _mounted = Kubelet(data.clone());
        mount(Some("tmpfs"), &data.join("sub"), Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        let bind = |dst: &str, options: &str| format!("type=bind,src={},dst={dst},options={options}", data.display());
        let shown = "stat -f -c %T /t; stat -c %a /t; df -k /t | awk 'NR==2 {print $2}'; \
                     grep ' /t ' /proc/mounts | grep -o 'nosuid\\|noexec\\|nr_inodes=[0-9]*'";
        let tried = "for f in /d/file /d/sub/file; do touch $f 2> /dev/null; echo $?; done";
        for (name, mount, script) in [
            ("tmpfs", "type=tmpfs,src=tmpfs,dst=/t,options=size=1m:mode=1770:nr_inodes=99:nosuid:noexec".into(), shown),
            ("a recursive one", bind("/d", "rbind:rw"), tried),
            ("one that is not", bind("/d", "bind:rw"), "ls -A /d/sub; touch /d/sub/file; ls /d/sub; rm /d/sub/file"),
            ("a read-only one", bind("/d", "rbind:ro"), tried),
            ("a recursive read-only one", bind("/d", "rbind:rro"), tried),
            ("noexec", bind("/d", "rbind:noexec"), "cp /bin/busybox /d/b; /d/b true 2> /dev/null; echo $?; rm /d/b"),
        ] {
            let _ = (fs::remove_file(data.join("file")), fs::remove_file(data.join("sub/file")));
            let mut seen = Vec::new();
            for runtime in BOTH {
                let id = format!("{}-{}", name.replace(' ', "-"), runtime.tag());
                let out = node.run(runtime, &id, &["--mount", &mount], &["sh", "-c", script]).output()?;
                seen.push((out.code, out.text(), out.stderr));
                let _ = (fs::remove_file(data.join("file")), fs::remove_file(data.join("sub/file")));
            }
            if seen[0] != seen[1] {
                bail!("{name}: runc {:?}, kata {:?}", seen[0], seen[1]);
            }
        }
        Ok(())
    })
}

/// Maps a file of huge pages and writes to all of them.
const MAPPER: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statfs.h>
int main(int argc, char **argv) {
    enum { SIZE = 4 << 20 };
    struct statfs fs;
    statfs("/huge", &fs);
    printf("type %lx, pages of %ld, %ld of them\\n", (long)fs.f_type, (long)fs.f_bsize, (long)fs.f_blocks);
    int file = open("/huge/file", O_RDWR | O_CREAT, 0600);
    char *map = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) { perror("mmap"); return 1; }
    memset(map, 'h', SIZE);
    printf("%c\\n", map[SIZE - 1]);
    statfs("/huge", &fs);
    printf("%ld left\\n", (long)fs.f_bfree);
}
"#;

/// The host's huge pages, as many as before when it is dropped.
struct HugePages(String);

impl HugePages {
    const FILE: &'static str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

    fn more(count: u64) -> Result<Self> {
        let before = Self(fs::read_to_string(Self::FILE)?);
        fs::write(Self::FILE, (before.0.trim().parse::<u64>()? + count).to_string())?;
        Ok(before)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, self.0.trim());
    }
}

#[test]
fn huge_pages() -> Result<()> {
    with_node(|node| {
        let _pages = HugePages::more(4)?;
        let kubelet = Kubelet(node.dir().join("kubelet"));
        let mut seen = Vec::new();
        for runtime in BOTH {
            let volume = kubelet.volume("empty-dir", &format!("huge-{}", runtime.tag()))?;
            let options = Some("pagesize=2M,size=4M");
            mount(Some("nodev"), &volume, Some("hugetlbfs"), MsFlags::empty(), options)?;
            let tools = node.dir().join("tools");
            fs::create_dir_all(&tools)?;
            fs::write(tools.join("mapper"), compile(node.dir(), "mapper", MAPPER)?)?;
            let bind = |from: &Path, to: &str| format!("type=bind,src={},dst={to},options=rbind:rw", from.display());
            let (huge, tools) = (bind(&volume, "/huge"), bind(&tools, "/tools"));
            let script = "cp /tools/mapper /bin/m && chmod 755 /bin/m && m";
            let options = ["--mount", &huge, "--mount", &tools];
            let id = format!("huge-{}", runtime.tag());
            seen.push(node.run(runtime, &id, &options, &["sh", "-c", script]).output()?.ok()?.text());
        }
        ensure!(seen[0] == seen[1], "runc {:?}, kata {:?}", seen[0], seen[1]);
        // as kubelet mounts it, and without a limit
        let volume = kubelet.volume("empty-dir", "unlimited")?;
        mount(Some("nodev"), &volume, Some("hugetlbfs"), MsFlags::empty(), Some("pagesize=2M"))?;
        let huge = format!("type=bind,src={},dst=/huge,options=rbind:rw", volume.display());
        let refused = node.run(Runtime::Kata, "unlimited", &["--mount", &huge], &["true"]).output()?;
        ensure!(refused.code != 0 && refused.stderr.contains("hugepages-2Mi"), "{}", refused.stderr);
        Ok(())
    })
}

#[test]
fn what_the_host_mounts_between_two_containers_is_the_seconds() -> Result<()> {
    in_both(NodeSetup::default(), |cri, kubelet, runtime, seen| {
        // private: who has a copy of it is told nothing
        let volume = kubelet.volume("host-path", "private")?;
        mount(Some(&volume), &volume, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        mount(None::<&str>, &volume, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
        let mounts = json!({"mounts": [at("/data", &volume)]});
        let pod = pod(cri, runtime, "between")?;
        let one = cri.run(&pod, "one", &FOREVER, &mounts)?;
        let later = volume.join("later");
        fs::create_dir(&later)?;
        mount(Some("tmpfs"), &later, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        fs::write(later.join("word"), "later")?;
        let two = cri.run(&pod, "two", &FOREVER, &mounts)?;
        for container in [&one, &two] {
            seen.push(("the host's mount".into(), cri.sh(container, "ls /data /data/later")?));
        }
        cri.say(["stop", "--timeout", "0", &one])?;
        cri.say(["rm", &one])?;
        seen.push(("after the first's end".into(), cri.sh(&two, "cat /data/later/word")?));
        cri.remove(&pod)
    })
}

#[test]
fn mounts_of_a_container_reach_the_pods_others() -> Result<()> {
    with_cri(NodeSetup::default(), Network::default(), |cri| {
        let mut all = Vec::new();
        for runtime in BOTH {
            let volume = cri.node.dir().join(runtime.tag());
            fs::create_dir(&volume)?;
            let _mounted = Kubelet(volume.clone());
            mount(Some(&volume), &volume, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            mount(None::<&str>, &volume, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
            let mut pod = json!({"linux": {"security_context": {"privileged": true}}});
            let with = |propagation: u32| {
                let mut config = pod.clone();
                let place = at("/data", &volume);
                config["mounts"] = json!([place]);
                config["mounts"][0]["propagation"] = propagation.into();
                config
            };
            let configs = [0, 1, 2].map(with);
            let pod = cri.run_pod(runtime, &format!("propagation-{}", runtime.tag()), &pod.take())?;
            let private = cri.run(&pod, "private", &FOREVER, &configs[0])?;
            let slave = cri.run(&pod, "slave", &FOREVER, &configs[1])?;
            let shared = cri.run(&pod, "shared", &FOREVER, &configs[2])?;
            let other = cri.run(&pod, "other", &FOREVER, &configs[2])?;
            let mut seen = Vec::new();
            for (mounts, name) in [(&shared, "a"), (&other, "b"), (&slave, "c"), (&private, "d")] {
                let make =
                    format!("mkdir /data/{name} && mount -t tmpfs none /data/{name} && echo {name} > /data/{name}/f");
                cri.sh(mounts, &make)?;
                let ask = format!("cat /data/{name}/f 2> /dev/null || echo nothing");
                for container in [&private, &slave, &shared, &other] {
                    seen.push(cri.sh(container, &ask)?);
                }
            }
            cri.sh(&shared, "umount /data/a")?;
            seen.push(cri.sh(&other, "ls /data/a")?);
            cri.remove(&pod)?;
            all.push(seen);
        }
        ensure!(all[0] == all[1], "runc {:?}, kata {:?}", all[0], all[1]);
        Ok(())
    })
}
