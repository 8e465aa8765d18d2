//! What passes through a pod's network: bytes a second through one TCP stream, and the time of a round trip, from and to
//! the host's bridge. Beside runc, and beside a bare QEMU: with its tap joined to a veth as the product's is, and with it
//! at the bridge itself. All of them are in a cgroup of the host's, as a pod is: between two processes that share the
//! processors that alone is worth up to a fifth.

use crate::{by_hand, cgroup::Cgroup, initrd::Archive, report::Report, sample::Sample};
use anyhow::{Context as _, Result, bail};
use e2e::{
    Node, Runtime,
    compile::compile,
    ctr::Invocation,
    install::Install,
    pod_network::{Model, Pod, ip, with_model},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How much goes through a stream to measure it once.
const BYTES: u64 = 64 << 20;

/// Round trips of one byte for one value.
const ROUND_TRIPS: u64 = 500;

/// How long a guest may take to connect, or to do one thing that it is told to.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connects to the host and does what it says: `E` n echoes n bytes, `S` n sends n, `R` n receives n and then says so.
/// With a third argument it is the first process of a VM, and gives its network card that address.
const PEER: &str = r#"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
static char buffer[1 << 17];
static struct sockaddr_in at(const char *address, int port) {
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, address, &in.sin_addr);
    return in;
}
static void bring_up(const char *address) {
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq r = {0};
    strcpy(r.ifr_name, "eth0");
    struct sockaddr_in in = at(address, 0);
    memcpy(&r.ifr_addr, &in, sizeof in);
    ioctl(s, SIOCSIFADDR, &r);
    in = at("255.255.255.0", 0);
    memcpy(&r.ifr_netmask, &in, sizeof in);
    ioctl(s, SIOCSIFNETMASK, &r);
    r.ifr_flags = IFF_UP | IFF_RUNNING | IFF_BROADCAST | IFF_MULTICAST;
    ioctl(s, SIOCSIFFLAGS, &r);
    close(s);
}
int main(int argc, char **argv) {
    if (argc > 3) bring_up(argv[3]);
    struct sockaddr_in host = at(argv[1], atoi(argv[2]));
    int s, on = 1;
    for (;;) {
        s = socket(AF_INET, SOCK_STREAM, 0);
        if (!connect(s, (void *)&host, sizeof host)) break;
        close(s);
        usleep(50000);
    }
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    char order;
    uint64_t left;
    while (recv(s, &order, 1, 0) == 1 && recv(s, &left, 8, MSG_WAITALL) == 8) {
        while (left) {
            size_t part = left < sizeof buffer ? left : sizeof buffer;
            ssize_t done = order == 'S' ? send(s, buffer, part, 0) : recv(s, buffer, part, 0);
            if (done <= 0) return 1;
            if (order == 'E' && send(s, buffer, done, 0) != done) return 1;
            left -= done;
        }
        if (order == 'R') send(s, "!", 1, 0);
    }
    for (; argc > 3;) pause();
    return 0;
}
"#;

/// One of those that are compared, and what was measured of it.
struct Peer {
    key: &'static str,
    title: &'static str,
    stream: TcpStream,
    received: Sample,
    sent: Sample,
    round_trip: Sample,
}

/// Starts for each round that was asked for. Nine would leave the median of what luck does with 8 % of doubt.
const STARTS: usize = 3;

/// Measures all of them in turns, three values for each start: each start of a VM has luck of its own, for as long as it
/// runs, with where the translator and the kernel put things, a third of its throughput either way.
pub(crate) fn measure(install: &Install, rounds: usize, report: &mut Report) -> Result<()> {
    with_model(Model::TcFilter, |node| {
        let program = compile(node.dir(), "peer", PEER)?;
        let mut all = Vec::new();
        for first in 0..rounds * STARTS {
            let (mut peers, _held) = start(install, node, &program)?;
            let count = peers.len();
            for counts in [false, true, true, true] {
                for turn in first..first + count {
                    // the first finds its way
                    peers[turn % count].measure(counts)?;
                }
            }
            ["runc", "kata"].into_iter().try_for_each(|id| node.remove(id))?;
            all.push(peers);
        }
        let mut all = all.into_iter();
        let mut sums = all.next().unwrap_or_default();
        for peers in all {
            for (sum, peer) in sums.iter_mut().zip(peers) {
                sum.join(&peer);
            }
        }
        for peer in sums {
            peer.report(report);
        }
        Ok(())
    })
}

