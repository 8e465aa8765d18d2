//! The calls against a real kernel, in a network namespace of their own; skipped where the machine gives us none.

use agent_api::types::{ARPNeighbor, IPAddress, IPFamily, Route};
use rtnetlink::LinkVeth;

use super::*;

/// Runs `test` in a fresh namespace with one end of a veth, whose MAC address it gets.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Network, String) -> F + Send + 'static) {
    let thread = std::thread::spawn(move || -> Option<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let network = Network::open(Duration::from_millis(300)).expect("netlink");
            let pair = LinkVeth::new("one", "other").up().build();
            network.handle.link().add(pair).execute().await.expect("a veth");
            network.set(LinkUnspec::new_with_name("other").up(), "raising").await.expect("up");
            let links = network.interfaces().await.expect("listed").Interfaces;
            let mac = links.iter().find(|link| link.name == "one").expect("the veth").hwAddr.clone();
            test(network, mac).await;
        });
        Some(())
    });
    if thread.join().expect("ended").is_none() {
        eprintln!("skipped: network namespaces need root");
    }
}

fn ip(text: &str) -> IPAddress {
    let (address, mask) = text.split_once('/').expect("a prefix");
    let family = if address.contains(':') { IPFamily::v6 } else { IPFamily::v4 };
    IPAddress { family: family.into(), address: address.into(), mask: mask.into(), ..Default::default() }
}

fn interface(mac: &str, name: &str, addresses: &[&str]) -> Interface {
    Interface {
        name: name.into(),
        hwAddr: mac.into(),
        mtu: 1400,
        IPAddresses: addresses.iter().map(|text| ip(text)).collect(),
        ..Default::default()
    }
}

/// The interface's addresses, but those that the kernel makes.
async fn addresses(network: &Network, name: &str) -> Vec<String> {
    let all = network.interfaces().await.expect("listed").Interfaces;
    let own = all.into_iter().find(|link| link.name == name).expect("the interface");
    let text = |one: &IPAddress| format!("{}/{}", one.address, one.mask);
    let mut all: Vec<_> = own.IPAddresses.iter().map(text).filter(|text| !text.starts_with("fe80")).collect();
    all.sort();
    all
}

fn route(dest: &str, gateway: &str) -> Route {
    let family = if gateway.contains(':') { IPFamily::v6 } else { IPFamily::v4 };
    Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: "eth0".into(),
        family: family.into(),
        ..Default::default()
    }
}

async fn routes(network: &Network) -> Vec<String> {
    let all = network.routes().await.expect("listed").Routes;
    let mut all: Vec<_> = all.iter().map(|one| format!("{} via {}", one.dest, one.gateway)).collect();
    all.sort();
    all
}

fn wanted(all: &[(&str, &str)]) -> api::Routes {
    api::Routes { Routes: all.iter().map(|(dest, gateway)| route(dest, gateway)).collect(), ..Default::default() }
}

#[test]
fn an_interface_gets_what_is_said_and_keeps_nothing_else() {
    in_namespace(|network, mac| async move {
        let update = |name: &'static str, addresses: &'static [&'static str]| {
            network.update_interface(interface(&mac, name, addresses))
        };
        update("eth0", &["10.0.0.2/24", "10.0.0.3/24", "fd00::2/64"]).await.expect("set");
        assert_eq!(addresses(&network, "eth0").await, ["10.0.0.2/24", "10.0.0.3/24", "fd00::2/64"]);
        // the first of the subnet goes, and the kernel would take the second one with it
        update("eth0", &["10.0.0.3/24", "10.7.0.1/32", "fd00::3/64"]).await.expect("set");
        assert_eq!(addresses(&network, "eth0").await, ["10.0.0.3/24", "10.7.0.1/32", "fd00::3/64"]);
        update("net1", &[]).await.expect("set");
        assert_eq!(addresses(&network, "net1").await, Vec::<String>::new());
        let shown = network.interfaces().await.expect("listed").Interfaces;
        let shown = shown.iter().find(|one| one.name == "net1").expect("renamed");
        assert_eq!((shown.mtu, shown.raw_flags), (1400, 0));
        let quiet = Interface { raw_flags: libc::IFF_NOARP as u32, ..interface(&mac, "net1", &[]) };
        network.update_interface(quiet.clone()).await.expect("set");
        let shown = network.interfaces().await.expect("listed").Interfaces;
        assert_eq!(shown.iter().find(|one| one.name == "net1").expect("it").raw_flags, quiet.raw_flags);
    });
}

