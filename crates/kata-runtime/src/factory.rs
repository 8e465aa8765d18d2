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
    /// Boot a machine as the configuration says and save it for clones, if there is none; with `vm_cache_number`, keep so
    /// many machines ready, until it is told to end
    Init(Init),
    /// List what is saved, and what is ready
    Status,
    /// Take away all that is saved below the configuration's `template_path`, whoever saved it, and end the pool; machines
    /// that pods have go on
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
    /// Processors, instead of the configuration's
    #[arg(long, requires = "memory")]
    vcpus: Option<u32>,
    /// MiB, instead of the configuration's
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
                writeln!(out, "the pool has ended")?;
            }
            let taken = store.destroy()?;
            write!(out, "{} taken away", taken.templates)?;
            if taken.being_made > 0 {
                write!(
                    out,
                    "; {} being made, which will be there in some seconds: run it again then",
                    taken.being_made
                )?;
            }
            Ok(writeln!(out)?)
        }
        Command::Keep { key } => keep(config, key),
    }
}

/// Of one thread: the one that starts a machine must live as long as that.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("the async runtime")
}

fn init(size: &Init, config: Config, out: &mut impl Write) -> Result<()> {
    // makers of templates are called with a size
    let has_pool = config.factory.vm_cache_number > 0 && size.vcpus.is_none();
    if !config.factory.enable_template && !has_pool {
        bail!(
            "no pod would use it: set `enable_template = true`, or `vm_cache_number`, in [factory] of {} first",
            config.source.display()
        );
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
    let (env, runtime) = (Env { config, hypervisor }, runtime()?);
    if env.config.factory.enable_template {
        let is_made = runtime.block_on(async {
            let stop = told_to_end()?;
            tokio::select! {
                // dropped, it takes its machine and its files with it
                made = template::make(&env, size) => Ok(made?),
                () = stop => bail!("told to end: nothing was saved"),
            }
        })?;
        writeln!(out, "{}", if is_made { "made" } else { "it is there, or being made" })?;
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
    let server = std::io::stdin().as_fd().try_clone_to_owned().context("the pool's server")?;
    let hypervisor = runtime::driver(&config);
    Ok(runtime()?.block_on(pool::keep(&Env { config, hypervisor }, key, server))?)
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
    let factory = &config.factory;
    let Some(all) = runtime()?.block_on(pool::list(&factory.vm_cache_endpoint))? else {
        let wanted = factory.vm_cache_number > 0;
        let todo = if wanted {
            ", but vm_cache_number is set: `kata-runtime factory init` is to be run, and stays"
        } else {
            ""
        };
        return Ok(writeln!(out, "no pool is at {}{todo}", factory.vm_cache_endpoint.display())?);
    };
    let ready = all.iter().filter(|info| info.vmm.is_some()).count();
    writeln!(out, "{ready} of {} are ready at {}", factory.vm_cache_number, factory.vm_cache_endpoint.display())?;
    for pool::Info { keeper, vmm, is_clone, age } in all {
        let state = match vmm {
            Some(vmm) => format!("ready  process {vmm}  {}", if is_clone { "a clone" } else { "booted" }),
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