/// The peers, and what they need for as long as they are measured.
fn start(install: &Install, node: &Node, program: &[u8]) -> Result<(Vec<Peer>, impl Sized)> {
    let mount = format!("type=bind,src={},dst=/peer,options=rbind:ro", node.dir().join("peer").display());
    let mut pods = Vec::new();
    let mut peers = Vec::new();
    for (network, runtime, title) in [(61, Runtime::Runc, "runc"), (62, Runtime::Kata, "kata")] {
        let pod = Pod::make(network, 1500)?;
        let host = format!("10.89.{network}.1");
        let listener = TcpListener::bind((host.as_str(), 0)).context("a port at the bridge")?;
        let port = listener.local_addr()?.port().to_string();
        let namespace = pod.options();
        let options = [namespace[0].as_str(), &namespace[1], "--mount", &mount];
        node.detached(runtime, title, &options, &["/peer", &host, &port])?;
        peers.push(Peer::accept(&listener, title, title)?);
        pods.push(pod);
    }
    let mut raw = Vec::new();
    for (network, key, title, is_joined) in
        [(63, "raw", "raw QEMU, tap joined as kata's", true), (64, "bare", "raw QEMU, tap at the bridge", false)]
    {
        let pod = Pod::bare(network, 1500)?;
        let host = format!("10.89.{network}.1");
        let listener = TcpListener::bind((host.as_str(), 0)).context("a port at the bridge")?;
        let words = format!("{host} {} 10.89.{network}.3", listener.local_addr()?.port());
        let vm = RawVm::start(install, &node.dir().join(key), program, &words, &pod, is_joined)?;
        peers.push(Peer::accept(&listener, key, title).with_context(|| vm.said())?);
        // in this order, so that a VM ends before what its tap is joined to
        raw.push((vm, pod));
    }
    Ok((peers, (raw, pods)))
}

impl Peer {
    fn accept(listener: &TcpListener, key: &'static str, title: &'static str) -> Result<Self> {
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::try_from(PATIENCE)?)? == 0 {
            bail!("{title}: nobody connected within {PATIENCE:?}");
        }
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let (received, sent, round_trip) = (Sample::new(), Sample::new(), Sample::new());
        Ok(Self { key, title, stream, received, sent, round_trip })
    }

    fn order(&mut self, what: u8, count: u64) -> Result<()> {
        let mut order = vec![what];
        order.extend(count.to_le_bytes());
        self.stream.write_all(&order).with_context(|| format!("{}: an order", self.title))
    }

    /// The three values of one round.
    fn measure(&mut self, counts: bool) -> Result<()> {
        let title = self.title;
        let mut buffer = vec![0; 1 << 17];
        let begin = Instant::now();
        self.order(b'S', BYTES)?;
        let mut left = BYTES as usize;
        while left > 0 {
            let part = left.min(buffer.len());
            let got = self.stream.read(&mut buffer[..part]).with_context(|| format!("{title}: receiving"))?;
            if got == 0 {
                bail!("{title}: closed the stream");
            }
            left -= got;
        }
        let received = begin.elapsed();

        let begin = Instant::now();
        self.order(b'R', BYTES)?;
        for _ in 0..BYTES / buffer.len() as u64 {
            self.stream.write_all(&buffer).with_context(|| format!("{title}: sending"))?;
        }
        self.stream.read_exact(&mut buffer[..1]).with_context(|| format!("{title}: its word"))?;
        let sent = begin.elapsed();

        self.order(b'E', ROUND_TRIPS)?;
        let mut trips = Sample::new();
        for _ in 0..ROUND_TRIPS {
            let begin = Instant::now();
            self.stream.write_all(b"?")?;
            self.stream.read_exact(&mut buffer[..1]).with_context(|| format!("{title}: an echo"))?;
            trips.add(begin.elapsed().as_secs_f64() * 1e6);
        }
        if counts {
            let rate = |took: Duration| BYTES as f64 / f64::from(1 << 20) / took.as_secs_f64();
            self.received.add(rate(received));
            self.sent.add(rate(sent));
            self.round_trip.add(trips.median());
        }
        Ok(())
    }

    fn join(&mut self, other: &Self) {
        self.received.join(&other.received);
        self.sent.join(&other.sent);
        self.round_trip.join(&other.round_trip);
    }

    fn report(self, report: &mut Report) {
        let Self { key, title, received, sent, round_trip, .. } = self;
        report.add(&format!("net.out.{key}"), &format!("TCP out of the pod, {title}"), received, "MiB/s");
        report.add(&format!("net.in.{key}"), &format!("TCP into the pod, {title}"), sent, "MiB/s");
        report.add(&format!("net.trip.{key}"), &format!("TCP round trip, {title}"), round_trip, "µs");
    }
}

