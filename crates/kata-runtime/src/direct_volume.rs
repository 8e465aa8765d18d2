//! `kata-runtime direct-volume`: called by a storage driver before a pod starts and after it has ended.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use runtime::direct_volume::Store;
use runtime::management;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say which device stands behind a volume path
    Add {
        #[command(flatten)]
        volume: Volume,
        /// JSON: {"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4", "metadata": {}, "options": []}
        #[arg(long)]
        mount_info: String,
    },
    /// Tell how full a volume is that a pod has mounted: JSON in CSI's terms
    Stats(Volume),
    /// Enlarge a volume that a pod has mounted, after its device has grown; a file is enlarged
    Resize {
        #[command(flatten)]
        volume: Volume,
        /// Bytes
        #[arg(long)]
        size: u64,
    },
    /// Forget a volume path
    #[command(visible_alias = "delete")]
    Remove(Volume),
}

/// Which volume.
#[derive(Debug, Args)]
pub(crate) struct Volume {
    /// The path that pods' mounts have as their source
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
    users.into_iter().next().with_context(|| format!("no pod has the direct volume {}", volume.path.display()))
}
