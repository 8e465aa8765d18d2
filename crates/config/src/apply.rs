//! Entries → [`Config`]: of each key the one that counts, set by its row of the table.

use std::collections::BTreeMap;
use std::path::Path;

use crate::driver::Driver;
use crate::file::{Entry, Value};
use crate::key::Effect;
use crate::types::Config;
use crate::unknown::Unknown;
use crate::{Error, checks, table, told};

/// The entries that count, by the path of their key under its first name.
pub(crate) type Settings = BTreeMap<String, Entry>;

/// `exists` answers for the host, as far as keys without effect matter on some hosts only.
pub(crate) fn apply(
    entries: Vec<Entry>,
    source: &Path,
    exists: &dyn Fn(&Path) -> bool,
) -> Result<(Config, Settings), Error> {
    let settings = merge(entries);
    let mut config = Config::defaults(source.to_owned());
    let chosen = settings.get("runtime.hypervisor_name").and_then(|entry| match &entry.value {
        Value::Text(name) => Driver::named(name),
        _ => None,
    });
    config.driver = chosen.unwrap_or_default();
    let mut unknown = Unknown::new();
    for (path, entry) in &settings {
        // of several hypervisors' tables the name chooses one, and the others mean nothing
        if let Some(driver) = chosen
            && is_of_another(&entry.key, driver)
        {
            continue;
        }
        match table::find(path) {
            Some(found) => {
                found.row.read(&mut config, entry, entry.key != *path)?;
                if let Effect::Told { met, usual, when } = found.row.effect {
                    told::tell(&mut config, entry, (met, usual), when, found.row.doc, exists);
                }
            }
            None => unknown.meet(entry, &mut config.warnings)?,
        }
    }
    checks::fit(&mut config, &settings)?;
    Ok((config, settings))
}

fn is_of_another(key: &str, driver: Driver) -> bool {
    let rest = key.strip_prefix("hypervisor.");
    rest.is_some_and(|rest| rest.split('.').next().is_some_and(|name| name != driver.name()))
}

/// Later files win key by key, under either of a key's names. In one file the Go runtime's name counts.
fn merge(entries: Vec<Entry>) -> Settings {
    let mut settings = Settings::new();
    for entry in entries {
        let (path, is_alias) = match table::find(&entry.key) {
            Some(found) => (found.path, found.is_alias),
            None => (entry.key.clone(), false),
        };
        let is_set_here = |other: &Entry| other.key == path && other.file == entry.file;
        if is_alias && settings.get(&path).is_some_and(is_set_here) {
            continue;
        }
        settings.insert(path, entry);
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_takes_what_is_of_no_type() {
        for path in table::paths() {
            let source = Path::new("/c.toml");
            let value = Value::Other("1979-05-27".into());
            let entry = Entry { key: path.clone(), value, file: source.to_owned(), line: 7 };
            let done = apply(vec![entry], source, &|_| false);
            let row = table::find(&path).map(|found| found.row.effect);
            if matches!(row, Some(Effect::Met | Effect::Told { .. }) | None) {
                continue;
            }
            let error = done.expect_err("no key takes a date").to_string();
            assert!(error.starts_with(&format!("/c.toml:7: {path} = 1979-05-27: ")), "{error}");
        }
    }

    #[test]
    fn the_other_name_of_a_key_sets_the_same() {
        let parsed = |text: &str| {
            let source = Path::new("/c.toml");
            let entries = crate::file::parse(text, source).expect("is TOML");
            apply(entries, source, &|_| false).expect("right").0
        };
        let rust = parsed("hypervisor.qemu.factory.enable_template = true");
        assert_eq!(rust, parsed("factory.enable_template = true"));
        assert!(rust.factory.enable_template);
        // of both in one file the Go runtime's counts, wherever it stands
        for text in [
            "agent.kata.dial_timeout = 7\nagent.kata.reconnect_timeout_ms = 9",
            "agent.kata.reconnect_timeout_ms = 9\nagent.kata.dial_timeout = 7",
        ] {
            assert_eq!(parsed(text).agent.dial_timeout.as_secs(), 7);
        }
    }
}