/// The tap of a bare QEMU.
const TAP: &str = "keraw0";

/// A VM of nothing but the program; goes when dropped, and its tap with it.
struct RawVm {
    process: Child,
    console: PathBuf,
    /// After the process.
    cgroup: Cgroup,
}

impl RawVm {
    /// With its tap in the pod's namespace, joined to a veth by the same filters as the product's, or at the bridge.
    fn start(install: &Install, dir: &Path, program: &[u8], words: &str, pod: &Pod, is_joined: bool) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut archive = Archive::default();
        archive.entry("dev", 0o40755, (0, 0), &[]);
        archive.entry("dev/console", 0o20600, (5, 1), &[]);
        archive.entry("init", 0o100_755, (0, 0), program);
        let (initrd, console) = (dir.join("initrd"), dir.join("console"));
        fs::write(&initrd, archive.finish())?;
        let _ = ip(&format!("link del {TAP}"));
        let place = if is_joined { format!("-n {}", pod.namespace) } else { String::new() };
        ip(&format!("{place} tuntap add dev {TAP} mode tap vnet_hdr"))?;
        ip(&format!("{place} link set {TAP} up"))?;
        let mac = if is_joined { "02:00:00:00:00:63" } else { "02:00:00:00:00:64" };
        let network = format!("tap,id=net0,ifname={TAP},script=no,downscript=no,vhost=off");
        let mut command = if is_joined {
            pod.add_veth("eth0", 1500)?;
            pod.ip("link set eth0 up")?;
            join(&pod.namespace, "eth0", TAP)?;
            join(&pod.namespace, TAP, "eth0")?;
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &pod.namespace, by_hand::QEMU]);
            command
        } else {
            ip(&format!("link set {TAP} master {}", pod.bridge))?;
            Command::new(by_hand::QEMU)
        };
        command
            .args(by_hand::arguments(&by_hand::shared_memory()))
            .args(["-netdev", &network, "-device", &format!("virtio-net-pci,netdev=net0,romfile=,mac={mac}")])
            .args(["-append", &format!("{} -- {words}", by_hand::parameters())])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(install.kernel())
            .arg("-initrd")
            .arg(&initrd)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let cgroup = Cgroup::create(if is_joined { "raw" } else { "bare" })?;
        let process = command.spawn().context(by_hand::QEMU)?;
        let vm = Self { process, console, cgroup };
        vm.cgroup.add(vm.process.id())?;
        Ok(vm)
    }

    /// Its console.
    fn said(&self) -> String {
        fs::read_to_string(&self.console).unwrap_or_default()
    }
}

/// Whatever comes in at `from` goes out at `to`.
fn join(namespace: &str, from: &str, to: &str) -> Result<()> {
    let all = "protocol all u32 match u32 0 0 action mirred egress redirect dev";
    for line in [format!("qdisc add dev {from} ingress"), format!("filter add dev {from} parent ffff: {all} {to}")] {
        Invocation::new("tc", format!("-n {namespace} {line}").split_whitespace()).output()?.ok()?;
    }
    Ok(())
}

impl Drop for RawVm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // one that is joined goes with its namespace
        let _ = ip(&format!("link del {TAP}"));
    }
}
