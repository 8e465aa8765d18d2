//! `configuration.toml` → one validated [`Config`].
//!
//! Owns: which file is read, Kata's keys in both of its dialects, defaults, and the errors: one line each, with file,
//! line, key, value and what is allowed. What there is to know of a key is its row in [`table`]. Starts nothing.

mod apply;
mod checks;
mod driver;
mod file;
mod host;
mod key;
mod merging;
pub mod render;
mod root;
mod share;
mod superblock;
mod table;
mod told;
mod types;
mod unknown;
mod value;

use std::ffi::OsString;
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

pub use driver::{Accelerator, Driver, Qemu};
pub use key::Word;
pub use types::{
    Agent, AgentChannel, BlockAio, BlockDevices, BlockDriver, Config, Factory, FileSystem, FsCache, Hypervisor,
    Internetworking, Runtime, SharedFs, Verity,
};

/// A configuration that cannot be used. One line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No file was found.
    #[error("no configuration.toml found in {paths}: run `make install`, or set --config, or ConfigPath in the runtime's options", paths = OneLine(.0))]
    Missing(String),
    /// A file cannot be read.
    #[error("{file}: {why}", file = OneLine(.file.display()), why = OneLine(.why))]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why, and what is to be done.
        why: String,
    },
    /// Not TOML.
    #[error("{file}:{line}: {why}", file = OneLine(.file.display()), why = OneLine(.why))]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The parser's message.
        why: String,
    },
    /// A value that is not allowed.
    #[error(
        "{file}{line}: {key} = {value}: {allowed}",
        file = OneLine(.file.display()),
        line = if *.line == 0 { String::new() } else { format!(":{}", .line) },
        key = OneLine(.key),
        value = OneLine(.value),
        allowed = OneLine(.allowed),
    )]
    Value {
        /// The file.
        file: PathBuf,
        /// Its line, from 1; 0 for a default.
        line: usize,
        /// The key with its table.
        key: String,
        /// What was set.
        value: String,
        /// What is allowed.
        allowed: String,
    },
}

/// Shows something in one line whatever it holds: file names and keys may have line breaks.
struct OneLine<T>(T);

impl<T: Display> Display for OneLine<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.0.to_string().split_inclusive(char::is_control) {
            let kept = part.trim_end_matches(char::is_control);
            write!(f, "{kept}{}", part[kept.len()..].escape_debug())?;
        }
        Ok(())
    }
}

impl Config {
    /// Finds, reads and checks the configuration. `explicit` is the runtime option `ConfigPath`.
    ///
    /// # Errors
    /// One line that says what to correct.
    pub fn load(explicit: Option<&Path>) -> Result<Self, Error> {
        let base = match explicit {
            Some(path) => path.to_owned(),
            // one that was named is never passed over in silence
            None => match from_environment() {
                Some(path) => path.into(),
                None => Self::search_paths().into_iter().find(|path| path.is_file()).ok_or_else(|| {
                    let tried: Vec<_> = Self::search_paths().iter().map(|path| path.display().to_string()).collect();
                    Error::Missing(tried.join(", "))
                })?,
            },
        };
        let mut entries = file::read(&base)?;
        for drop_in in file::drop_ins(&base)? {
            entries.extend(file::read(&drop_in)?);
        }
        let (mut config, settings) = apply::apply(entries, &base, &Path::exists)?;
        let set = checks::Set::new(&settings, config.driver);
        host::check(&mut config, &set)?;
        merging::check(&mut config, &set, Path::new(merging::KSM))?;
        Ok(config)
    }

    /// Parses one text without looking at the host.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, source: &Path) -> Result<Self, Error> {
        apply::apply(file::parse(text, source)?, source, &|_| false).map(|(config, _)| config)
    }

    /// Where it is looked for, in order, when no path is given. `KATA_CONF_FILE` is for developers and the tools.
    pub fn search_paths() -> Vec<PathBuf> {
        const SHARED: &str = "share/defaults/kata-containers/configuration.toml";
        let beside = std::env::current_exe()
            .ok()
            .and_then(|exe| exe.parent().and_then(Path::parent).map(|prefix| prefix.join(SHARED)));
        let mut paths: Vec<PathBuf> = from_environment().map(PathBuf::from).into_iter().collect();
        paths.push("/etc/kata-containers/configuration.toml".into());
        paths.extend(beside);
        for usual in ["/usr", "/opt/kata"].map(|prefix| Path::new(prefix).join(SHARED)) {
            if !paths.contains(&usual) {
                paths.push(usual);
            }
        }
        paths
    }
}

fn from_environment() -> Option<OsString> {
    std::env::var_os("KATA_CONF_FILE").filter(|path| !path.is_empty())
}
