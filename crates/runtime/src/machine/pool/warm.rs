//! A container's life, once, before there is a pod: what the guest runs for the first time costs many times as much where its
//! instructions are translated first, and some everywhere, since nothing is in a cache.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use agent_api::agent as api;
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Spec;

use crate::agent_client::AgentClient;
use crate::container::{create, spec};
use crate::storage::share::{Share, guest_path};
use crate::{ContainerId, Error};

/// The container's name; no pod can have it, which has a pod's folder of its own anyway.
const NAME: &str = "warm-up";
const PROGRAM: &str = "true";

/// Runs a container from the shared folder to its end, and takes it away.
pub(super) async fn up(agent: &AgentClient, share: &Share) -> Result<(), Error> {
    let lived = live(agent, share).await;
    create::release(share.folder(), &[NAME.to_owned()]);
    lived
}

async fn live(agent: &AgentClient, share: &Share) -> Result<(), Error> {
    let root = format!("{NAME}/rootfs");
    let at = share.folder().host_path(&root);
    let failed = || Error::host(at.display().to_string());
    fs::create_dir_all(&at).map_err(failed())?;
    // a mount of its own, as a pod's has, which goes with what is in it
    let options = Some("size=256k,mode=755");
    mount(Some("warm-up"), &at, Some("tmpfs"), MsFlags::MS_NOSUID, options)
        .map_err(Error::host(at.display().to_string()))?;
    let program = File::options().create(true).truncate(true).write(true).mode(0o755).open(at.join(PROGRAM));
    program.and_then(|mut file| file.write_all(&ends_at_once())).map_err(failed())?;
    fs::set_permissions(at.join(PROGRAM), PermissionsExt::from_mode(0o755)).map_err(failed())?;

    let id = ContainerId::try_from(NAME)?;
    let mut oci = Spec::default();
    if let Some(process) = oci.process_mut() {
        process.set_args(Some(vec![format!("/{PROGRAM}")]));
    }
    let policy = spec::Policy { keep_seccomp: false, without_network: true };
    let (guest, _) = spec::for_guest(&oci, &id, guest_path(&root), policy)?;
    let (container_id, exec_id) = (NAME.to_owned(), NAME.to_owned());
    let request = api::CreateContainerRequest {
        container_id: container_id.clone(),
        exec_id: exec_id.clone(),
        OCI: Some(guest).into(),
        ..Default::default()
    };
    agent
        .call("creating a container", |client, context| async { client.create_container(context, &request).await })
        .await?;
    // as for a pod: its output and its end are asked for before it starts
    let start = api::StartContainerRequest { container_id: container_id.clone(), ..Default::default() };
    let wait =
        api::WaitProcessRequest { container_id: container_id.clone(), exec_id: exec_id.clone(), ..Default::default() };
    let read = api::ReadStreamRequest { container_id: container_id.clone(), exec_id, len: 4096, ..Default::default() };
    let words = "running a container";
    let (_, _, ended, _) = tokio::join!(
        agent.call(words, |client, context| async { client.read_stdout(context, &read).await }),
        agent.call(words, |client, context| async { client.read_stderr(context, &read).await }),
        agent.call(words, |client, context| async { client.wait_process(context, &wait).await }),
        agent.call(words, |client, context| async { client.start_container(context, &start).await }),
    );
    let status = ended?.status;
    if status != 0 {
        return Err(Error::WrongState(format!("the warm-up container exited with {status}")));
    }
    let remove = api::RemoveContainerRequest { container_id, ..Default::default() };
    agent
        .call("removing a container", |client, context| async { client.remove_container(context, &remove).await })
        .await
        .map(drop)
}

/// A program for x86-64 that calls `exit(0)`: ELF header, one program header, code.
fn ends_at_once() -> Vec<u8> {
    // mov edi, 0; mov eax, 60; syscall
    const CODE: [u8; 12] = [0xbf, 0, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    // an executable, for x86-64, of version 1
    put(&2u16.to_le_bytes());
    put(&62u16.to_le_bytes());
    put(&1u32.to_le_bytes());
    // where it starts, where the program headers are, no sections, no flags
    put(&(BASE + HEADERS).to_le_bytes());
    put(&64u64.to_le_bytes());
    put(&0u64.to_le_bytes());
    put(&0u32.to_le_bytes());
    // sizes: this header, a program header and their number; of sections none
    for size in [64u16, 56, 1, 64, 0, 0] {
        put(&size.to_le_bytes());
    }
    // to be loaded, readable and executable, the whole file
    put(&1u32.to_le_bytes());
    put(&5u32.to_le_bytes());
    let whole = HEADERS + CODE.len() as u64;
    for number in [0, BASE, BASE, whole, whole, 0x1000] {
        put(&number.to_le_bytes());
    }
    put(&CODE);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_ends_with_0() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join(PROGRAM);
        fs::write(&path, ends_at_once()).expect("written");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("set");
        assert!(std::process::Command::new(&path).status().expect("ran").success());
    }
}
