//! `kata-agent`: PID 1 of the guest.
//!
//! One thread, always: containers are made by cloning this process (see `launcher`), which is safe because nobody else
//! can hold a lock at that moment. So nothing here may use tokio's blocking pool.

mod bpf;
mod cgroup;
mod container;
mod device;
mod device_filter;
mod disk;
mod error;
mod guest;
mod init;
mod inside;
mod io;
mod launcher;
mod log;
mod network;
mod oom;
mod ownership;
mod params;
mod pci;
mod port;
mod priority;
mod process;
mod reaper;
mod resolver;
mod sandbox;
mod server;
mod storage;
mod sysctl;
mod translator;
mod transport;
mod volume;
mod wake;
mod watched;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Err(error) = init::prepare() {
        log::error(&format!("preparing the guest: {error}"));
        return ExitCode::FAILURE;
    }
    let params = params::Params::read();
    log::set_level(params.log);
    log::debug("started");
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            log::error(&format!("creating the async runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(server::run(&params)) {
        Ok(never) => match never {},
        // the kernel panics when its first process ends, and the host sees that at once
        Err(error) => {
            log::error(&format!("serving: {error}"));
            ExitCode::FAILURE
        }
    }
}
