//! The network of pods through CRI: who reaches whom, frames of every size, many connections, ports that are forwarded, and
//! statistics.

#![allow(unsafe_code, reason = "a socket option that nothing wraps")]

use anyhow::{Context as _, Result, ensure};
use e2e::{
    BOTH, Runtime,
    compile::compile,
    cri::{Cri, HOST, Network, with_pods, with_pods_of},
};
use nix::libc;
use serde_json::{Value, json};
use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    time::Duration,
};

const FOREVER: [&str; 2] = ["sleep", "100000"];

fn none() -> Value {
    json!({})
}

/// containerd reads the pod's interface in its namespace, kubelet (cAdvisor) what `/proc` shows of the sandbox's process.
#[test]
fn network_statistics_are_the_pods() -> Result<()> {
    const AMOUNT: u64 = 1 << 20;
    let counted = |cri: &Cri<'_>, pod: &str| -> Result<(u64, u64)> {
        let stats: Value = serde_json::from_str(&cri.say(["statsp", "-o", "json", "--id", pod])?)?;
        let number = |name: &str| -> Result<u64> {
            let at = format!("/stats/0/linux/network/defaultInterface/{name}/value");
            let number = stats.pointer(&at).and_then(|v| v.as_u64().or_else(|| v.as_str()?.parse().ok()));
            number.with_context(|| format!("no {at} in {stats}"))
        };
        let name = stats.pointer("/stats/0/linux/network/defaultInterface/name").and_then(Value::as_str);
        ensure!(name == Some("eth0"), "{name:?} in {stats}");
        Ok((number("rxBytes")?, number("txBytes")?))
    };
    with_pods(|cri| {
        let placed = json!({"linux": {"cgroup_parent": "/kata-e2e-parent"}});
        let pod = cri.run_pod(Runtime::Kata, "netstats", &placed)?;
        let one = cri.run(
            &pod,
            "one",
            &["nc", "-ll", "-p", "7777", "-e", "sh", "-c", "head -c 1048576 | wc -c; head -c 1048576 /dev/zero"],
            &none(),
        )?;
        let before = counted(cri, &pod.id)?;
        let (v4, _) = cri.addresses(&pod)?;
        let mut stream = Cri::until(|| Ok((cri.sh(&one, "netstat -ltn")?.contains(":7777"), String::new())))
            .and_then(|_| Ok(TcpStream::connect((v4.as_str(), 7777))?))?;
        stream.write_all(&vec![0; AMOUNT as usize])?;
        let mut back = Vec::new();
        stream.read_to_end(&mut back)?;
        ensure!(back.len() as u64 > AMOUNT, "{} bytes came back", back.len());
        let after = counted(cri, &pod.id)?;
        let (rx, tx) = (after.0 - before.0, after.1 - before.1);
        println!("{}: {rx} bytes in, {tx} out", cri.node.containerd().name());
        for (way, bytes) in [("in", rx), ("out", tx)] {
            ensure!((AMOUNT..2 * AMOUNT).contains(&bytes), "{bytes} bytes {way} for {AMOUNT}");
        }
        let shown = cri.inspect("inspectp", &pod.id)?;
        let pid = shown.pointer("/info/pid").and_then(Value::as_u64).context("a process of the sandbox")?;
        let devices = std::fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        let line =
            devices.lines().find_map(|line| line.trim().strip_prefix("eth0:")).with_context(|| devices.clone())?;
        let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        // the host's own eth0 would be far off
        let is_near = |now: u64, before: u64| (before..before + AMOUNT / 2).contains(&now);
        ensure!(
            fields.len() == 16 && is_near(fields[0], after.0) && is_near(fields[8], after.1),
            "{after:?}, but {line}"
        );
        cri.remove(&pod)
    })
}