#[test]
fn an_interface_that_does_not_come_is_waited_for() {
    in_namespace(|network, _| async move {
        let later = interface("02:00:00:00:00:77", "eth0", &[]);
        let error = network.update_interface(later.clone()).await.expect_err("nothing comes");
        assert!(error.to_string().contains("02:00:00:00:00:77"), "{error}");
        let handle = network.handle.clone();
        let plugged = async {
            tokio::task::yield_now().await;
            let pair = LinkVeth::new("two", "peer").address(vec![2, 0, 0, 0, 0, 0x77]).build();
            handle.link().add(pair).execute().await.expect("a veth");
        };
        let (found, ()) = tokio::join!(network.update_interface(later), plugged);
        assert_eq!(found.expect("found").name, "eth0");
    });
}

#[test]
fn routes_are_these_and_no_others() {
    in_namespace(|network, mac| async move {
        network.update_interface(interface(&mac, "eth0", &["10.0.0.2/24", "fd00::2/64"])).await.expect("set");
        let all = [("", "10.0.0.1"), ("10.1.0.0/16", "10.0.0.1"), ("", "fd00::1"), ("10.0.9.0/24", "")];
        network.update_routes(wanted(&all)).await.expect("set");
        let shown = [" via 10.0.0.1", " via fd00::1", "10.0.9.0/24 via ", "10.1.0.0/16 via 10.0.0.1"];
        assert_eq!(routes(&network).await, shown);
        // one cannot be made, one is over nothing: the others are made, and what is not named goes
        let mut some = wanted(&[("10.2.0.0/16", "192.0.2.1"), ("10.3.0.0/16", "10.0.0.1"), ("", "fd00::1")]);
        some.Routes.push(Route { device: "nothing".into(), ..route("10.4.0.0/16", "10.0.0.1") });
        let error = network.update_routes(some).await.expect_err("two cannot be").to_string();
        assert!(error.contains("nothing") && error.contains("1 more"), "{error}");
        assert_eq!(routes(&network).await, [" via fd00::1", "10.3.0.0/16 via 10.0.0.1"]);
        network.update_routes(wanted(&[])).await.expect("none");
        assert_eq!(routes(&network).await, Vec::<String>::new());
        // those of the addresses stay
        network.update_routes(wanted(&[("10.5.0.0/16", "10.0.0.1")])).await.expect("the subnet is still reached");
    });
}

#[test]
fn neighbours_come_and_go() {
    in_namespace(|network, mac| async move {
        network.update_interface(interface(&mac, "eth0", &["10.0.0.2/24"])).await.expect("set");
        let neighbour = |address: &str, state: i32| ARPNeighbor {
            toIPAddress: Some(ip(address)).into(),
            device: "eth0".into(),
            lladdr: "02:00:00:00:00:01".into(),
            state,
            ..Default::default()
        };
        let list = |all: Vec<ARPNeighbor>| api::ARPNeighbors { ARPNeighbors: all, ..Default::default() };
        let (permanent, failed) = (0x80, 0x20);
        let count = || async {
            let all: Vec<_> = network.handle.neighbours().get().execute().try_collect().await.expect("listed");
            all.iter().filter(|one| u16::from(one.header.state) == permanent as u16).count()
        };
        let both = vec![neighbour("10.0.0.5/32", permanent), neighbour("10.0.0.6/32", permanent)];
        network.update_neighbours(list(both)).await.expect("set");
        assert_eq!(count().await, 2);
        let gone = vec![neighbour("10.0.0.5/32", failed), neighbour("10.0.0.7/32", failed)];
        network.update_neighbours(list(gone)).await.expect("one was never there");
        assert_eq!(count().await, 1);
        let bad = ARPNeighbor { device: "nothing".into(), ..neighbour("10.0.0.8/32", permanent) };
        let some = vec![bad, neighbour("10.0.0.9/32", permanent)];
        network.update_neighbours(list(some)).await.expect_err("one cannot be");
        assert_eq!(count().await, 2);
    });
}
