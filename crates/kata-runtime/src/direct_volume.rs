//! `kata-runtime direct-volume`: called by a storage driver before a pod starts and after it has ended.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use runtime::direct_volume::Store;
use runtime::management;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Register the block device of a volume
    Add {
        #[command(flatten)]
        volume: Volume,
        /// Device and file system in JSON: {"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4", "metadata": {}, "options": []}
        #[arg(long)]
        mount_info: String,
    },
    /// Print the usage of a volume that a running pod has mounted, in JSON with the terms of CSI
    Stats(Volume),
    /// Grow a volume that a running pod has mounted: first grow its device; a regular file is grown by this command
    Resize {
        #[command(flatten)]
        volume: Volume,
        /// New size in bytes
        #[arg(long)]
        size: u64,
    },
    /// Unregister a volume
    #[command(visible_alias = "delete")]
    Remove(Volume),
}

/// Which volume.
#[derive(Debug, Args)]
pub(crate) struct Volume {
    /// Path of the volume, which is the source of the mount in the pod's container
    #[arg(long = "volume-path")]
    path: PathBuf,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    let store = Store::default();
    match command {
        Command::Add { volume, mount_info } => Ok(store.add(&volume.path, mount_info)?),
        Command::Remove(volume) => Ok(store.remove(&volume.path)?),
        Command::Stats(volume) => {
            let stats = management::volume_stats(&user(&store, volume)?, &volume.path)?;
            writeln!(std::io::stdout(), "{stats}")?;
            Ok(())
        }
        Command::Resize { volume, size } => Ok(management::volume_resize(&user(&store, volume)?, &volume.path, *size)?),
    }
}

/// The pod that has it: a file system is one machine's at a time.
fn user(store: &Store, volume: &Volume) -> Result<String> {
    let users = store.users(&volume.path)?;
    users
        .into_iter()
        .next()
        .with_context(|| format!("no running pod has mounted the direct volume {}", volume.path.display()))
}
