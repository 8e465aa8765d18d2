//! The shim's log: lines in logfmt to the named pipe `log` in the bundle, which containerd reads.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use log::{LevelFilter, Log, Metadata, Record};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

struct Pipe {
    file: Mutex<File>,
    id: String,
}

/// Opens containerd's pipe. Never waits: a containerd that is away or slow must not stop the pod, so a full pipe loses
/// lines.
pub(crate) fn open() -> std::io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("log")
}

/// Makes it the process's log.
pub(crate) fn init(id: &str, debug: bool) {
    let Ok(file) = open() else { return };
    let level = if debug { LevelFilter::Debug } else { LevelFilter::Info };
    if log::set_boxed_logger(Box::new(Pipe { file: Mutex::new(file), id: id.to_owned() })).is_ok() {
        log::set_max_level(level);
    }
}

/// What the configuration wants, once it is known.
pub(crate) fn more(debug: bool) {
    if debug {
        log::set_max_level(LevelFilter::Debug);
    }
}

impl Log for Pipe {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        // the libraries below talk of every frame
        let own = !["ttrpc", "tokio", "mio"].iter().any(|noisy| record.target().starts_with(noisy));
        if !self.enabled(record.metadata()) || !(own || record.level() <= log::Level::Warn) {
            return;
        }
        let time = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let message = record.args().to_string();
        let line = format!(
            "time=\"{time}\" level={} msg={message:?} runtime=kata sandbox={}\n",
            record.level().as_str().to_lowercase(),
            self.id
        );
        if let Ok(mut file) = self.file.lock() {
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}
