//! Pods that are clones of a saved VM: what they do not have in common, and that every pod starts whatever becomes of the
//! template.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{
    Node, NodeSetup, Outcome, Runtime, ctr::Invocation, install::Install, pod_network::Pod, processes, with_node_setup,
};
use nix::sys::{
    socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt},
    time::TimeVal,
};
use std::{
    collections::BTreeSet,
    fs,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

/// Done to a template's folder.
type Damage = fn(&Path) -> Result<()>;

/// Prints what clones must not share, a line each.
const SELF: &str =
    "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1";

/// A node whose pods are clones; templates are in a folder of the node's.
struct Factory<'a> {
    node: &'a Node,
    templates: PathBuf,
}

fn with_factory(on_demand: bool, test: impl FnOnce(&Factory<'_>) -> Result<()>) -> Result<()> {
    with_factory_by("auto", on_demand, test)
}

/// As `with_factory`, by a way of sharing files.
fn with_factory_by(shared_fs: &str, on_demand: bool, test: impl FnOnce(&Factory<'_>) -> Result<()>) -> Result<()> {
    with_factory_of(&[("shared_fs", shared_fs)], on_demand, test)
}

/// As `with_factory`, with these settings of the hypervisor.
fn with_factory_of(
    settings: &[(&str, &str)],
    on_demand: bool,
    test: impl FnOnce(&Factory<'_>) -> Result<()>,
) -> Result<()> {
    let templates = tempfile::Builder::new().prefix("ketpl").tempdir_in("/dev/shm")?;
    let config = Install::locate()?.config_table_with(
        "factory",
        &[
            ("enable_template", true.into()),
            ("template_path", templates.path().display().to_string().into()),
            ("make_template_on_demand", on_demand.into()),
        ],
    )?;
    let mut config: toml::Table = config.parse()?;
    let qemu = config["hypervisor"]["qemu"].as_table_mut().context("no [hypervisor.qemu]")?;
    for (key, value) in settings {
        qemu.insert((*key).into(), (*value).into());
    }
    with_node_setup(NodeSetup { config: Some(config.to_string()), ..NodeSetup::default() }, |node| {
        test(&Factory { node, templates: templates.path().to_owned() })
    })
}

impl Factory<'_> {
    fn command(&self, words: &[&str]) -> Invocation {
        let program = self.node.install().kata_runtime().display().to_string();
        let config = self.node.config().display().to_string();
        Invocation::new(&program, [&["--config", &config, "factory"], words].concat())
    }

    fn init(&self) -> Result<PathBuf> {
        self.command(&["init"]).output()?.ok()?;
        self.only().context("init made none")
    }

    /// The folder of the template, when there is just one.
    fn only(&self) -> Option<PathBuf> {
        match &self.all()[..] {
            [one] if one.join("about.json").is_file() => Some(one.clone()),
            _ => None,
        }
    }

    /// Everything in the folder but locks.
    fn all(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.templates).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| !path.to_string_lossy().contains(".lock-")).collect()
    }

    fn run(&self, id: &str, script: &str) -> Result<Outcome> {
        self.node.run(Runtime::Kata, id, &[], &["sh", "-c", script]).output()?.ok()
    }

    /// Runs a container and tells whether it was in a clone.
    fn is_clone(&self, id: &str) -> Result<bool> {
        let from = self.node.log.len();
        let shown = self.run(id, "uname -r")?.text();
        ensure!(!shown.is_empty(), "the container said nothing");
        // the shim's words come by a pipe of their own
        let wanted = |line: &str| line.contains("start-trace step=created") && line.contains(&format!("sandbox={id}"));
        self.node.log.wait_from(from, Duration::from_secs(5), wanted).context("no trace of the start")?;
        let lines = self.node.log.lines_from(from);
        let says =
            |words: &str| lines.iter().any(|line| line.contains(words) && line.contains(&format!("sandbox={id}")));
        let (is_clone, has_booted) = (says("a clone of a template"), says("step=vmm-started"));
        ensure!(is_clone != has_booted, "both or neither:\n{}", lines.join("\n"));
        Ok(is_clone)
    }

    /// Waits until one is made that was asked for by a pod.
    fn wait_for_one(&self) -> Result<PathBuf> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(one) = self.only() {
                return Ok(one);
            }
            ensure!(Instant::now() < end, "no template was made; there are {:?}", self.all());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn clones_have_nothing_in_common() -> Result<()> {
    with_factory(false, |factory| {
        ensure!(!factory.is_clone("cold")?, "a clone of nothing");
        factory.init()?;
        ensure!(factory.command(&["init"]).output()?.ok()?.text().contains("the template exists"), "made twice");
        let status = factory.command(&["status"]).output()?.ok()?.text();
        ensure!(status.contains("enabled in") && status.contains("512 MiB") && status.contains("vmlinux"), "{status}");
        ensure!(factory.is_clone("one")?, "not a clone");
        let mut seen = BTreeSet::new();
        for id in ["a", "b", "c"] {
            let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
            let shown = factory.run(id, &format!("{SELF}; date +%s"))?.text();
            let lines: Vec<_> = shown.lines().collect();
            let [uuid, boot_id, random, now] = lines[..] else { bail!("{shown}") };
            for value in [uuid, boot_id, random] {
                ensure!(seen.insert(value.to_owned()), "{value} is in two clones:\n{shown}");
            }
            let now: u64 = now.parse()?;
            ensure!((before..before + 30).contains(&now), "the clock of {id} says {now}, the host's said {before}");
        }
        ensure!(factory.command(&["destroy"]).output()?.ok()?.text().starts_with("1 "), "not taken away");
        ensure!(!factory.is_clone("after")?, "a clone of what is gone");
        ensure!(factory.all().is_empty(), "left: {:?}", factory.all());
        Ok(())
    })
}

/// As with Kata, whose templates are of 9p alone: QEMU serves the files, so nobody else works in the guest's memory.
#[test]
fn a_clone_by_9p_writes_its_own_copy_of_the_memory() -> Result<()> {
    with_factory_by("virtio-9p", false, |factory| {
        let memory = factory.init()?.join("memory");
        let before = fs::read(&memory)?;
        for id in ["one", "two"] {
            let from = factory.node.log.len();
            ensure!(factory.is_clone(id)?, "not a clone");
            let lines = factory.node.log.lines_from(from).join("\n");
            ensure!(lines.contains("copy-on-write"), "{lines}");
            let said =
                factory.run(id, "echo $((6 * 7)) > /file && cat /file; grep -c 'kataShared / 9p' /proc/mounts")?;
            ensure!(said.text() == "42\n1", "{said:?}");
        }
        // not measured, and not changed for another, in every clone again
        let clock = "/sys/devices/system/clocksource/clocksource0";
        let said = factory.run("three", &format!("cat {clock}/current_clocksource; grep -c noatime /proc/mounts"))?;
        ensure!(!said.text().contains("early") && !said.text().ends_with("\n0"), "{said:?}");
        ensure!(fs::read(&memory)? == before, "a clone wrote into the template");
        Ok(())
    })
}

/// The kernel would wait for all units of a SCSI controller that it finds, 256 of them, before it gave the clone's own word.
#[test]
fn a_clone_does_not_wait_for_units_that_are_missing() -> Result<()> {
    let settings = [("shared_fs", "virtio-9p"), ("block_device_driver", "virtio-scsi")];
    with_factory_of(&settings, false, |factory| {
        factory.init()?;
        let file = factory.node.dir().join("disk");
        fs::File::create(&file)?.set_len(1 << 20)?;
        let device =
            Invocation::new("losetup", ["--find", "--show", &file.display().to_string()]).output()?.ok()?.text();
        let script = format!("cat /sys/block/sda/size; head -c 1 {device} | wc -c; cat /proc/uptime");
        let run = factory.node.run(Runtime::Kata, "disk", &["--device", &device], &["sh", "-c", &script]).output();
        Invocation::new("losetup", ["--detach", &device]).output()?.ok()?;
        let said = run?.ok()?.text();
        let [size, read, uptime] = said.lines().collect::<Vec<_>>()[..] else { bail!("{said}") };
        ensure!((size, read) == ("2048", "1"), "{said}");
        let idle: f64 = uptime.split_whitespace().nth(1).context("the time that nothing was done")?.parse()?;
        // up to 3 s are the template's, which waited to be saved
        ensure!(idle < 6.0, "the guest waited {idle} s of {uptime}");
        Ok(())
    })
}

/// The first sequence number of a connection is a function of the addresses and of a secret, plus the time in units of
/// 64 ns (Linux, net/core/secure_seq.c): with the same addresses and the same secret, clones differ by the time alone. Two
/// secrets look like one in 1 of 64 cases, thus four clones.
#[test]
fn clones_have_sequence_numbers_and_networks_of_their_own() -> Result<()> {
    /// Two seconds: between a connection and the end of its container less goes by.
    const NEAR: u32 = 1 << 25;
    with_factory(false, |factory| {
        factory.init()?;
        let mut secrets: Vec<u32> = Vec::new();
        for id in ["a", "b", "c", "d"] {
            let pod = Pod::make(48, 1500)?;
            let packets = packets()?;
            let options = pod.options();
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            let script = "ping -c 1 -W 5 10.89.48.1 >/dev/null && echo reached; nc -p 40000 -w 2 10.89.48.1 7777 </dev/null; true";
            let shown = factory.node.run(Runtime::Kata, id, &options, &["sh", "-c", script]).output()?.ok()?.text();
            ensure!(shown == "reached", "{shown}");
            let now = (SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() >> 6) as u32;
            secrets.push(first_number(&packets, 7777)?.wrapping_sub(now));
        }
        let is_near = |one: u32, other: u32| one.wrapping_sub(other).min(other.wrapping_sub(one)) < NEAR;
        let all_near = secrets[1..].iter().all(|&other| is_near(secrets[0], other));
        ensure!(!all_near, "sequence numbers without the time: {secrets:?}");
        Ok(())
    })
}

/// All TCP that reaches this machine (raw(7)).
fn packets() -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(10, 0))?;
    Ok(socket)
}

