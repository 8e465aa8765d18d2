//! The agent's channel over the kernel's vsock, on a host that has it: `make nested` is one.
//!
//! Ignored elsewhere; that the other channel is taken there, and what is said where vsock is demanded, is not.

use agent_api::{
    agent::GuestDetailsRequest, agent_ttrpc::AgentServiceClient, health::CheckRequest,
    health::health_check_response::ServingStatus, health_ttrpc::HealthClient, ports, ttrpc,
};
use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::{Node, NodeSetup, Runtime, install::Install, processes, with_node_setup};
use nix::sys::{
    socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, setsockopt, socket, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike as _},
};
use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    os::fd::AsRawFd as _,
    path::Path,
    time::Duration,
};

const DEVICE: &str = "/dev/vhost-vsock";
const LIMIT: Duration = Duration::from_secs(60);

/// A node whose configuration has these settings beside the installed ones.
fn with_settings(settings: &[(&str, &str, &str)], test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let mut table = Install::locate()?.config_table()?;
    for (section, key, value) in settings {
        let mut inner = &mut table;
        for part in section.split('.') {
            let entry = inner.entry(part).or_insert_with(|| toml::Table::new().into());
            inner = entry.as_table_mut().with_context(|| format!("{section} is no table"))?;
        }
        inner.insert((*key).to_owned(), format!("x = {value}").parse::<toml::Table>()?["x"].clone());
    }
    with_node_setup(NodeSetup { config: Some(table.to_string()), ..NodeSetup::default() }, test)
}

/// QEMU's arguments for the container's channel, and whether something runs in the container.
fn channel_of(node: &Node, id: &str) -> Result<String> {
    node.detached(Runtime::Kata, id, &[], &["sleep", "1000"])?;
    let qemu = processes::wait_for(node.tag(), "qemu-system", LIMIT)?;
    let said = node.exec(id, "first", &[], &["echo", "alive"]).output()?.ok()?.text();
    ensure!(said == "alive", "{said:?}");
    Ok(qemu.command)
}

/// The guest's address.
fn cid_of(command: &str) -> Result<u32> {
    let (_, rest) = command.split_once("guest-cid=").with_context(|| format!("no vsock: {command}"))?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().with_context(|| format!("guest-cid={rest}"))
}

#[test]
#[ignore = "needs /dev/vhost-vsock: make nested"]
fn it_is_taken_where_the_host_has_it() -> Result<()> {
    with_settings(&[], |node| {
        let first = cid_of(&channel_of(node, "one")?)?;
        node.remove("one")?;
        let second = cid_of(&channel_of(node, "two")?)?;
        node.remove("two")?;
        ensure!(first > 2 && second > 2 && first != second, "addresses {first} and {second}");
        Ok(())
    })
}

#[test]
#[ignore = "needs /dev/vhost-vsock: make nested"]
fn the_configuration_decides() -> Result<()> {
    with_settings(&[("agent.kata", "agent_channel", "\"serial\"")], |node| {
        let command = channel_of(node, "serial")?;
        ensure!(command.contains("virtserialport") && !command.contains("vsock"), "{command}");
        node.remove("serial")
    })?;
    with_settings(&[("agent.kata", "agent_channel", "\"vsock\"")], |node| {
        let command = channel_of(node, "vsock")?;
        ensure!(command.contains("vhost-vsock-pci") && !command.contains("virtserialport"), "{command}");
        node.remove("vsock")
    })
}

/// As those of Kata's guest images: they listen, and that is all.
#[test]
#[ignore = "needs /dev/vhost-vsock: make nested"]
fn an_agent_that_does_not_report_is_found() -> Result<()> {
    for log in ["false", "true"] {
        let settings = [
            ("hypervisor.qemu", "kernel_params", "\"agent.ready_vport=0\""),
            // with it the console says what happens, without it it says nothing
            ("agent.kata", "enable_debug", log),
        ];
        with_settings(&settings, |node| {
            cid_of(&channel_of(node, "quiet")?)?;
            node.remove("quiet")
        })?;
    }
    Ok(())
}

/// Whoever is on the host may call: the ports and the words are Kata's.
#[test]
#[ignore = "needs /dev/vhost-vsock: make nested"]
fn the_agents_ports_are_katas() -> Result<()> {
    let settings =
        [("hypervisor.qemu", "kernel_params", "\"agent.log_vport=1025\""), ("agent.kata", "enable_debug", "true")];
    with_settings(&settings, |node| {
        let cid = cid_of(&channel_of(node, "ports")?)?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(calls(cid))?;
        let log = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        connect(log.as_raw_fd(), &VsockAddr::new(cid, ports::LOG_VSOCK)).context("the log port")?;
        setsockopt(&log, ReceiveTimeout, &TimeVal::seconds(60))?;
        let mut line = String::new();
        BufReader::new(File::from(log)).read_line(&mut line)?;
        ensure!(line == "agent: debug: serving\n", "{line:?}");
        node.remove("ports")
    })
}

async fn calls(cid: u32) -> Result<()> {
    let said = |error: ttrpc::Error| anyhow!("{error}");
    let client = ttrpc::r#async::Client::connect(&format!("vsock://{cid}:{}", ports::AGENT_VSOCK)).await;
    let client = client.map_err(said)?;
    let context = || ttrpc::context::with_duration(LIMIT);
    let health = HealthClient::new(client.clone()).check(context(), &CheckRequest::default()).await.map_err(said)?;
    ensure!(health.status == ServingStatus::SERVING.into(), "{health:?}");
    let request = GuestDetailsRequest { mem_block_size: true, ..Default::default() };
    let details = AgentServiceClient::new(client).get_guest_details(context(), &request).await.map_err(said)?;
    let handlers = &details.agent_details.storage_handlers;
    ensure!(handlers.iter().any(|name| name == "virtio-fs"), "{details:?}");
    ensure!(details.mem_block_size_bytes.is_power_of_two(), "{details:?}");
    Ok(())
}

/// With both, what runs a container elsewhere in the world is run here.
#[test]
#[ignore = "needs KVM and /dev/vhost-vsock: make nested"]
fn under_kvm() -> Result<()> {
    with_settings(&[("hypervisor.qemu", "accelerator", "\"kvm\"")], |node| {
        let command = channel_of(node, "kvm")?;
        ensure!(command.contains("-accel kvm") && command.contains("vhost-vsock-pci"), "{command}");
        node.remove("kvm")
    })
}

#[test]
fn without_it_the_serial_port_is_taken_or_the_reason_is_told() -> Result<()> {
    if Path::new(DEVICE).exists() {
        // the others here are for such a host
        return Ok(());
    }
    with_settings(&[], |node| {
        let command = channel_of(node, "auto")?;
        ensure!(command.contains("virtserialport") && !command.contains("vsock"), "{command}");
        node.remove("auto")
    })?;
    with_settings(&[("agent.kata", "agent_channel", "\"vsock\"")], |node| {
        let refused = node.run(Runtime::Kata, "demanded", &[], &["true"]).output()?;
        for part in ["agent_channel = \"vsock\" is set", DEVICE, "No such file", "modprobe vhost_vsock", "\"serial\""] {
            ensure!(refused.stderr.contains(part), "{part:?} is not in {}", refused.stderr);
        }
        Ok(())
    })
}
