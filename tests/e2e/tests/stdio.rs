//! Bytes through stdin and stdout: all of them, in order, also when the reader is slow and the process ends at once.

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api::CreateTaskRequest;
use e2e::{
    Containerd, Node, Runtime,
    ctr::{Invocation, Outcome},
    events::Events,
    task_api::{Bundle, Shim},
    with_every_containerd, with_node,
};
use sha2::{Digest as _, Sha256};
use std::{
    fs::File,
    io::{Read, Write as _},
    time::{Duration, Instant},
};

const MIB: usize = 1 << 20;

/// `ctr` closes a process' stdin only when it reads its own stdin's end after the task was created; a short input that
/// ends before that is never closed, with runc too. So the script says `ready` first, and only then does input come.
const CAT: [&str; 3] = ["sh", "-c", "echo ready; exec cat"];

/// How the reader of the output behaves.
#[derive(Clone, Copy)]
enum Reader {
    Eager,
    /// Reads nothing for some seconds after the first MiB, so that every buffer on the way is full.
    Stalling,
}

/// Sends random bytes through `cat` and compares.
fn through_cat(cat: Invocation, mib: usize, reader: Reader) -> Result<Outcome> {
    let mut cat = cat.limit(Duration::from_secs(240)).spawn()?;
    let mut stdin = cat.stdin.take().context("stdin")?;
    let mut stdout = cat.stdout.take().context("stdout")?;
    let mut ready = [0; 6];
    if stdout.read_exact(&mut ready).is_err() || &ready != b"ready\n" {
        drop(stdin);
        bail!("not ready but {ready:?}: {:?}", cat.finish()?);
    }
    let writer = std::thread::spawn(move || -> Result<Sha256> {
        let mut random = File::open("/dev/urandom")?;
        let (mut sum, mut block) = (Sha256::new(), vec![0; MIB]);
        for _ in 0..mib {
            random.read_exact(&mut block)?;
            sum.update(&block);
            stdin.write_all(&block)?;
        }
        Ok(sum)
    });
    let (mut sum, mut block, mut total) = (Sha256::new(), vec![0; 64 << 10], 0);
    let mut stalled = false;
    loop {
        let n = stdout.read(&mut block)?;
        if n == 0 {
            break;
        }
        sum.update(&block[..n]);
        total += n;
        if matches!(reader, Reader::Stalling) && !stalled && total > MIB {
            stalled = true;
            std::thread::sleep(Duration::from_secs(5));
        }
    }
    let done = cat.finish()?.ok()?;
    let sent = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(total == mib * MIB, "{total} bytes of {} arrived", mib * MIB);
    ensure!(sent.finalize() == sum.finalize(), "the bytes that arrived are not those that were sent");
    Ok(done)
}

/// Not compared with runc: at the end of its input containerd 1.6's shim for it drops what it has not passed on yet.
#[test]
fn short_input_reaches_its_end() -> Result<()> {
    with_every_containerd(|node| {
        for (n, mib) in [1, 1, 1, 8].into_iter().enumerate() {
            through_cat(node.run(Runtime::Kata, &format!("c{n}"), &[], &CAT), mib, Reader::Eager)?;
        }
        Ok(())
    })
}

#[test]
fn bytes_through_a_run() -> Result<()> {
    with_node(|node| {
        let done = through_cat(node.run(Runtime::Kata, "c1", &[], &CAT), 256, Reader::Eager)?;
        println!("256 MiB through a run in {:.1} s", done.took.as_secs_f64());
        Ok(())
    })
}

#[test]
fn bytes_through_an_exec() -> Result<()> {
    with_node(|node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let done = through_cat(node.exec("c1", "x1", &[], &CAT), 256, Reader::Eager)?;
        println!("256 MiB through an exec in {:.1} s", done.took.as_secs_f64());
        node.remove("c1")
    })
}

#[test]
fn a_reader_that_stalls_loses_nothing() -> Result<()> {
    with_node(|node| {
        through_cat(node.run(Runtime::Kata, "c1", &[], &CAT), 32, Reader::Stalling)?;
        node.detached(Runtime::Kata, "c2", &[], &["sleep", "1000"])?;
        through_cat(node.exec("c2", "x1", &[], &CAT), 32, Reader::Stalling)?;
        node.remove("c2")
    })
}

/// While one process' reader stalls, others in the same container go on.
#[test]
fn a_stalled_reader_holds_nobody_up() -> Result<()> {
    with_node(|node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "1000"])?;
        let mut stalled = node.exec("c1", "x1", &[], &["sh", "-c", "echo ready; exec cat /dev/zero"]).spawn()?;
        let mut ready = [0; 6];
        stalled.stdout.as_mut().context("stdout")?.read_exact(&mut ready)?;
        for n in 0..10 {
            let beside = node.exec("c1", &format!("y{n}"), &[], &["echo", "beside"]).limit(Duration::from_secs(5));
            ensure!(beside.output()?.ok()?.text() == "beside", "exec beside a stalled one");
        }
        node.ctr(["task", "kill", "-s", "KILL", "--exec-id", "x1", "c1"]).output()?.ok()?;
        let pid = stalled.pid();
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        stalled.finish()?;
        node.remove("c1")
    })
}

