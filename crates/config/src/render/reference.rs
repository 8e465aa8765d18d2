//! `docs/configuration.md`: every key, those that have no effect included.

use std::fmt::Write as _;

use super::{FILES, MISTAKES, default, rows, sentence, wrap};
use crate::driver::Driver;
use crate::key::{Effect, Key, Slot, Table, When};

/// Width of a line of prose.
const WIDTH: usize = 120;

/// The whole page.
pub fn reference() -> String {
    let mut text = String::from(
        "<!-- Generated from the table in crates/config/src/table by `cargo run -p xtask docs`. Change it there. -->\n\
         # Configuration\n\n",
    );
    for paragraph in [FILES, MISTAKES] {
        let _ = writeln!(text, "{}\n", wrap(paragraph, WIDTH).join("\n"));
    }
    text.push_str("`PREFIX` is where `make install` installed, `/usr/local` by default.\n");
    for driver in Driver::ALL {
        for table in Table::ALL.into_iter().filter(|table| is_shown(*table, *driver)) {
            if rows(table, *driver, true).next().is_none() {
                continue;
            }
            let _ = write!(text, "\n## [{}]\n\n| key | value | default |\n|---|---|---|\n", table.header(*driver));
            for row in rows(table, *driver, true) {
                let takes = row.slot().map(Slot::takes).unwrap_or_default();
                let shown = default(row).replace("/usr/local", "PREFIX");
                let _ = writeln!(text, "| [`{0}`](#{1}) | {takes} | `{shown}` |", row.name, anchor(row, *driver));
            }
            for row in rows(table, *driver, true) {
                let _ = write!(text, "\n<a id=\"{}\"></a>\n", anchor(row, *driver));
                let _ = writeln!(text, "{}", wrap(&escaped(&entry(row, *driver)), WIDTH).join("\n"));
            }
        }
    }
    text.push_str("\n## Keys of Kata without effect\n\n");
    let told = "A value that is not listed is an error. Where every value is accepted, the key changes nothing that exists here; where \
                \"logged\" stands, a value that asks for something else is accepted and the log says that it has no effect.";
    let _ = writeln!(text, "{}", wrap(told, WIDTH).join("\n"));
    for driver in Driver::ALL {
        for table in Table::ALL.into_iter().filter(|table| is_shown(*table, *driver)) {
            let _ = write!(text, "\n### [{}]\n\n| key | accepted | why |\n|---|---|---|\n", table.header(*driver));
            for row in rows(table, *driver, false) {
                let _ = writeln!(text, "| `{}` | {} | {} |", row.name, accepted(row), escaped(&sentence(row.doc)));
            }
        }
    }
    text
}

/// Tables that are no driver's are shown once.
fn is_shown(table: Table, driver: Driver) -> bool {
    table == Table::Hypervisor || driver == Driver::default()
}

/// Without what Markdown takes for HTML.
fn escaped(text: &str) -> String {
    text.replace('<', "&lt;")
}

fn anchor(row: &Key, driver: Driver) -> String {
    row.path(driver).replace('.', "-")
}

fn entry(row: &Key, driver: Driver) -> String {
    let mut text = format!("**`{}`**: {}", row.name, row.doc);
    if let Some(path) = row.alias_path(driver) {
        let unit = match row.alias.and_then(|alias| alias.slot) {
            Some(slot) => format!(" ({})", slot.takes()),
            None => String::new(),
        };
        let _ = write!(text, " The Rust runtime's name is `{path}`{unit}; in one file, `{}` counts.", row.name);
    }
    text
}

pub(super) fn accepted(row: &Key) -> String {
    let list = |values: &[&str]| values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ");
    match row.effect {
        Effect::Sets(slot) => slot.takes(),
        Effect::Only { values, .. } => list(values),
        Effect::Met => "any".into(),
        Effect::Told { when: When::HostHas(file), met, .. } => {
            format!("{}; others logged where the host has {file}", list(met))
        }
        Effect::Told { when: When::ValueExists, .. } => "any; logged where the path exists".into(),
        Effect::Told { met: [], .. } => "any; logged".into(),
        Effect::Told { met, .. } => format!("{}; others logged", list(met)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    #[test]
    fn every_key_is_in_it() {
        let text = reference();
        for row in table::all() {
            assert!(text.contains(&format!("`{}`", row.name)), "{}", row.name);
        }
        let cells = text.lines().filter(|line| line.starts_with('|'));
        for line in cells {
            assert_eq!(line.matches('|').count(), 4, "{line}");
        }
    }
}
