//! Whether a guest really runs under KVM: one is booted until it speaks.
//!
//! A guest that knows how says hello on a serial port ([`crate::Hello`]). Others do not know that port, so a guest that has
//! reached its first process and is still there some time later counts too. The kernel tells its steps on the console: slowness is no sign
//! of a broken KVM (it may be one in a virtual machine), silence is.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::{Accelerator, Qemu, stream};
use crate::{Boot, Channel, Console, Size, Vm, VmSpec};

/// How long a guest may say nothing.
const SILENCE: Duration = Duration::from_secs(5);
/// How long it may take however much it says.
const LIMIT: Duration = Duration::from_secs(60);
/// The serial port of a guest that says nothing there.
const PORT: &str = "probe.0";
/// The end of what Linux says before its first process, with any name and at `loglevel=7`.
const USER_SPACE: &str = " as init process";

/// Boots the configured guest under KVM.
pub(super) async fn try_kvm(qemu: &Qemu, boot: &Boot) -> Result<(), String> {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm cannot be opened ({error})"))?;
    let (port, hello) = boot.hello.as_ref().map_or((PORT, ""), |hello| (hello.port, hello.kernel_params.as_str()));
    let spec = VmSpec {
        begin: crate::Begin::Boot,
        id: "kvm-probe".into(),
        boot: Boot { kernel_params: format!("{} {hello} loglevel=7", boot.kernel_params), ..boot.clone() },
        size: Size { vcpus: 1, memory_mib: 256 },
        channel: Channel::Serial { port },
        shared_dirs: Vec::new(),
        devices: Vec::new(),
        pluggable: false,
        reclaim: false,
        merge: false,
        entropy_source: "/dev/urandom".into(),
        debug: false,
    };
    let mut vm = qemu.start(spec, Accelerator::Kvm).await.map_err(|error| error.to_string())?;
    let channel = vm.take_channel().ok_or("no channel")?;
    let channel = stream(channel).map_err(|error| error.to_string())?;
    let seen = watch(channel, vm.console()).await;
    if let Err(error) = vm.stop(Duration::ZERO).await {
        tracing::warn!(%error, "cannot stop the VM of the KVM probe");
    }
    let exit = vm.exit().borrow().clone();
    match (seen, exit) {
        (Seen::Running, _) => Ok(()),
        (Seen::Silent, _) => Err(format!("a guest printed nothing within {SILENCE:?} under KVM")),
        (Seen::Ended, Some(exit)) => {
            Err(format!("a guest does not run under KVM: {}", exit.to_string().replace('\n', "; ")))
        }
        (Seen::Ended, None) => Err("a guest exited at once under KVM".into()),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// Its agent spoke, or its first process is there to stay.
    Running,
    /// It does nothing.
    Silent,
    /// Its channel closed: the VMM is gone.
    Ended,
}

/// Follows a guest until it is known what becomes of it.
async fn watch(mut channel: impl AsyncRead + Unpin, console: &Console) -> Seen {
    let mut byte = [0];
    let followed = async {
        loop {
            let spoken = console.spoken();
            tokio::select! {
                biased;
                hello = channel.read(&mut byte) => return Some(matches!(hello, Ok(1))),
                () = spoken => {}
                () = tokio::time::sleep(SILENCE) => return None,
            }
        }
    };
    match tokio::time::timeout(LIMIT, followed).await {
        Ok(Some(true)) => Seen::Running,
        Ok(Some(false)) => Seen::Ended,
        Ok(None) | Err(_) if console.said(USER_SPACE) => Seen::Running,
        Ok(None) | Err(_) => Seen::Silent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
    use tokio::net::UnixStream;
    use tokio::time::{Instant, sleep};

    /// What is seen of a guest, and after how long.
    async fn seen<F: Future<Output = DuplexStream>>(guest: impl FnOnce(DuplexStream, UnixStream) -> F) -> (Seen, u64) {
        let (channel, guest_channel) = duplex(64);
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let console = Console::default();
        tokio::spawn(console.clone().follow(ours, false));
        let from = Instant::now();
        let watched = async { (watch(channel, &console).await, from.elapsed().as_secs()) };
        // what the guest keeps open stays open until the end
        let (seen, _kept) = tokio::join!(watched, guest(guest_channel, theirs));
        seen
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_guest_runs_and_a_silent_one_does_not() {
        let slow = seen(|mut channel, mut console| async move {
            for step in 0..10 {
                sleep(SILENCE * 4 / 5).await;
                console.write_all(format!("step {step}\n").as_bytes()).await.expect("written");
            }
            channel.write_all(b"K").await.expect("written");
            channel
        });
        assert_eq!(slow.await, (Seen::Running, 40));
        let hangs = seen(|channel, mut console| async move {
            console.write_all(b"Linux version 6\n").await.expect("written");
            channel
        });
        assert_eq!(hangs.await, (Seen::Silent, 5));
        let raves = seen(|channel, mut console| async move {
            for _ in 0..LIMIT.as_secs() + 10 {
                console.write_all(b"?").await.expect("written");
                sleep(Duration::from_secs(1)).await;
            }
            channel
        });
        assert_eq!(raves.await, (Seen::Silent, LIMIT.as_secs()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_of_others_runs_when_it_stays() {
        let stays = seen(|channel, mut console| async move {
            console.write_all(b"[ 1.0] Run /sbin/init as init process\n").await.expect("written");
            channel
        });
        assert_eq!(stays.await, (Seen::Running, 5));
        let dies = seen(|channel, mut console| async move {
            console.write_all(b"[ 1.0] Run /init as init process\nKernel panic\n").await.expect("written");
            sleep(Duration::from_secs(1)).await;
            drop(channel);
            duplex(1).0
        });
        assert_eq!(dies.await, (Seen::Ended, 1));
    }
}