/// Runs `count` execs of `echo`, four at a time, and wants every one's output whole.
fn echoes(node: &Node, count: usize) -> Result<()> {
    const AT_ONCE: usize = 4;
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let worker = |from: usize| {
            scope.spawn(move || {
                for n in (from..count).step_by(AT_ONCE) {
                    let word = format!("word-{n}");
                    let done = node.exec("c1", &format!("x{n}"), &[], &["echo", &word]).output()?.ok()?;
                    ensure!(done.stdout == format!("{word}\n").as_bytes(), "exec {n}: {:?}", done.text());
                }
                Ok(())
            })
        };
        let workers: Vec<_> = (0..AT_ONCE).map(worker).collect();
        workers.into_iter().map(|w| w.join().unwrap_or_else(|_| bail!("panicked"))).collect()
    });
    results.into_iter().collect()
}

/// `ctr` of containerd 1.7 and later closes its ends when it hears of the exit, so the output has to be there first.
#[test]
fn output_just_before_the_exit_of_an_exec_is_whole() -> Result<()> {
    with_every_containerd(|node| {
        node.detached(Runtime::Kata, "c1", &[], &["sleep", "10000"])?;
        echoes(node, if node.containerd() == Containerd::Debian { 1000 } else { 300 })?;
        node.remove("c1")
    })
}

#[test]
fn output_just_before_the_exit_of_a_container_is_whole() -> Result<()> {
    with_every_containerd(|node| {
        for n in 0..30 {
            // more than fits the pipes on the way at once, and an end without a newline
            let script = format!("seq 1 2000; echo err-{n} >&2; printf end-{n}");
            let done = node.run(Runtime::Kata, &format!("c{n}"), &[], &["sh", "-c", &script]).output()?.ok()?;
            let text = String::from_utf8_lossy(&done.stdout);
            let lines = (1..=2000).fold(String::new(), |text, line| text + &format!("{line}\n"));
            let wanted = format!("{lines}end-{n}");
            ensure!(text == wanted, "container {n}: {} of {} bytes", text.len(), wanted.len());
            ensure!(done.stderr == format!("err-{n}\n"), "container {n}: stderr {:?}", done.stderr);
        }
        Ok(())
    })
}

/// A detached container has nobody at its output once `ctr` has gone: its pipe and the guest's are full when it dies.
#[test]
fn output_that_nobody_reads_does_not_hold_up_a_delete() -> Result<()> {
    with_every_containerd(|node| {
        node.detached(Runtime::Kata, "c1", &[], &["sh", "-c", "while :; do echo to nobody; done"])?;
        node.detached(Runtime::Kata, "c2", &[], &["sleep", "1000"])?;
        // its output fills what there is to fill, and then it sleeps in a write
        let asleep = "until grep -q 'State:.S' /proc/1/status && grep -q pipe_write /proc/1/wchan; do sleep 0.1; done";
        let stuck = node.exec("c1", "x1", &[], &["sh", "-c", asleep]).limit(Duration::from_secs(30)).output()?;
        stuck.ok()?;
        let events = Events::watch(node)?;
        for id in ["c1", "c2"] {
            let killed = Instant::now();
            node.ctr(["task", "kill", "-s", "KILL", id]).output()?.ok()?;
            let (at, _) = events.wait_exit(id, Duration::from_secs(10))?;
            let took = at.saturating_duration_since(killed);
            ensure!(took < Duration::from_secs(1), "{id}: the exit was told after {took:?}");
            let deleted = node.ctr(["task", "delete", id]).limit(Duration::from_secs(30)).output()?.ok()?;
            ensure!(deleted.stderr.contains("137"), "{deleted:?}");
            ensure!(deleted.took < Duration::from_secs(5), "{id}: delete took {:?}", deleted.took);
            node.ctr(["container", "rm", id]).output()?.ok()?;
        }
        Ok(())
    })
}

/// A process that wants no input does not end the one who has some: the pipe takes it until the process ends.
#[test]
fn input_that_nobody_wants_is_thrown_away() -> Result<()> {
    with_node(|node| {
        let fifo = node.dir().join("stdin");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
        let log = node.dir().join("log");
        let bundle = Bundle::make(node, "c1", &["sh", "-c", "exec <&-; echo closed; exec sleep 1000"])?;
        let shim = Shim::start(node, "c1", &bundle)?;
        let path = |file: &std::path::Path| file.display().to_string();
        let (id, stdin, stdout) = ("c1".to_owned(), path(&fifo), format!("file://{}", path(&log)));
        shim.create_as(CreateTaskRequest { id, stdin, stdout, ..Default::default() })?;
        shim.start_container("c1")?;
        let end = Instant::now() + Duration::from_secs(20);
        while std::fs::read_to_string(&log)? != "closed\n" {
            ensure!(Instant::now() < end, "the log has {:?}", std::fs::read_to_string(&log));
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut client = File::options().write(true).open(&fifo)?;
        for n in 0..64 {
            client.write_all(&vec![7; 64 << 10]).with_context(|| format!("after {n} times 64 KiB"))?;
        }
        shim.kill("c1", 9)?;
        ensure!(shim.wait("c1")? == 137, "another status than 137");
        shim.delete("c1")?;
        shim.shut_down()
    })
}
