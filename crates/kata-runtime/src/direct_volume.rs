//! `kata-runtime direct-volume`: called by a storage driver before a pod starts and after it has ended.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use runtime::direct_volume::Store;

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
    }
}
