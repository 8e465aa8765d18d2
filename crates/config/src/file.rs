//! Files → entries: each key that was set, with its value, file and line. What the keys mean is `keys`' affair.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::Error;

/// Largest file, bytes.
const LIMIT: u64 = 1 << 20;
/// Longest part of a key or a value that an error repeats, characters.
const SHOWN: usize = 200;

/// One key that was set.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// With its tables, for example `hypervisor.qemu.kernel`.
    pub(crate) key: String,
    pub(crate) value: Value,
    pub(crate) file: PathBuf,
    pub(crate) line: usize,
}

/// What a key can be set to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    List(Vec<String>),
    /// A table without a key: one with keys is its keys.
    Table,
    /// What no key here takes, as an error shows it.
    Other(String),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(&shorten(&format!("{text:?}"))),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number}"),
            Self::Bool(truth) => write!(f, "{truth}"),
            Self::List(list) => f.write_str(&shorten(&format!("{list:?}"))),
            Self::Table => f.write_str("(a table)"),
            Self::Other(shown) => f.write_str(&shorten(shown)),
        }
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<Entry>, Error> {
    let unreadable = |why: String| Error::Unreadable { file: path.to_owned(), why };
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => {
            unreadable("no such file: correct --config, KATA_CONF_FILE, or ConfigPath in the runtime's options".into())
        }
        _ => unreadable(error.to_string()),
    };
    // asked before it is opened: a FIFO would wait for its writer
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(unreadable("is not a regular file: name a configuration.toml".into()));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(LIMIT + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > LIMIT {
        return Err(unreadable(format!("is larger than {LIMIT} bytes: shorten it")));
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| Error::Syntax {
        file: path.to_owned(),
        line: bytes.iter().take(error.valid_up_to()).filter(|byte| **byte == b'\n').count() + 1,
        why: "is not UTF-8 text".into(),
    })?;
    parse(text, path)
}

/// `config.d/*.toml` beside the base file, in alphabetical order.
pub(crate) fn drop_ins(base: &Path) -> Result<Vec<PathBuf>, Error> {
    let Some(folder) = base.parent().map(|parent| parent.join("config.d")) else { return Ok(Vec::new()) };
    let unreadable = |error: std::io::Error| Error::Unreadable { file: folder.clone(), why: error.to_string() };
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        // editors' hidden copies are not meant
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

pub(crate) fn parse(text: &str, source: &Path) -> Result<Vec<Entry>, Error> {
    let breaks: Vec<usize> = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect();
    let line_at = |offset: usize| breaks.partition_point(|at| *at < offset) + 1;
    let table = DeTable::parse(text).map_err(|error| Error::Syntax {
        file: source.to_owned(),
        line: line_at(error.span().map_or(0, |span| span.start)),
        why: format!("not TOML: {}", shorten(&error.message().replace('\n', ", "))),
    })?;
    let mut entries = Vec::new();
    collect(table.get_ref(), "", &mut |key, value, offset| {
        entries.push(Entry { key, value, file: source.to_owned(), line: line_at(offset) });
    });
    Ok(entries)
}

fn collect(table: &DeTable<'_>, prefix: &str, found: &mut impl FnMut(String, Value, usize)) {
    for (key, value) in table {
        let part = part(key.get_ref());
        let name = if prefix.is_empty() { part } else { format!("{prefix}.{part}") };
        match value.get_ref() {
            // tables nest as deep as the parser allows, which is bounded
            DeValue::Table(inner) if !inner.is_empty() => collect(inner, &name, found),
            other => found(name, plain(other), key.span().start),
        }
    }
}

/// A key's name between dots; one that is not bare keeps its quotes, so that `"a.b"` is not taken for `a.b`.
fn part(name: &str) -> String {
    let bare = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !name.is_empty() && name.len() <= SHOWN && name.bytes().all(bare) {
        name.to_owned()
    } else {
        shorten(&format!("{name:?}"))
    }
}

fn plain(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(&number.as_str().replace('_', ""), number.radix())
            .map_or_else(|_| Value::Other(number.to_string()), Value::Integer),
        DeValue::Float(number) => {
            number.as_str().replace('_', "").parse().map_or_else(|_| Value::Other(number.to_string()), Value::Float)
        }
        DeValue::Boolean(truth) => Value::Bool(*truth),
        DeValue::Array(items) => items
            .iter()
            .map(|item| match item.get_ref() {
                DeValue::String(text) => Some(text.to_string()),
                _ => None,
            })
            .collect::<Option<_>>()
            .map_or_else(|| Value::Other("(a list of other things than strings)".into()), Value::List),
        DeValue::Datetime(date) => Value::Other(date.to_string()),
        DeValue::Table(_) => Value::Table,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(text: &str) -> Vec<(String, Value, usize)> {
        let entries = parse(text, Path::new("/c.toml")).expect("is TOML");
        entries.into_iter().map(|entry| (entry.key, entry.value, entry.line)).collect()
    }

    #[test]
    fn keys_carry_their_tables_and_lines() {
        let found = entries("top = 1\n[a.b]\n\nc = \"x\"\nd.e = [\"1\"]\n[empty]\n");
        assert!(found.contains(&("top".into(), Value::Integer(1), 1)));
        assert!(found.contains(&("a.b.c".into(), Value::Text("x".into()), 4)));
        assert!(found.contains(&("a.b.d.e".into(), Value::List(vec!["1".into()]), 5)));
        assert!(found.contains(&("empty".into(), Value::Table, 6)));
    }

    #[test]
    fn windows_line_ends_count_once() {
        assert_eq!(entries("a = 1\r\nb = 2\r\n")[1].2, 2);
    }

    #[test]
    fn quoted_names_stay_apart_from_dotted_ones() {
        assert_eq!(entries("\"a.b\" = 1")[0].0, "\"a.b\"");
        assert_eq!(entries("\"a\\nb\" = 1")[0].0, "\"a\\nb\"");
    }

    #[test]
    fn numbers_of_every_shape() {
        assert_eq!(entries("a = 0x1_0")[0].1, Value::Integer(16));
        assert_eq!(entries("a = 1_0.5")[0].1, Value::Float(10.5));
        assert_eq!(entries("a = 99999999999999999999")[0].1.to_string(), "99999999999999999999");
        assert_eq!(entries("a = [1, 2]")[0].1.to_string(), "(a list of other things than strings)");
    }

    #[test]
    fn what_is_shown_is_short() {
        let long = "é".repeat(10_000);
        assert!(Value::Text(long.clone()).to_string().chars().count() <= SHOWN + 1);
        assert!(Value::List(vec![long; 9]).to_string().chars().count() <= SHOWN + 1);
    }
}
