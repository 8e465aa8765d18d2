//! What a machine is made of, from the configuration.

use agent_api::ports;
use hypervisor::{Begin, Boot, Channel, Hello, Image, Root, SharedDir, Size, Verity, VmSpec};

use super::Env;
use crate::agent_channel::AgentChannel;
use crate::sizing;
use crate::storage::open_files;

/// A machine of this size or the configured one without anything of a pod, and with room for it: what a template is made of. What
/// its clones have besides is all new to the guest, but for a folder that the VMM serves, in `shared_dirs`.
pub(crate) fn plain_spec(env: &Env, size: Option<Size>, shared_dirs: Vec<SharedDir>) -> VmSpec {
    let size = size.unwrap_or_else(|| sizing::plan(&env.config.hypervisor, crate::pod::Limits::default()));
    let channel = Channel::Serial { port: ports::AGENT_SERIAL };
    let spec = vm_spec(env, size, channel, &AgentChannel::Serial.kernel_params());
    VmSpec { id: "template".into(), shared_dirs, pluggable: true, ..spec }
}

/// A machine that boots over this channel.
pub(super) fn vm_spec(env: &Env, size: Size, channel: Channel, channel_params: &str) -> VmSpec {
    let config = &env.config.hypervisor;
    let log = if env.config.agent.enable_debug { "debug" } else { "info" };
    VmSpec {
        id: String::new(),
        begin: Begin::Boot,
        boot: Boot {
            kernel: config.kernel.clone(),
            root: root(config),
            kernel_params: kernel_params(channel_params, log, config),
            hello: Some(Hello { port: ports::AGENT_SERIAL, kernel_params: AgentChannel::Serial.kernel_params() }),
        },
        size,
        channel,
        shared_dirs: Vec::new(),
        devices: Vec::new(),
        pluggable: false,
        reclaim: config.reclaim_guest_freed_memory,
        merge: config.merge_guest_memory,
        entropy_source: config.entropy_source.clone(),
        debug: config.enable_debug || env.config.agent.enable_debug,
    }
}

/// What the guest boots from; the configuration has exactly one.
fn root(config: &config::Hypervisor) -> Root {
    let Some(path) = config.image.clone() else { return Root::Initrd(config.initrd.clone().unwrap_or_default()) };
    Root::Image(Image {
        path,
        file_system: config::Word::as_str(config.rootfs_type).to_owned(),
        is_memory: config.image_is_memory,
        verity: config.kernel_verity_params.clone().map(|verity| Verity {
            root_hash: verity.root_hash,
            salt: verity.salt,
            data_blocks: verity.data_blocks,
            data_block_size: verity.data_block_size,
            hash_block_size: verity.hash_block_size,
        }),
    })
}

/// What this side asks of the guest's kernel, and what the configuration does. Whoever sets one of them decides himself.
fn kernel_params(channel: &str, log: &str, config: &config::Hypervisor) -> String {
    let configured = &config.kernel_params;
    let ours = open_files::kernel_parameter(config)
        .filter(|ours| ours.split_inclusive('=').next().is_some_and(|key| !configured.contains(key)))
        .map_or_else(String::new, |ours| format!(" {ours}"));
    format!("{channel} agent.log={log} cgroup_no_v1=all{ours} {configured}").trim_end().into()
}

#[cfg(test)]
mod tests {
    use super::kernel_params;

    #[test]
    fn the_configuration_comes_last() {
        let text = "[hypervisor.qemu]\nshared_fs = \"none\"\nkernel_params = \"a cgroup.memory=nobpf\"";
        let config = config::Config::parse(text, std::path::Path::new("/c")).expect("right");
        let params = kernel_params("c=1", "info", &config.hypervisor);
        assert_eq!(params, "c=1 agent.log=info cgroup_no_v1=all a cgroup.memory=nobpf");
    }

    #[test]
    fn the_guest_is_told_how_many_files_it_may_know() {
        let params = |configured: &str| {
            let text = format!(
                "[hypervisor.qemu]\nkernel_params = {configured:?}\nvirtio_fs_extra_args = [\"--rlimit-nofile=100\"]"
            );
            let config = config::Config::parse(&text, std::path::Path::new("/c")).expect("right");
            kernel_params("c=1", "info", &config.hypervisor)
        };
        assert!(params("").ends_with(" fuse.max_inodes=50"));
        assert!(params("fuse.max_inodes=7").ends_with(" cgroup_no_v1=all fuse.max_inodes=7"));
    }
}
