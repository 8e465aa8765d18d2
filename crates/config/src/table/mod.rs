//! The table of keys: a row a key, from which the parser, the refusals, `configuration.toml`, `docs/configuration.md` and the man
//! page are made. A driver's own rows are in [`crate::driver`].

mod agent;
mod disks;
mod factory;
mod guest;
mod network;
mod other;
mod runtime;
mod sharing;
mod size;

use crate::driver::{self, Driver};
use crate::key::{Key, Table};

/// In the order of the documentation.
static ROWS: &[&[Key]] = &[
    guest::ROWS,
    size::ROWS,
    network::ROWS,
    sharing::ROWS,
    disks::ROWS,
    agent::ROWS,
    runtime::ROWS,
    factory::ROWS,
    other::HYPERVISOR,
    other::REST,
];

/// All rows, those of the drivers last.
pub(crate) fn all() -> impl Iterator<Item = &'static Key> + Clone {
    ROWS.iter().chain(driver::ROWS).flat_map(|rows| rows.iter())
}

/// The row of a key.
pub(crate) struct Found {
    pub(crate) row: &'static Key,
    /// The key is the row's other name.
    pub(crate) is_alias: bool,
    /// The row's own path: settings are kept by it.
    pub(crate) path: String,
}

/// The row of the key at this path, `hypervisor.qemu.kernel` for example.
pub(crate) fn find(path: &str) -> Option<Found> {
    let (table, driver, name) = split(path)?;
    let known = |row: &Key| table != Table::Hypervisor || row.drivers.contains(&driver);
    let row = all().find(|row| known(row) && row.is_called(table, name))?;
    let is_alias = row.is_alias(table, name);
    // a row for many keys keeps them apart
    let path = if is_alias { row.path(driver) } else { path.to_owned() };
    Some(Found { row, is_alias, path })
}

/// Table, driver and name; without a driver's table the driver does not matter.
fn split(path: &str) -> Option<(Table, Driver, &str)> {
    if let Some((name, rest)) = path.strip_prefix("hypervisor.").and_then(|rest| rest.split_once('.')) {
        return Some((Table::Hypervisor, Driver::named(name)?, rest));
    }
    Table::ALL.into_iter().find_map(|table| {
        let rest = path.strip_prefix(&table.header(Driver::default()))?.strip_prefix('.')?;
        Some((table, Driver::default(), rest))
    })
}

/// The paths of all keys of all drivers, under each of their names.
pub(crate) fn paths() -> impl Iterator<Item = String> {
    all().flat_map(|row| {
        let names = row.drivers.iter().flat_map(|driver| [Some(row.path(*driver)), row.alias_path(*driver)]);
        names.flatten().map(|path| path.trim_end_matches(".*").to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::key::Effect;

    #[test]
    fn a_name_is_one_key() {
        for driver in Driver::ALL {
            let mut seen = HashSet::new();
            for row in all().filter(|row| row.drivers.contains(driver)) {
                for path in [Some(row.path(*driver)), row.alias_path(*driver)].into_iter().flatten() {
                    assert!(seen.insert(path.clone()), "{path} is there twice");
                    assert!(std::ptr::eq(find(&path).expect("found").row, row), "{path}");
                }
            }
        }
    }

    #[test]
    fn an_annotation_sets_one_key() {
        let mut seen = HashSet::new();
        for row in all() {
            if let Some(name) = row.annotation {
                assert!(seen.insert(name), "{name} is there twice");
                let (table, _) = name.split_once('.').expect("its table");
                assert!(row.path(Driver::default()).starts_with(table), "{name}");
            }
        }
        assert!(seen.len() > 30, "{}", seen.len());
    }

    #[test]
    fn every_row_is_explained() {
        for row in all() {
            let doc = row.doc;
            assert!(doc.len() > 15 && doc.ends_with('.') && !doc.contains("  "), "{}: {doc:?}", row.name);
            if let Effect::Only { values: [], .. } = row.effect {
                panic!("{}: no value is accepted", row.name);
            }
        }
    }
}