#[test]
fn pods_reach_each_other_and_the_host() -> Result<()> {
    with_pods(|cri| {
        let dns = json!({
            "dns_config": {"servers": ["10.88.77.1"], "searches": ["e2e.example"], "options": ["ndots:5"]},
            "port_mappings": [{"protocol": 0, "container_port": 8080, "host_port": 28080}],
        });
        let first = cri.run_pod(Runtime::Kata, "net1", &dns)?;
        let second = cri.run_pod(Runtime::Kata, "net2", &none())?;
        let server = ["nc", "-ll", "-p", "8080", "-e", "cat"];
        let one = cri.run(&first, "server", &server, &none())?;
        let two = cri.run(&second, "client", &FOREVER, &none())?;
        let resolver = cri.sh(&one, "cat /etc/resolv.conf")?;
        ensure!(resolver.contains("nameserver 10.88.77.1") && resolver.contains("ndots:5"), "{resolver}");
        let (v4, v6) = cri.addresses(&first)?;
        for (from, target) in [(&two, v4.as_str()), (&two, HOST.0), (&one, HOST.0)] {
            let shown = cri.sh(from, &format!("ping -c 2 -W 3 {target}"))?;
            ensure!(shown.contains(" 0% packet loss"), "{shown}");
        }
        for (from, target) in [(&two, v6.as_str()), (&one, HOST.1)] {
            let shown = cri.sh(from, &format!("ping -6 -c 2 -W 3 {target}"))?;
            ensure!(shown.contains(" 0% packet loss"), "{shown}");
        }
        // TCP, both families, and UDP between the pods
        for target in [v4.as_str(), v6.as_str()] {
            let heard = cri.sh(&two, &format!("echo over-tcp | nc -w 3 {target} 8080"))?;
            ensure!(heard == "over-tcp", "{heard:?}");
        }
        // busybox has no datagram client but its resolver
        let script = format!("nslookup -type=a over-udp.example {HOST_V4} > /dev/null; true", HOST_V4 = HOST.0);
        let heard = datagram(HOST.0, || cri.sh(&two, &script).map(drop))?;
        ensure!(heard.windows(8).any(|part| part == b"over-udp"), "{heard:?}");
        // the host reaches a published port; by the bridge's address, as others would
        let mut there = TcpStream::connect((HOST.0, 28080))?;
        there.set_read_timeout(Some(Duration::from_secs(10)))?;
        there.write_all(b"published\n")?;
        let mut heard = [0; 10];
        there.read_exact(&mut heard)?;
        ensure!(&heard == b"published\n", "{heard:?}");
        // a name server on the bridge is asked
        let script = "timeout 5 nslookup some-service.e2e.example > /dev/null; true";
        let question = datagram(HOST.0, || cri.sh(&one, script).map(drop))?;
        ensure!(question.windows(12).any(|part| part == b"some-service"), "{question:?}");
        cri.remove(&second)?;
        cri.remove(&first)
    })
}

/// Answers every byte of every connection, however many there are.
const ECHO: &str = r#"
#include <arpa/inet.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int arguments, char **all_arguments) {
    (void)all_arguments;
    struct pollfd all[1024];
    int count = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(9090)};
    /* with any argument on the loopback interface only */
    if (arguments > 1) at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    all[0].fd = socket(AF_INET, SOCK_STREAM, 0);
    all[0].events = POLLIN;
    if (bind(all[0].fd, (struct sockaddr *)&at, sizeof at) || listen(all[0].fd, 1024)) return 1;
    write(1, "up\n", 3);
    while (poll(all, count, -1) > 0) {
        for (int i = count - 1; i >= 0; i--) {
            char bytes[4096];
            if (!all[i].revents) continue;
            if (i == 0) {
                if (count == 1024) return 2;
                all[count].fd = accept(all[0].fd, 0, 0);
                all[count].events = POLLIN;
                all[count++].revents = 0;
                continue;
            }
            ssize_t got = read(all[i].fd, bytes, sizeof bytes);
            if (got > 0) { write(all[i].fd, bytes, got); continue; }
            close(all[i].fd);
            all[i] = all[--count];
        }
    }
    return 3;
}
"#;

/// What brings a program into a container, at the top of its root.
fn program_mount(cri: &Cri<'_>, name: &str, text: &str) -> Result<Value> {
    let path = cri.node.dir().join(name);
    std::fs::write(&path, compile(cri.node.dir(), &format!("{name}-program"), text)?)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(json!({"mounts": [{"container_path": format!("/{name}"), "host_path": path, "readonly": true}]}))
}

