//! `kata-runtime factory`: the saved VMs of which pods are clones.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use config::Config;
use runtime::template::{self, Store};
use runtime::{Env, Size};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a machine as the configuration says and save it for clones; nothing is done if there is one
    Init(Init),
    /// List what is saved
    Status,
    /// Take away all that is saved; machines that are clones of it go on
    Destroy,
}

/// Of what size: what pods of the configured size plus their limits boot with.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Processors, instead of the configuration's
    #[arg(long, requires = "memory")]
    vcpus: Option<u32>,
    /// MiB, instead of the configuration's
    #[arg(long, requires = "vcpus")]
    memory: Option<u64>,
}

pub(crate) fn run(command: &Command, config: Option<&Path>) -> Result<()> {
    let config = Config::load(config)?;
    let store = Store::new(&config.factory.template_path);
    let mut out = std::io::stdout().lock();
    match command {
        Command::Init(size) => init(size, config, &mut out),
        Command::Status => status(&config, &store, &mut out),
        Command::Destroy => {
            let count = store.destroy()?;
            Ok(writeln!(out, "{count} taken away")?)
        }
    }
}

fn init(size: &Init, config: Config, out: &mut impl Write) -> Result<()> {
    if !config.factory.enable_template {
        bail!("no pod would use it: set `enable_template = true` in [factory] of {} first", config.source.display());
    }
    let size = match (size.vcpus, size.memory) {
        (Some(vcpus), Some(memory_mib)) => {
            let (most, most_mib) = (config.hypervisor.default_maxvcpus, config.hypervisor.default_maxmemory_mib);
            if !(1..=most).contains(&vcpus) || !(128..=most_mib).contains(&memory_mib) {
                bail!(
                    "--vcpus {vcpus} --memory {memory_mib}: a machine may have 1 to {most} processors and 128 to \
                     {most_mib} MiB here"
                );
            }
            Some(Size { vcpus, memory_mib })
        }
        _ => None,
    };
    let hypervisor = runtime::driver(&config);
    // the process that starts a machine must be the one that lives as long
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the async runtime")?;
    let is_made = runtime.block_on(template::make(&Env { config, hypervisor }, size))?;
    Ok(writeln!(out, "{}", if is_made { "made" } else { "it is there, or being made" })?)
}

fn status(config: &Config, store: &Store, out: &mut impl Write) -> Result<()> {
    let state = if config.factory.enable_template { "on" } else { "off" };
    writeln!(out, "templates are {state} in {}", config.source.display())?;
    for info in store.list()? {
        let age = SystemTime::now().duration_since(info.made).unwrap_or_default();
        writeln!(
            out,
            "{}  {} vCPU  {} MiB, {} MiB used  {} ago  {}",
            info.key,
            info.about.vcpus,
            info.about.memory_mib,
            info.used.div_ceil(1 << 20),
            words(age),
            info.about.boots
        )?;
    }
    Ok(())
}

fn words(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}