/// The sequence number of the first packet that opens a connection to `port`.
fn first_number(packets: &OwnedFd, port: u16) -> Result<u32> {
    let mut packet = [0; 2048];
    loop {
        let count = recv(packets.as_raw_fd(), &mut packet, MsgFlags::empty()).context("no connection was opened")?;
        let tcp = &packet[..count][usize::from(packet[0] & 15) * 4..];
        let is_opening = tcp[13] & 2 != 0;
        if is_opening && tcp[2..4] == port.to_be_bytes() {
            return Ok(u32::from_be_bytes(tcp[4..8].try_into()?));
        }
    }
}

#[test]
fn a_bad_template_goes_and_another_is_made() -> Result<()> {
    with_factory(true, |factory| {
        ensure!(!factory.is_clone("first")?, "a clone of nothing");
        let damages: [(&str, Damage); 3] = [
            ("state", |one| {
                let file = fs::File::options().read(true).write(true).open(one.join("state"))?;
                let mut byte = [0];
                file.read_exact_at(&mut byte, 5000)?;
                file.write_all_at(&[!byte[0]], 5000).map_err(Into::into)
            }),
            ("memory", |one| {
                fs::File::options().write(true).open(one.join("memory"))?.set_len(1 << 20).map_err(Into::into)
            }),
            ("about", |one| fs::write(one.join("about.json"), "{}").map_err(Into::into)),
        ];
        for (name, damage) in damages {
            let one = factory.wait_for_one()?;
            ensure!(factory.is_clone(&format!("good-{name}"))?, "not a clone before {name}");
            damage(&one)?;
            let from = factory.node.log.len();
            ensure!(!factory.is_clone(&format!("bad-{name}"))?, "a clone of a bad {name}");
            let lines = factory.node.log.lines_from(from);
            let told = lines.iter().filter(|line| line.contains("template") && line.contains("level=warn")).count();
            ensure!(told == 1, "told {told} times:\n{}", lines.join("\n"));
        }
        factory.wait_for_one()?;
        ensure!(factory.is_clone("last")?, "not a clone in the end");
        Ok(())
    })
}

