//! The table of keys as text for people: the file that is installed, the reference and the man page.

mod man;
mod reference;
mod template;

pub use man::man;
pub use reference::reference;
pub use template::{Guest, template};

use std::path::PathBuf;

use crate::driver::Driver;
use crate::key::{Effect, Key, Table};
use crate::table;
use crate::types::Config;

/// The rows of a table that a driver knows, in the order of the documentation: those that work, or the others.
fn rows(table: Table, driver: Driver, works: bool) -> impl Iterator<Item = &'static Key> {
    // a driver's own come first
    let own = |row: &&Key| row.drivers.len() < Driver::ALL.len();
    let all = table::all()
        .filter(move |row| row.table == table && row.drivers.contains(&driver))
        .filter(move |row| matches!(row.effect, Effect::Sets(_)) == works);
    all.clone().filter(own).chain(all.filter(move |row| !own(row)))
}

/// The default of a key that works, in TOML.
fn default(row: &Key) -> String {
    let mut config = Config::defaults(PathBuf::new());
    row.slot().map(|slot| slot.show(&mut config)).unwrap_or_default()
}

/// Lines of at most `width` characters, broken between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A sentence with a capital letter.
fn sentence(text: &str) -> String {
    let mut rest = text.chars();
    let first = rest.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    // names of programs and values keep their letters
    if text.starts_with("vCPU") { text.to_owned() } else { first + rest.as_str() }
}

/// Where the file is looked for and how files are merged.
const FILES: &str = "The shim reads the file that is named by ConfigPath in the runtime's options, else by KATA_CONF_FILE, else \
    the first of /etc/kata-containers/configuration.toml, share/defaults/kata-containers/configuration.toml in the folder where \
    it was installed, and that file in /usr and /opt/kata. kata-runtime takes --config before these. Files of config.d/*.toml \
    beside that file are read after it, in alphabetical order, and win key by key: put changes there, because `make install` \
    overwrites the file.";

/// What happens to keys that are not as they should be.
const MISTAKES: &str = "A value that is not allowed is an error with file and line, and no pod starts. An unknown key is a warning in \
    containerd's log, with the most similar key. A key of Kata that has no effect here is told in the log too.";