#[test]
fn two_hundred_connections_pass_at_once() -> Result<()> {
    with_pods(|cri| {
        let pod = cri.run_pod(Runtime::Kata, "many", &none())?;
        let one = cri.run(&pod, "one", &["/echo"], &program_mount(cri, "echo", ECHO)?)?;
        cri.logs_with(&one, "up")?;
        let (v4, _) = cri.addresses(&pod)?;
        let mut all = Vec::new();
        for number in 0..200 {
            let mut there = TcpStream::connect((v4.as_str(), 9090))?;
            there.set_read_timeout(Some(Duration::from_secs(20)))?;
            write!(there, "line {number:3}")?;
            all.push(there);
        }
        for (number, there) in all.iter_mut().enumerate() {
            let mut heard = [0; 8];
            there.read_exact(&mut heard)?;
            ensure!(heard == *format!("line {number:3}").as_bytes(), "connection {number}: {heard:?}");
        }
        cri.remove(&pod)
    })
}

/// What comes first to the name server's port of `address` while `work` is done.
fn datagram(address: &str, work: impl FnOnce() -> Result<()>) -> Result<Vec<u8>> {
    let asked = std::net::UdpSocket::bind((address, 53))?;
    asked.set_read_timeout(Some(Duration::from_secs(20)))?;
    let question = std::thread::spawn(move || -> Result<Vec<u8>> {
        let mut packet = vec![0; 512];
        let length = asked.recv(&mut packet)?;
        packet.truncate(length);
        Ok(packet)
    });
    work()?;
    question.join().ok().context("the name server")?
}

/// Packets of this socket are whole or refused (ipv6(7), `IPV6_MTU_DISCOVER`).
fn no_fragments(socket: &std::net::UdpSocket) -> Result<()> {
    let wanted = libc::IPV6_PMTUDISC_DO;
    let size = size_of_val(&wanted) as libc::socklen_t;
    // SAFETY: an open socket and an integer that outlives the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            (&raw const wanted).cast(),
            size,
        )
    };
    if done < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
}

/// The answer of a host that got a datagram for a port that nobody listens on.
fn refused_port(socket: &std::net::UdpSocket) -> Result<bool> {
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    let answer = socket.recv(&mut [0; 1]);
    Ok(answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
}

#[test]
fn frames_of_every_size_pass() -> Result<()> {
    for mtu in [1400, 9000] {
        with_pods_of(Network { mtu, ..Network::default() }, |cri| {
            let pod = cri.run_pod(Runtime::Kata, &format!("mtu{mtu}"), &none())?;
            let one = cri.run(&pod, "one", &FOREVER, &none())?;
            ensure!(cri.sh(&one, "cat /sys/class/net/eth0/mtu")? == mtu.to_string(), "MTU in the pod");
            // IPv6 is never fragmented on its way, and its sender does it only for what is larger than the MTU: 40 bytes
            // of IPv6 and 8 of UDP
            let (_, v6) = cri.addresses(&pod)?;
            // by then the addresses have been checked for duplicates
            cri.sh(&one, &format!("ping -6 -c 1 -W 10 {}", HOST.1))?;
            let sent = |size: usize| -> Result<bool> {
                let socket = std::net::UdpSocket::bind((HOST.1, 0))?;
                no_fragments(&socket)?;
                // connected, so that the refusal comes back
                socket.connect((v6.as_str(), 9))?;
                Ok(socket.send(&vec![0; size]).is_ok() && refused_port(&socket)?)
            };
            let most = mtu as usize - 48;
            ensure!(sent(most)?, "a frame of the MTU {mtu} did not reach the pod");
            ensure!(!sent(most + 1)?, "a frame larger than the MTU {mtu} passed");
            cri.remove(&pod)
        })?;
    }
    Ok(())
}

/// Sends "kata\n" over and over, in large pieces: what busybox has would measure its own small ones.
const SOURCE: &str = r#"
#include <arpa/inet.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int count, char **arguments) {
    static char text[5 * 65536];
    if (count != 4) return 1;
    for (size_t i = 0; i < sizeof text; i++) text[i] = "kata\n"[i % 5];
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(arguments[2]))};
    int there = socket(AF_INET, SOCK_STREAM, 0);
    if (inet_pton(AF_INET, arguments[1], &to.sin_addr) != 1) return 2;
    if (connect(there, (struct sockaddr *)&to, sizeof to)) return 3;
    size_t at = 0, left = strtoull(arguments[3], 0, 10);
    while (left > 0) {
        size_t most = sizeof text - at % sizeof text;
        ssize_t sent = write(there, text + at % sizeof text, most < left ? most : left);
        if (sent <= 0) return 4;
        at += sent;
        left -= sent;
    }
}
"#;