#[test]
fn a_killed_maker_leaves_nothing_and_a_changed_guest_is_another() -> Result<()> {
    with_factory(false, |factory| {
        for delay in [50, 200, 350] {
            let maker = factory.command(&["init"]).spawn()?;
            std::thread::sleep(Duration::from_millis(delay));
            nix::sys::signal::kill(maker.pid(), nix::sys::signal::Signal::SIGKILL)?;
            let _ = maker.finish();
            let end = Instant::now() + Duration::from_secs(2);
            while processes::all().iter().any(|process| process.command.contains("kata-template")) {
                ensure!(Instant::now() < end, "the maker's machine lives on");
                std::thread::sleep(Duration::from_millis(20));
            }
            // a quick one was done by then
            if factory.only().is_some() {
                factory.command(&["destroy"]).output()?.ok()?;
            }
        }
        ensure!(!factory.is_clone("cold")?, "a clone of half a template");
        // one that is told to end takes what it made with it; until then others hear of it
        let maker = factory.command(&["init"]).spawn()?;
        std::thread::sleep(Duration::from_secs(1));
        let said = factory.command(&["destroy"]).output()?.ok()?.text();
        ensure!(said.contains("1 being made"), "{said}");
        nix::sys::signal::kill(maker.pid(), nix::sys::signal::Signal::SIGINT)?;
        ensure!(maker.finish()?.ok().is_err(), "it went on");
        ensure!(factory.all().is_empty(), "left: {:?}", factory.all());
        let one = factory.init()?;
        ensure!(factory.all() == [one.clone()], "left by dead makers: {:?}", factory.all());
        ensure!(factory.is_clone("warm")?, "not a clone");
        // of more memory than the configured: another machine, which nobody has saved
        let from = factory.node.log.len();
        let limit = ["--memory-limit", "134217728"];
        factory.node.run(Runtime::Kata, "larger", &limit, &["true"]).output()?.ok()?;
        let line = |line: &str| line.contains("step=vmm-started") && line.contains("sandbox=larger");
        ensure!(factory.node.log.wait_from(from, Duration::from_secs(5), line).is_some(), "a clone of another size");
        Ok(())
    })
}

