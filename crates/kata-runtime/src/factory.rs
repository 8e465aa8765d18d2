//! `kata-runtime factory`: the saved VMs of which pods are clones, and the pool of those that wait.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use config::Config;
use runtime::template::{self, Store};
use runtime::{Env, Size, pool};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make the template of the configured VM, if there is none. With `vm_cache_number`, keep that many VMs ready for pods
    /// and run until SIGTERM or SIGINT
    Init(Init),
    /// List the templates and the VMs of the pool
    Status,
    /// Remove all templates below `template_path`, by whichever configuration they were made, and end the pool. VMs of pods
    /// keep running
    Destroy,
    /// The pool's own: the parent of one machine
    #[command(hide = true)]
    Keep {
        /// The kind of machine that is wanted
        key: String,
    },
}

/// Of what size: what pods of the configured size plus their limits boot with.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// vCPUs of the template, instead of `default_vcpus`
    #[arg(long, requires = "memory")]
    vcpus: Option<u32>,
    /// Memory of the template in MiB, instead of `default_memory`
    #[arg(long, requires = "vcpus")]
    memory: Option<u64>,
}

pub(crate) fn run(command: &Command, config: Option<&Path>) -> Result<()> {
    let config = Config::load(config)?;
    // a keeper is one of many, and its server has said it
    let told = if matches!(command, Command::Keep { .. }) { &[] } else { config.warnings.as_slice() };
    for warning in told {
        let _ = writeln!(std::io::stderr(), "kata-runtime: {warning}");
    }
    let store = Store::new(&config.factory.template_path);
    let mut out = std::io::stdout().lock();
    match command {
        Command::Init(size) => init(size, config, &mut out),
        Command::Status => status(&config, &store, &mut out),
        Command::Destroy => {
            if runtime()?.block_on(pool::end(&config.factory.vm_cache_endpoint))? {
                writeln!(out, "pool ended")?;
            }
            let taken = store.destroy()?;
            write!(out, "{} templates removed", taken.templates)?;
            if taken.being_made > 0 {
                write!(out, "; {} being made: repeat the command in some seconds to remove them", taken.being_made)?;
            }
            Ok(writeln!(out)?)
        }
        Command::Keep { key } => keep(config, key),
    }
}

/// Of one thread: the one that starts a machine must live as long as that.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("creating the async runtime")
}

fn init(size: &Init, config: Config, out: &mut impl Write) -> Result<()> {
    // makers of templates are called with a size
    let has_pool = config.factory.vm_cache_number > 0 && size.vcpus.is_none();
    if !config.factory.enable_template && !has_pool {
        bail!(
            "templates and the pool are disabled: set `enable_template = true` or `vm_cache_number` in [factory] of {}",
            config.source.display()
        );
    }
    let size = match (size.vcpus, size.memory) {
        (Some(vcpus), Some(memory_mib)) => {
            let (most, most_mib) = (config.hypervisor.default_maxvcpus, config.hypervisor.default_maxmemory_mib);
            if !(1..=most).contains(&vcpus) || !(128..=most_mib).contains(&memory_mib) {
                bail!(
                    "--vcpus {vcpus} --memory {memory_mib}: a VM may have 1 to {most} vCPUs and 128 to {most_mib} MiB on this host"
                );
            }
            Some(Size { vcpus, memory_mib })
        }
        _ => None,
    };
    let hypervisor = runtime::driver(&config);
    let (env, runtime) = (Env { config, hypervisor }, runtime()?);
    if env.config.factory.enable_template {
        let is_made = runtime.block_on(async {
            let stop = told_to_end()?;
            tokio::select! {
                // dropped, it takes its machine and its files with it
                made = template::make(&env, size) => Ok(made?),
                () = stop => bail!("interrupted: no template was made"),
            }
        })?;
        writeln!(out, "{}", if is_made { "template made" } else { "the template exists, or is being made" })?;
    }
    if has_pool { runtime.block_on(serve(&env, out)) } else { Ok(()) }
}

/// Resolves at TERM or INT; call it where a runtime is.
fn told_to_end() -> Result<impl Future<Output = ()>> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

async fn serve(env: &Env, out: &mut impl Write) -> Result<()> {
    let stop = told_to_end()?;
    let mut say = |words| {
        // the pool goes on when nobody reads
        let _ = writeln!(out, "{words}");
    };
    Ok(pool::serve(env, stop, &mut say).await?)
}

fn keep(config: Config, key: &str) -> Result<()> {
    let server = std::io::stdin().as_fd().try_clone_to_owned().context("connecting to the pool's server")?;
    let hypervisor = runtime::driver(&config);
    Ok(runtime()?.block_on(pool::keep(&Env { config, hypervisor }, key, server))?)
}

fn status(config: &Config, store: &Store, out: &mut impl Write) -> Result<()> {
    let state = if config.factory.enable_template { "enabled" } else { "disabled" };
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
    let factory = &config.factory;
    let Some(all) = runtime()?.block_on(pool::list(&factory.vm_cache_endpoint))? else {
        let wanted = factory.vm_cache_number > 0;
        let todo = if wanted {
            "; vm_cache_number is set: start `kata-runtime factory init`, which keeps running"
        } else {
            ""
        };
        return Ok(writeln!(out, "no pool at {}{todo}", factory.vm_cache_endpoint.display())?);
    };
    let ready = all.iter().filter(|info| info.vmm.is_some()).count();
    writeln!(out, "pool: {ready} of {} VMs ready at {}", factory.vm_cache_number, factory.vm_cache_endpoint.display())?;
    for pool::Info { keeper, vmm, is_clone, age } in all {
        let state = match vmm {
            Some(vmm) => format!("ready  pid {vmm}  {}", if is_clone { "cloned" } else { "booted" }),
            None => "being made".into(),
        };
        writeln!(out, "keeper {keeper}  {state}  for {}", words(Duration::from_secs(age)))?;
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
