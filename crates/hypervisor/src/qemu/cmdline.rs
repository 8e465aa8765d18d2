//! The QEMU command line, as a pure function of what the VM is made of.

use std::os::fd::{AsRawFd, RawFd};

use super::QemuSettings;
use super::accelerator::Accelerator;
use crate::{Channel, VmSpec};

/// What the child inherits: the kernel and its ends of the sockets that the driver made.
#[derive(Debug, Clone)]
pub(super) struct Inherited {
    /// The rate of the guest's time stamp counter, where only the host knows it.
    pub(super) tsc_khz: Option<u64>,
    pub(super) kernel: String,
    pub(super) qmp: RawFd,
    pub(super) console: RawFd,
    pub(super) channel: Option<RawFd>,
}

/// Kernel parameters that every guest of ours gets.
///
/// `panic=-1`: a panic resets at once, and QEMU ends on a reset (`-no-reboot`): that is how the host learns of it.
/// `no_timer_check` and `tsc=reliable`: emulated timers are what they say, checking them costs tens of milliseconds.
/// `cryptomgr.notests`, `rcupdate.rcu_expedited=1`, `i8042.*`, `net.ifnames`: as Kata's guests boot.
const KERNEL_PARAMS: &str = "console=ttyS0 panic=-1 reboot=t no_timer_check tsc=reliable \
    rcupdate.rcu_expedited=1 cryptomgr.notests noreplace-smp pci=lastbus=0 net.ifnames=0 random.trust_cpu=on";

/// All arguments after the program's name.
pub(super) fn arguments(
    settings: &QemuSettings,
    accelerator: Accelerator,
    spec: &VmSpec,
    inherited: &Inherited,
) -> Vec<String> {
    let mut args = Args(Vec::with_capacity(64));
    let size = spec.size;
    // the translator has no deadline timer, so the kernel would measure the local timer for 100 ms; one processor does as
    // well with the machine's own, and that sleeps longer than the old one
    let no_local_timer = accelerator == Accelerator::Tcg && size.vcpus == 1;
    args.pair("-name", format!("kata-{},debug-threads=on", escape(&spec.id)));
    args.pair(
        "-machine",
        format!(
            "{},memory-backend=mem,hpet={},sata=off,smbus=off,usb=off,vmport=off,graphics=off,i8042=off",
            settings.machine,
            if no_local_timer { "on" } else { "off" },
        ),
    );
    match accelerator {
        Accelerator::Kvm => args.pair("-accel", "kvm"),
        Accelerator::Tcg if settings.tcg_buffer_mib > 0 => {
            args.pair("-accel", format!("tcg,tb-size={}", settings.tcg_buffer_mib));
        }
        Accelerator::Tcg => args.pair("-accel", "tcg"),
    }
    let model = accelerator.cpu_model();
    match settings.cpu_features.trim_matches(',') {
        "" => args.pair("-cpu", model),
        features => args.pair("-cpu", format!("{model},{features}")),
    }
    args.pair("-smp", size.vcpus.to_string());
    args.pair("-m", format!("{}M", size.memory_mib));
    args.pair("-object", format!("memory-backend-memfd,id=mem,size={}M,share=on", size.memory_mib));
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        args.0.push(flag.to_owned());
    }
    args.pair("-display", "none");
    if let Some(firmware) = &settings.firmware {
        args.pair("-bios", firmware.to_string_lossy());
    }
    if !settings.seccomp_sandbox.is_empty() {
        args.pair("-sandbox", settings.seccomp_sandbox.clone());
    }

    // these take their value as it is
    args.pair("-kernel", inherited.kernel.clone());
    args.pair("-initrd", spec.boot.initrd.to_string_lossy());
    let quiet = if spec.debug { "" } else { " quiet" };
    let timer = if no_local_timer { " noapictimer" } else { "" };
    let tsc = inherited.tsc_khz.map(|rate| format!(" tsc_early_khz={rate}")).unwrap_or_default();
    args.pair(
        "-append",
        format!("{KERNEL_PARAMS}{timer}{tsc}{quiet} nr_cpus={} {}", size.vcpus, spec.boot.kernel_params),
    );

    args.pair("-chardev", format!("socket,id=qmp,fd={}", inherited.qmp));
    args.pair("-mon", "chardev=qmp,mode=control");
    args.pair("-chardev", format!("socket,id=console,fd={}", inherited.console));
    args.pair("-serial", "chardev:console");

    args.pair("-object", format!("rng-random,id=entropy,filename={}", escape(&spec.entropy_source.to_string_lossy())));
    args.pair("-device", "virtio-rng-pci,rng=entropy");
    match &spec.channel {
        Channel::Serial { port } => {
            if let Some(fd) = inherited.channel {
                args.pair("-chardev", format!("socket,id=agent,fd={fd}"));
                args.pair("-device", "virtio-serial-pci,max_ports=2");
                args.pair("-device", format!("virtserialport,chardev=agent,name={}", escape(port)));
            }
        }
        Channel::Vsock { vhost, cid } => {
            args.pair("-device", format!("vhost-vsock-pci,vhostfd={},guest-cid={cid}", vhost.as_raw_fd()));
        }
    }
    for (index, dir) in spec.shared_dirs.iter().enumerate() {
        args.pair("-chardev", format!("socket,id=fs{index},fd={}", dir.socket.as_raw_fd()));
        args.pair(
            "-device",
            format!("vhost-user-fs-pci,chardev=fs{index},tag={},queue-size={}", escape(dir.tag), dir.queue_size),
        );
    }
    for (index, card) in spec.network.iter().enumerate() {
        let fds: Vec<_> = card.queues.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        let (fds, queues) = match fds.as_slice() {
            [one] => (format!("fd={one}"), String::new()),
            // two vectors a pair of queues, one for control, one for configuration
            several => (format!("fds={}", several.join(":")), format!(",mq=on,vectors={}", 2 * several.len() + 2)),
        };
        args.pair("-netdev", format!("tap,id=net{index},{fds}"));
        // no boot from the network, so no ROM
        args.pair("-device", format!("virtio-net-pci,netdev=net{index},mac={},romfile={queues}", escape(&card.mac)));
    }
    args.0
}

