//! What passes through a pod's network: bytes a second through one TCP stream, and the time of a round trip, from and to
//! the host's bridge. Beside runc, and beside a bare QEMU that has its tap at a bridge of the same kind.

use crate::{floor, initrd::Archive, report::Report, sample::Sample};
use anyhow::{Context as _, Result, bail};
use e2e::{
    Runtime,
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
    path::Path,
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

/// Measures all of them in turns.
pub(crate) fn measure(install: &Install, rounds: usize, report: &mut Report) -> Result<()> {
    with_model(Model::TcFilter, |node| {
        let program = compile(node.dir(), "peer", PEER)?;
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
        let bridge = Pod::bare(63, 1500)?;
        let host = "10.89.63.1";
        let listener = TcpListener::bind((host, 0)).context("a port at the bridge")?;
        let words = format!("{host} {} 10.89.63.3", listener.local_addr()?.port());
        let raw = RawVm::start(install, node.dir(), &program, &words, &bridge)?;
        peers.push(Peer::accept(&listener, "raw", "raw QEMU, the same device").with_context(|| raw.said())?);
        for round in 0..=rounds {
            for peer in &mut peers {
                peer.measure(round > 0)?;
            }
        }
        for peer in peers {
            peer.report(report);
        }
        ["runc", "kata"].into_iter().try_for_each(|id| node.remove(id))
    })
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

    fn report(self, report: &mut Report) {
        let Self { key, title, received, sent, round_trip, .. } = self;
        report.add(&format!("net.out.{key}"), &format!("TCP out of the pod, {title}"), received, "MiB/s");
        report.add(&format!("net.in.{key}"), &format!("TCP into the pod, {title}"), sent, "MiB/s");
        report.add(&format!("net.trip.{key}"), &format!("TCP round trip, {title}"), round_trip, "µs");
    }
}

/// A VM of nothing but the program; goes when dropped, with its tap.
struct RawVm {
    process: Child,
    console: std::path::PathBuf,
    tap: &'static str,
}

impl RawVm {
    fn start(install: &Install, dir: &Path, program: &[u8], words: &str, bridge: &Pod) -> Result<Self> {
        let mut archive = Archive::default();
        archive.entry("dev", 0o40755, (0, 0), &[]);
        archive.entry("dev/console", 0o20600, (5, 1), &[]);
        archive.entry("init", 0o100_755, (0, 0), program);
        let (initrd, console, tap) = (dir.join("raw-initrd"), dir.join("raw-console"), "kebraw");
        fs::write(&initrd, archive.finish())?;
        let _ = ip(&format!("link del {tap}"));
        ip(&format!("tuntap add dev {tap} mode tap vnet_hdr"))?;
        let network = format!("tap,id=net0,ifname={tap},script=no,downscript=no,vhost=off");
        let device = "virtio-net-pci,netdev=net0,romfile=,mac=02:00:00:00:00:63";
        let process = Command::new("qemu-system-x86_64")
            .args([
                "-machine",
                floor::MACHINE,
                "-accel",
                floor::accelerator(),
                "-cpu",
                "max",
                "-smp",
                "1",
                "-m",
                "2048",
            ])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-netdev", &network, "-device", device])
            .args(["-append", &format!("{} -- {words}", floor::PARAMETERS)])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(install.kernel())
            .arg("-initrd")
            .arg(&initrd)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("qemu-system-x86_64")?;
        // from here on, what fails ends it
        let vm = Self { process, console, tap };
        Invocation::new("ip", ["link", "set", tap, "master", &bridge.bridge, "up"]).output()?.ok()?;
        Ok(vm)
    }

    /// Its console.
    fn said(&self) -> String {
        fs::read_to_string(&self.console).unwrap_or_default()
    }
}

impl Drop for RawVm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = ip(&format!("link del {}", self.tap));
    }
}
