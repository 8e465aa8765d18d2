//! Keys that the table does not have: a warning with the most similar key, or an error where the file means something that is
//! not supported.

use crate::file::{Entry, Value};
use crate::value::refuse;
use crate::{Driver, Error, OneLine, table};

/// More than that are not listed: the file is then no configuration.toml.
const MOST_WARNINGS: usize = 32;

/// The keys that there are, and how many others were met.
pub(crate) struct Unknown {
    known: Vec<String>,
    met: usize,
}

impl Unknown {
    pub(crate) fn new() -> Self {
        Self { known: table::paths().collect(), met: 0 }
    }

    /// A key without a row.
    pub(crate) fn meet(&mut self, entry: &Entry, warnings: &mut Vec<String>) -> Result<(), Error> {
        let key = entry.key.as_str();
        if let Some(name) = key.strip_prefix("hypervisor.").and_then(|rest| rest.split('.').next())
            && Driver::named(name).is_none()
        {
            return Err(refuse(entry, "this hypervisor is not supported yet: use [hypervisor.qemu]"));
        }
        let known = self.known.iter().map(String::as_str);
        if known.clone().any(|name| name == key || within(name, key)) {
            // a table that is there and empty is no mistake
            return if entry.value == Value::Table { Ok(()) } else { Err(refuse(entry, "must be a table")) };
        }
        if let Some(name) = known.clone().find(|name| within(key, name)) {
            return Err(refuse(entry, format!("`{name}` is a key, not a table: set it in one line")));
        }
        self.met += 1;
        if self.met > MOST_WARNINGS {
            if self.met == MOST_WARNINGS + 1 {
                warnings.push(format!("{}: more unknown keys", entry.file.display()));
            }
            return Ok(());
        }
        let near = |name: &str| 1 + name.len() / 5;
        // names of quite another length are further away than that
        let alike = known.filter(|name| name.len().abs_diff(key.chars().count()) <= near(name));
        let hint = match alike.map(|name| (distance(name, key), name)).min() {
            Some((far, name)) if far <= near(name) => format!("; did you mean `{name}`?"),
            _ => String::new(),
        };
        let shown: String = key.chars().take(200).collect();
        let warning = format!("{}:{}: unknown key `{shown}`{hint}", entry.file.display(), entry.line);
        warnings.push(OneLine(warning).to_string());
        Ok(())
    }
}

/// Whether `key` is in the table `table`.
fn within(key: &str, table: &str) -> bool {
    key.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'))
}

/// The Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(200).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("kernel", "kernel"), 0);
        assert_eq!(distance("kernel", "kernal"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
