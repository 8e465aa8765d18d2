//! From what containerd, the shim and the guest wrote while a container started to spans on one axis of time.

use super::draw::{Span, Who};
use std::time::{SystemTime, UNIX_EPOCH};

/// A moment by its name, ms since the start began.
type Mark = (&'static str, f64);

/// Lines of containerd's log and the moments that they are. The log has the shim's lines too.
const HOST: [(&str, &str); 14] = [
    ("topic=/containers/create ", "container"),
    ("msg=\"serving\"", "serving"),
    ("msg=\"creating container ", "create"),
    ("msg=\"starting QEMU ", "qemu"),
    ("msg=\"QEMU's monitor is there\"", "monitor"),
    ("event=\\\"MIGRATION\\\" data={\\\"status\\\":\\\"setup\\\"}", "state"),
    ("event=\\\"MIGRATION\\\" data={\\\"status\\\":\\\"completed\\\"}", "restored"),
    ("event=\\\"RESUME\\\"", "resumed"),
    ("topic=/tasks/create ", "task-create"),
    ("topic=/tasks/start ", "task-start"),
    ("topic=/tasks/exit ", "task-exit"),
    ("topic=/tasks/delete ", "task-delete"),
    ("msg=\"shim disconnected\"", "disconnected"),
    ("topic=/containers/delete ", "removed"),
];

/// What the shim and its caller do one after the other: who, and what has been done when the moment comes. The shim's
/// own steps are moments too (`runtime/src/trace.rs`).
const BESIDE: [(&str, Who, &str); 20] = [
    ("container", Who::Containerd, "ctr: image, container"),
    ("serving", Who::Containerd, "ctr, containerd: bundle, shim's process"),
    ("create", Who::Containerd, "the call Create"),
    ("configuration", Who::Shim, "configuration"),
    ("network-connected", Who::Shim, "network: scanned, tap joined"),
    ("taken", Who::Shim, "a machine of the pool taken"),
    ("virtiofsd-started", Who::Shim, "folder, virtiofsd"),
    ("template-found", Who::Shim, "template looked up and checked"),
    ("vmm-started", Who::Shim, "kernel and initrd opened, QEMU spawned"),
    ("clone-started", Who::Shim, "QEMU spawned"),
    ("rootfs-ready", Who::Shim, "root file system, specification"),
    ("agent-ready", Who::Shim, "waits for the agent"),
    ("sandbox-created", Who::Shim, "call: sandbox, clock"),
    ("network-configured", Who::Shim, "calls: interfaces, routes"),
    ("container-created", Who::Shim, "call: container"),
    ("task-create", Who::Containerd, "Create is answered"),
    ("task-start", Who::Shim, "the call Start"),
    ("task-delete", Who::Shim, "the calls Delete and Shutdown, QEMU's end"),
    ("disconnected", Who::Containerd, "the shim ends"),
    ("removed", Who::Containerd, "bundle and container removed"),
];

/// What QEMU does.
const VMM: [(&str, Who, &str); 5] = [
    ("monitor", Who::Vmm, "QEMU's program"),
    ("kernel", Who::Vmm, "machine, firmware"),
    ("state", Who::Vmm, "machine, memory copied"),
    ("restored", Who::Vmm, "state read"),
    ("resumed", Who::Vmm, "virtio-fs plugged"),
];

/// How lines of the guest's kernel begin, the moments that they are, and what has been done then.
const KERNEL: [(&str, &str, &str); 9] = [
    ("Linux version", "kernel", ""),
    ("devtmpfs: initialized", "devtmpfs", "kernel: memory, processor, clocks"),
    ("ACPI: Interpreter enabled", "acpi", "kernel: ACPI"),
    ("PCI: Using ACPI for IRQ routing", "pci", "kernel: PCI's buses"),
    ("Unpacking initramfs", "tables", "kernel: tables of the network"),
    ("Freeing initrd memory", "initrd", "kernel: initrd unpacked"),
    ("Run /init", "init", "kernel: drivers"),
    ("pci 0000:01:", "scan", "wakes: random numbers, time"),
    ("virtiofs virtio", "folder", "kernel: new devices, their drivers"),
];

/// What the agent says, and what it has done then.
const AGENT: [(&str, &str, &str); 7] = [
    ("started", "started", "agent: its program"),
    ("listening", "listening", "agent: channel"),
    ("serving", "agent-serving", "agent: rest of the guest"),
    ("awake", "awake", "agent: awake"),
    ("the sandbox is made", "sandbox", "agent: the next call, sandbox"),
    ("a container is made", "made", "agent: network, container"),
    ("a container is started", "running", "agent: the next call, start"),
];

/// Puts together what was written between two moments of the bench's clock; `log` is containerd's and `kernel` the guest's.
pub(crate) fn spans(log: &[String], kernel: &str, from: SystemTime, to: SystemTime) -> Vec<Span> {
    let zero = from.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1000.0;
    let end = to.duration_since(from).unwrap_or_default().as_secs_f64() * 1000.0;
    let mut marks = host(log, zero);
    let Some(create) = find(&marks, "create") else { return Vec::new() };
    steps(log, create, &mut marks);
    let guest = guest(log, kernel, zero, create);
    marks.extend(&guest);

    let mut spans = chain(&marks, ("begin", 0.0), &BESIDE);
    spans.extend(find(&marks, "removed").and_then(|at| span(Who::Containerd, "ctr: events, its end", at, end)));
    spans.extend(find(&marks, "qemu").map(|at| chain(&marks, ("qemu", at), &VMM)).unwrap_or_default());
    spans.extend(inside(&marks));
    let lived = find(&marks, "running").zip(find(&marks, "task-exit"));
    spans
        .extend(lived.and_then(|(run, exit)| span(Who::Container, "the container's process, its end told", run, exit)));
    spans
}

/// The guest's own chain: after a boot from its kernel's first line on, else from where it goes on.
fn inside(marks: &[Mark]) -> Vec<Span> {
    let boots = find(marks, "kernel");
    let begin = boots.or_else(|| find(marks, "resumed")).or_else(|| find(marks, "taken"));
    let Some(begin) = begin else { return Vec::new() };
    // what a boot finds it finds with the rest of its bus
    let is_meant = |name: &str| boots.is_none() || !["scan", "folder"].contains(&name);
    let kernel = KERNEL.iter().filter(|(_, name, _)| is_meant(name)).map(|&(_, name, done)| (name, Who::Kernel, done));
    let agent = AGENT.iter().map(|&(_, name, done)| (name, Who::Agent, done));
    chain(marks, ("", begin), &kernel.chain(agent).collect::<Vec<_>>())
}

fn find(marks: &[Mark], name: &str) -> Option<f64> {
    marks.iter().find(|(known, _)| *known == name).map(|(_, at)| *at)
}

fn span(who: Who, name: &str, from: f64, to: f64) -> Option<Span> {
    (to >= from && !name.is_empty()).then(|| Span { who, name: name.to_owned(), from, to })
}

/// From each of these moments to the next.
fn chain(marks: &[Mark], begin: Mark, links: &[(&'static str, Who, &str)]) -> Vec<Span> {
    let mut found: Vec<_> =
        links.iter().filter_map(|link| Some((find(marks, link.0)?, link))).filter(|(at, _)| *at >= begin.1).collect();
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut from = begin.1;
    let mut spans = Vec::new();
    for (at, (name, who, done)) in found {
        // what lies between is the container's own
        if *name == "task-delete" {
            from = find(marks, "task-exit").unwrap_or(from).max(from);
        }
        spans.extend(span(*who, done, from, at));
        from = at;
    }
    spans
}

fn host(log: &[String], zero: f64) -> Vec<Mark> {
    let found = HOST.iter().filter_map(|(words, name)| {
        let line = log.iter().find(|line| line.contains(words))?;
        Some((*name, time(line)? - zero))
    });
    found.collect()
}

/// The shim writes its steps all at once, each with its time since Create.
fn steps(log: &[String], create: f64, marks: &mut Vec<Mark>) {
    for line in log {
        let Some((_, rest)) = line.split_once("start-trace step=") else { continue };
        let mut words = rest.split([' ', '"']);
        let (Some(step), Some(ms)) = (words.next(), words.next().and_then(|word| word.strip_prefix("ms="))) else {
            continue;
        };
        let known = BESIDE.iter().find(|(name, ..)| *name == step);
        if let (Some((name, ..)), Ok(ms)) = (known, ms.parse::<f64>()) {
            marks.push((name, create + ms));
        }
    }
}

/// Moments of the guest's log, on the host's axis; what was before the pod, in a saved or a waiting machine, is left out.
fn guest(log: &[String], kernel: &str, zero: f64, create: f64) -> Vec<Mark> {
    let lines: Vec<_> = kernel.lines().filter_map(stamped).collect();
    let Some(offset) = offset(log, &lines) else { return Vec::new() };
    let at = |guest: f64| guest + offset - zero;
    let mut marks = Vec::new();
    for (ms, text) in lines.into_iter().filter(|(ms, _)| at(*ms) >= create) {
        let known = KERNEL.iter().find(|(words, ..)| text.starts_with(words)).map(|(_, name, _)| *name);
        let said = text.strip_prefix("agent: debug: ").unwrap_or_default();
        let known = known.or_else(|| AGENT.iter().find(|(words, ..)| *words == said).map(|(_, name, _)| *name));
        // new devices are found by the first that is seen and the last that has a driver
        if let Some(name) = known
            && (name == "folder" || find(&marks, name).is_none())
        {
            marks.retain(|(one, _)| *one != name);
            marks.push((name, at(ms)));
        }
    }
    marks
}

/// What is to be added to the guest's time to get the host's. The agent's lines are in its kernel's log with the one and on
/// the console, which the shim writes down, with the other; what came through quickest tells best. A clone's kernel has
/// older lines too, so they are compared from the last on.
fn offset(log: &[String], kernel: &[(f64, &str)]) -> Option<f64> {
    let said = |text: &str| {
        text.split_once("agent: debug: ").map(|(_, said)| said.split('"').next().unwrap_or_default().to_owned())
    };
    let inside = kernel.iter().rev().filter_map(|(ms, text)| Some((said(text)?, *ms)));
    let outside = log.iter().rev().filter_map(|line| Some((said(line)?, time(line)?)));
    let pairs = inside.zip(outside).take_while(|((inside, _), (outside, _))| inside == outside);
    pairs.map(|((_, inside), (_, outside))| outside - inside).reduce(f64::min)
}

/// A line of the kernel: `[    0.123456] text`, its time in ms.
fn stamped(line: &str) -> Option<(f64, &str)> {
    let (stamp, text) = line.strip_prefix('[')?.split_once("] ")?;
    Some((stamp.trim().parse::<f64>().ok()? * 1000.0, text))
}

/// The time of a line in containerd's log, ms since 1970: `time="2026-11-26T04:18:30.407448970Z" …`.
fn time(line: &str) -> Option<f64> {
    let text = line.strip_prefix("time=\"")?.split_once('Z')?.0;
    let mut numbers = text.split(['-', 'T', ':']);
    let mut next = || numbers.next().and_then(|number| number.parse::<f64>().ok());
    let (year, month, day) = (next()? as i64, next()? as i64, next()? as i64);
    // days since 1970 of the Gregorian calendar, whose year begins here with March
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + (153 * month + 2) / 5 + day
            - 719_469;
    Some(((days as f64 * 24.0 + next()?) * 60.0 + next()?) * 60_000.0 + next()? * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const LOG: &str = r#"time="1970-01-02T00:00:00.100Z" level=debug msg="event published" topic=/containers/create type=x
time="1970-01-02T00:00:00.110Z" level=debug msg="serving" runtime=kata
time="1970-01-02T00:00:00.111Z" level=info msg="creating container a" runtime=kata
time="1970-01-02T00:00:00.120Z" level=debug msg="starting QEMU program=x" runtime=kata
time="1970-01-02T00:00:00.140Z" level=debug msg="QEMU's monitor is there" runtime=kata
time="1970-01-02T00:00:00.350Z" level=info msg="agent: debug: started" runtime=kata
time="1970-01-02T00:00:00.361Z" level=info msg="agent: debug: listening" runtime=kata
time="1970-01-02T00:00:00.400Z" level=info msg="start-trace step=configuration ms=5.0" runtime=kata
time="1970-01-02T00:00:00.400Z" level=info msg="start-trace step=agent-ready ms=250.0" runtime=kata
time="1970-01-02T00:00:00.420Z" level=debug msg="event forwarded" topic=/tasks/exit type=x"#;

    const KERNEL_LOG: &str = "[    0.000000] Linux version 6\n[    0.100000] Run /init as init process\nodd\n\
                              [    0.150000] agent: debug: started\n[    0.160000] agent: debug: listening\n";

    fn read(kernel: &str) -> Vec<Span> {
        let log: Vec<_> = LOG.lines().map(str::to_owned).collect();
        let from = UNIX_EPOCH + Duration::from_secs(86_400);
        spans(&log, kernel, from, from + Duration::from_millis(500))
    }

    fn near(spans: &[Span], name: &str, from: f64, to: f64) {
        let found = spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name} in {spans:?}"));
        assert!((found.from - from).abs() < 0.01 && (found.to - to).abs() < 0.01, "{found:?}");
    }

    #[test]
    fn host_and_guest_have_one_time() {
        let spans = read(KERNEL_LOG);
        near(&spans, "ctr: image, container", 0.0, 100.0);
        near(&spans, "configuration", 111.0, 116.0);
        near(&spans, "waits for the agent", 116.0, 361.0);
        // the guest's zero is 200 by the first of its words, 201 by the second, which took longer
        near(&spans, "machine, firmware", 140.0, 200.0);
        near(&spans, "kernel: drivers", 200.0, 300.0);
        near(&spans, "agent: its program", 300.0, 350.0);
        near(&spans, "agent: channel", 350.0, 360.0);
    }

    #[test]
    fn an_older_life_of_the_guest_is_left_out() {
        let older = "[    0.000000] Linux version 6\n[    1.000000] agent: debug: started\n\
                     [    9.150000] agent: debug: started\n[    9.160000] agent: debug: listening\n";
        let spans = read(older);
        assert!(!spans.iter().any(|span| span.who == Who::Kernel), "{spans:?}");
    }

    #[test]
    fn what_is_missing_breaks_nothing() {
        assert!(spans(&[], "", UNIX_EPOCH, UNIX_EPOCH).is_empty());
        let spans = read("");
        near(&spans, "QEMU's program", 120.0, 140.0);
        assert!(!spans.iter().any(|span| span.who == Who::Agent), "{spans:?}");
    }

    #[test]
    fn times_are_of_the_calendar() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0.0),
            ("2000-03-01T00:00:01.5Z", 951_868_801.5),
            ("2026-11-26T04:18:30Z", 1_795_666_710.0),
        ] {
            let ms = time(&format!("time=\"{text}\" x")).expect(text);
            assert!((ms - seconds * 1000.0).abs() < 0.01, "{text}: {ms}");
        }
        assert_eq!(time("time=\"yesterday\""), None);
    }
}