struct Args(Vec<String>);

impl Args {
    fn pair(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }
}

/// In QEMU's option lists a comma is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Boot, Size};

    fn spec(memory_mib: u64) -> VmSpec {
        VmSpec {
            id: "pod,1".into(),
            boot: Boot { kernel: "/k,x".into(), initrd: "/i,x".into(), kernel_params: "agent.log=debug".into() },
            size: Size { vcpus: 2, memory_mib },
            channel: Channel::Serial { port: "agent.0" },
            shared_dirs: Vec::new(),
            network: Vec::new(),
            entropy_source: "/dev/urandom".into(),
            debug: false,
        }
    }

    #[test]
    fn is_what_the_spec_says() {
        let settings = QemuSettings { tcg_buffer_mib: 32, cpu_features: "pmu=off".into(), ..QemuSettings::default() };
        let inherited = Inherited {
            tsc_khz: Some(2_000_000),
            kernel: "/proc/self/fd/6".into(),
            qmp: 3,
            console: 4,
            channel: Some(5),
        };
        let line = arguments(&settings, Accelerator::Tcg, &spec(512), &inherited).join(" ");
        for part in [
            "-name kata-pod,,1,debug-threads=on",
            "-accel tcg,tb-size=32",
            "-cpu max,pmu=off",
            "-m 512M",
            "size=512M,share=on",
            "-kernel /proc/self/fd/6",
            "-initrd /i,x ",
            "-smp 2",
            "socket,id=agent,fd=5",
            "tsc_early_khz=2000000 quiet nr_cpus=2 agent.log=debug",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
    }
}