#[test]
fn a_gibibyte_through_one_stream_is_intact() -> Result<()> {
    const SIZE: u64 = 1 << 30;
    with_pods(|cri| {
        let pod = cri.run_pod(Runtime::Kata, "stream", &none())?;
        let one = cri.run(&pod, "one", &FOREVER, &program_mount(cri, "source", SOURCE)?)?;
        let listener = TcpListener::bind((HOST.0, 0))?;
        let port = listener.local_addr()?.port();
        let receiver = std::thread::spawn(move || -> Result<(u64, u64)> {
            let (mut there, _) = listener.accept()?;
            there.set_read_timeout(Some(Duration::from_secs(60)))?;
            let (mut chunk, mut size, mut wrong) = (vec![0; 1 << 20], 0_u64, 0_u64);
            loop {
                let count = there.read(&mut chunk)?;
                if count == 0 {
                    return Ok((size, wrong));
                }
                for byte in &chunk[..count] {
                    // the text is "kata\n" over and over
                    let expected = b"kata\n"[(size % 5) as usize];
                    wrong += u64::from(*byte != expected);
                    size += 1;
                }
            }
        });
        let arguments = ["exec", "--sync", &one, "/source", HOST.0, &port.to_string(), &SIZE.to_string()];
        cri.crictl(arguments).limit(Duration::from_secs(300)).output()?.ok()?;
        let (size, wrong) = receiver.join().ok().context("the receiver")??;
        ensure!(size == SIZE && wrong == 0, "{size} bytes of {SIZE}, {wrong} of them wrong");
        cri.remove(&pod)
    })
}

#[test]
fn a_port_is_forwarded() -> Result<()> {
    with_pods(|cri| {
        for runtime in BOTH {
            let pod = cri.run_pod(runtime, &format!("forward-{}", runtime.tag()), &none())?;
            // on the pod's loopback only, where nobody else could reach it
            let server = cri.run(&pod, "server", &["/echo", "local"], &program_mount(cri, "echo", ECHO)?)?;
            cri.logs_with(&server, "up")?;
            let mut forward = cri.crictl(["port-forward", &pod.id, "28081:9090"]).spawn()?;
            let mut shown = String::new();
            let mut out = std::io::BufReader::new(forward.stdout.take().context("stdout")?);
            std::io::BufRead::read_line(&mut out, &mut shown)?;
            let answer = (|| -> Result<Vec<u8>> {
                let mut heard = Vec::new();
                for round in 0..3 {
                    let mut there = TcpStream::connect("127.0.0.1:28081")?;
                    there.set_read_timeout(Some(Duration::from_secs(10)))?;
                    writeln!(there, "forwarded {round}")?;
                    there.shutdown(std::net::Shutdown::Write)?;
                    there.read_to_end(&mut heard)?;
                }
                Ok(heard)
            })();
            nix::sys::signal::kill(forward.pid(), nix::sys::signal::Signal::SIGKILL)?;
            let ended = forward.finish()?;
            let answer = answer.with_context(|| format!("{runtime:?}: {shown} {}", ended.stderr))?;
            ensure!(
                answer == b"forwarded 0\nforwarded 1\nforwarded 2\n",
                "{runtime:?}: {:?} {shown} {}",
                String::from_utf8_lossy(&answer),
                ended.stderr
            );
            cri.remove(&pod)?;
        }
        Ok(())
    })
}

#[test]
fn a_network_without_addresses_is_answered_as_with_runc() -> Result<()> {
    with_pods_of(Network { addresses: false, ..Network::default() }, |cri| {
        let mut said = Vec::new();
        for runtime in BOTH {
            let config = cri.pod_config("no-address", &none())?.display().to_string();
            let refused = cri.crictl(["runp", "--runtime", runtime.tag(), &config]).output()?;
            ensure!(refused.code != 0, "{runtime:?} has no address and does not mind");
            let words = refused.stderr.split_once("desc = ").map(|(_, words)| words.to_owned());
            let words = words.with_context(|| refused.stderr.clone())?;
            // what differs from one pod to the next
            said.push(words.split(' ').filter(|word| word.len() < 64).collect::<Vec<_>>().join(" "));
        }
        ensure!(said[0] == said[1], "{said:#?}");
        Ok(())
    })
}