#[test]
fn a_full_disk_leaves_nothing() -> Result<()> {
    with_factory(false, |factory| {
        let small = factory.templates.join("small");
        fs::create_dir(&small)?;
        let at = small.display().to_string();
        Invocation::new("mount", ["-t", "tmpfs", "-o", "size=8m", "none", &at]).output()?.ok()?;
        let done = (|| {
            let mut table: toml::Table = fs::read_to_string(factory.node.config())?.parse()?;
            let section = table.get_mut("factory").and_then(toml::Value::as_table_mut).context("[factory]")?;
            section.insert("template_path".into(), at.clone().into());
            let config = factory.node.dir().join("small.toml").display().to_string();
            fs::write(&config, table.to_string())?;
            let program = factory.node.install().kata_runtime().display().to_string();
            let made = Invocation::new(&program, ["--config", &config, "factory", "init"]).output()?;
            ensure!(made.code != 0, "made on a full disk");
            let left: Vec<_> = fs::read_dir(&small)?.flatten().map(|entry| entry.file_name()).collect();
            ensure!(
                left.iter().all(|name| name.to_string_lossy().starts_with(".lock-")),
                "left {left:?}: {}",
                made.stderr
            );
            // nor does one fail without a word that is made beside a pod
            let section = table.get_mut("factory").and_then(toml::Value::as_table_mut).context("[factory]")?;
            section.insert("make_template_on_demand".into(), true.into());
            fs::write(&config, table.to_string())?;
            let from = factory.node.log.len();
            let own = ["--runtime-config-path", &config];
            factory.node.detached(Runtime::Kata, "full", &own, &["sleep", "1000"])?.ok()?;
            let told = |line: &str| line.contains("no template was made") && line.contains("room");
            ensure!(
                factory.node.log.wait_from(from, Duration::from_secs(30), told).is_some(),
                "not a word:\n{}",
                factory.node.log.lines_from(from).join("\n")
            );
            factory.node.remove("full")
        })();
        Invocation::new("umount", [&at]).output()?.ok()?;
        done
    })
}
