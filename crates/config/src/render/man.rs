//! The man page, section 5, in the macros of man(7).

use std::fmt::Write as _;

use super::{FILES, MISTAKES, default, reference, rows, sentence};
use crate::driver::Driver;
use crate::key::{Key, Slot, Table};

/// The whole page; `prefix` is where the product is installed.
pub fn man(prefix: &str) -> String {
    let mut text = String::from(
        ".\\\" Generated from the table of keys in crates/config.\n\
         .TH KATA\\-CONFIGURATION 5 \"\" \"Kata in Rust\" \"File formats\"\n\
         .nh\n.ad l\n.SH NAME\nkata\\-configuration \\- configuration.toml of containerd\\-shim\\-kata\\-v2 and kata\\-runtime\n\
         .SH DESCRIPTION\n",
    );
    for paragraph in [FILES, MISTAKES] {
        let _ = writeln!(text, "{}\n.PP", plain(paragraph));
    }
    text.push_str("The format is TOML. Keys and meanings are those of Kata Containers.\n");
    for driver in Driver::ALL {
        for table in Table::ALL.into_iter().filter(|table| is_shown(*table, *driver)) {
            if rows(table, *driver, true).next().is_none() {
                continue;
            }
            let _ = writeln!(text, ".SH [{}]", plain(&table.header(*driver)));
            for row in rows(table, *driver, true) {
                works(&mut text, row, *driver, prefix);
            }
        }
    }
    text.push_str(".SH KEYS OF KATA WITHOUT EFFECT\nValues that are not listed are errors.\n");
    for driver in Driver::ALL {
        for table in Table::ALL.into_iter().filter(|table| is_shown(*table, *driver)) {
            let _ = writeln!(text, ".SS [{}]", plain(&table.header(*driver)));
            for row in rows(table, *driver, false) {
                let accepted = reference::accepted(row).replace('`', "");
                let _ = write!(
                    text,
                    ".TP\n.BR {} \" ({})\"\n{}\n",
                    plain(row.name),
                    quoted(&accepted),
                    plain(&sentence(row.doc))
                );
            }
        }
    }
    let _ = write!(
        text,
        ".SH FILES\n.TP\n.I /etc/kata\\-containers/configuration.toml\nThe administrator's file.\n.TP\n\
         .I {}/share/defaults/kata\\-containers/configuration.toml\nThe file that is installed.\n",
        plain(prefix)
    );
    text
}

fn is_shown(table: Table, driver: Driver) -> bool {
    table == Table::Hypervisor || driver == Driver::default()
}

fn works(text: &mut String, row: &Key, driver: Driver, prefix: &str) {
    let takes = row.slot().map(Slot::takes).unwrap_or_default();
    let shown = default(row).replace("/usr/local", prefix);
    let _ = write!(text, ".TP\n.BR {} \" ({})\"\n{}\n", plain(row.name), quoted(&takes), plain(row.doc));
    if let Some(path) = row.alias_path(driver) {
        let unit =
            row.alias.and_then(|alias| alias.slot).map(|slot| format!(" ({})", slot.takes())).unwrap_or_default();
        let _ = writeln!(text, "The Rust runtime's name is {}{}.", plain(&path), plain(&unit));
    }
    let _ = writeln!(text, ".br\nDefault: {}", plain(&shown));
}

/// Without what roff takes for its own.
fn plain(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    // groff reads bytes of Latin-1
    let text: String = text
        .chars()
        .map(|one| if one.is_ascii() { one.to_string() } else { format!("\\[u{:04X}]", u32::from(one)) })
        .collect();
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

/// The same within a macro's argument in double quotes.
fn quoted(text: &str) -> String {
    plain(text).replace('"', "\\(dq")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    #[test]
    fn every_key_is_in_it_and_no_line_is_a_command_by_accident() {
        let text = man("/opt/x");
        for row in table::all() {
            assert!(text.contains(&format!(".BR {} ", plain(row.name))), "{}", row.name);
        }
        assert!(text.contains("/opt/x/share/kata") && !text.contains("/usr/local/"));
        assert!(text.is_ascii());
        for line in text.lines().filter(|line| line.starts_with('.')) {
            let name = line.split(' ').next().unwrap_or_default();
            assert!(
                [".\\\"", ".TH", ".SH", ".SS", ".TP", ".BR", ".PP", ".I", ".br", ".nh", ".ad"].contains(&name),
                "{line}"
            );
        }
    }
}
