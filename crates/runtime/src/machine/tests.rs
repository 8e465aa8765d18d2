//! The bring-up with machines that come, do not come, or end.

use std::path::Path;
use std::sync::Mutex;

use async_trait::async_trait;
use hypervisor::{Device, HostDevice, NetDevice, Size, Vm};

use super::fake::{Fake, Guest};
use super::{Env, HostPart, Machine, Origin, Request, bring_up, template};
use crate::Error;
use crate::cleanup::RunDir;
use crate::storage::share::Share;
use crate::trace::Trace;

/// Counts, and fails when it is told to.
#[derive(Default)]
struct Host {
    made: Mutex<usize>,
    fails: bool,
}

#[async_trait]
impl HostPart for Host {
    type Made = usize;

    async fn make(&self, _share: &Share, _vm: &dyn Vm, _run: &mut RunDir) -> Result<usize, Error> {
        let mut made = self.made.lock().expect("whole");
        *made += 1;
        if self.fails { Err(Error::Invalid("no rootfs".into())) } else { Ok(*made) }
    }

    async fn take_back(&self, _made: usize, _share: &Share) {
        panic!("the folder is the same for all");
    }
}

struct Tried {
    outcome: Result<Machine<usize>, Error>,
    /// Of each VM that was started: it was a clone.
    launched: Vec<bool>,
    made: usize,
    templates: usize,
}

/// Brings a machine up, where there is a template or none.
async fn tried(fake: Fake, has_template: bool, host: Host, devices: Vec<Device>) -> Tried {
    let folder = tempfile::tempdir().expect("a folder");
    let (templates, launched) = (folder.path().join("templates"), fake.launched.clone());
    let text = format!(
        "[hypervisor.qemu]\nkernel = \"/k\"\ninitrd = \"/i\"\nshared_fs = \"none\"\n[agent.kata]\ndial_timeout = 1\n\
         [factory]\nenable_template = true\nmake_template_on_demand = false\ntemplate_path = {templates:?}\n"
    );
    let config = config::Config::parse(&text, Path::new("/c")).expect("right");
    let size = Size { vcpus: 1, memory_mib: 128 };
    if has_template {
        template::put(&templates, Fake::FINGERPRINT, size);
    }
    let env = Env { config, hypervisor: Box::new(fake) };
    let request = Request {
        env: &env,
        id: "pod".into(),
        size,
        devices,
        is_changing: true,
        channel: config::AgentChannel::Auto,
        cgroup: None,
        from_pool: true,
        keeps_channel: false,
    };
    let mut run = RunDir::create(&folder.path().join("run"), Path::new("/")).expect("made");
    let outcome = bring_up(&request, &mut run, &Trace::default(), &host).await;
    let left = template::Store::new(&templates).list().expect("listed").len();
    run.undo().expect("undone");
    let launched = launched.lock().expect("whole").clone();
    Tried { outcome, launched, made: host.made.into_inner().expect("whole"), templates: left }
}

fn error(tried: Tried) -> String {
    tried.outcome.err().expect("it fails").to_string()
}

#[tokio::test]
async fn without_a_template_it_boots() {
    let tried = tried(Fake::new([Guest::Boots]), false, Host::default(), Vec::new()).await;
    assert_eq!((tried.launched, tried.made), (vec![false], 1));
    assert_eq!(tried.outcome.expect("up").origin, Origin::Boot);
}

#[tokio::test]
async fn a_clone_that_does_not_answer_costs_its_template_and_the_machine_boots_with_what_was_made() {
    for guest in [Guest::Silent, Guest::Dies] {
        let tried = tried(Fake::new([guest, Guest::Boots]), true, Host::default(), Vec::new()).await;
        assert_eq!((tried.launched, tried.templates), (vec![true, false], 0), "{guest:?}");
        let machine = tried.outcome.expect("up");
        assert_eq!((machine.origin, machine.made, tried.made), (Origin::Boot, 1, 1), "{guest:?}");
    }
}

#[tokio::test]
async fn a_driver_that_cannot_save_boots_and_keeps_what_others_saved() {
    let mut fake = Fake::new([Guest::Boots]);
    fake.capabilities.snapshots = None;
    let tried = tried(fake, true, Host::default(), Vec::new()).await;
    assert_eq!((tried.launched, tried.templates), (vec![false], 1));
}

#[tokio::test]
async fn a_boot_that_fails_is_the_end() {
    let failed = tried(Fake::new([Guest::Dies]), false, Host::default(), Vec::new()).await;
    let words = error(failed);
    assert!(words.contains("fake ended"), "{words}");
    let words = error(tried(Fake::new([Guest::Silent]), false, Host::default(), Vec::new()).await);
    assert!(words.contains("within 1s"), "{words}");
}

#[tokio::test]
async fn the_hosts_part_that_fails_ends_it_and_keeps_the_template() {
    let host = Host { fails: true, ..Host::default() };
    let failed = tried(Fake::new([Guest::Silent]), true, host, Vec::new()).await;
    assert_eq!((failed.launched.as_slice(), failed.templates), ([true].as_slice(), 1));
    assert_eq!(error(failed), "no rootfs");
}

#[tokio::test]
async fn a_device_that_the_driver_does_not_have_is_refused_before_anything_runs() {
    let device = Device::Host(HostDevice { id: "net1".into(), address: "0000:3b:02.1".into() });
    let refused = tried(Fake::new([]), false, Host::default(), vec![device]).await;
    assert_eq!(refused.launched, Vec::<bool>::new());
    assert!(error(refused).contains("hypervisor fake has no support for device of the host net1"));
    let card = NetDevice { id: "net1".into(), mac: "m".into(), queues: Vec::new(), vhost: Vec::new() };
    let booted = tried(Fake::new([Guest::Boots]), false, Host::default(), vec![Device::Net(card)]).await;
    booted.outcome.map(drop).expect("cards are had");
}
