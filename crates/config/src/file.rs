//! Files → entries: each key with its value, file and line.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::Error;

/// Largest file, bytes.
const LIMIT: u64 = 1 << 20;

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
    Other(&'static str),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{:?}", text.chars().take(200).collect::<String>()),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number}"),
            Self::Bool(truth) => write!(f, "{truth}"),
            Self::List(list) => write!(f, "{list:?}"),
            Self::Other(kind) => write!(f, "({kind})"),
        }
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<Entry>, Error> {
    let unreadable = |why: String| Error::Unreadable { file: path.to_owned(), why };
    let mut text = String::new();
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err(unreadable("is not a file".into()));
    }
    file.take(LIMIT + 1).read_to_string(&mut text).map_err(|error| unreadable(error.to_string()))?;
    if text.len() as u64 > LIMIT {
        return Err(unreadable(format!("is larger than {LIMIT} bytes: shorten it")));
    }
    parse(&text, path)
}

/// `config.d/*.toml` beside the base file, in alphabetical order.
pub(crate) fn drop_ins(base: &Path) -> Result<Vec<PathBuf>, Error> {
    let Some(folder) = base.parent().map(|parent| parent.join("config.d")) else { return Ok(Vec::new()) };
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::Unreadable { file: folder, why: error.to_string() }),
    };
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect();
    files.sort();
    Ok(files)
}

pub(crate) fn parse(text: &str, source: &Path) -> Result<Vec<Entry>, Error> {
    let line_at = |offset: usize| text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1;
    let table = DeTable::parse(text).map_err(|error| Error::Syntax {
        file: source.to_owned(),
        line: line_at(error.span().map_or(0, |span| span.start)),
        why: error.message().replace('\n', ", "),
    })?;
    let mut entries = Vec::new();
    collect(table.get_ref(), "", &mut |key, value, offset| {
        entries.push(Entry { key, value, file: source.to_owned(), line: line_at(offset) });
    });
    Ok(entries)
}

fn collect(table: &DeTable<'_>, prefix: &str, found: &mut impl FnMut(String, Value, usize)) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
        match value.get_ref() {
            // tables nest as deep as the parser allows, which is bounded
            DeValue::Table(inner) => collect(inner, &name, found),
            other => found(name, plain(other), key.span().start),
        }
    }
}

fn plain(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(&number.as_str().replace('_', ""), number.radix())
            .map_or(Value::Other("number"), Value::Integer),
        DeValue::Float(number) => number.as_str().replace('_', "").parse().map_or(Value::Other("number"), Value::Float),
        DeValue::Boolean(truth) => Value::Bool(*truth),
        DeValue::Array(items) => items
            .iter()
            .map(|item| match item.get_ref() {
                DeValue::String(text) => Some(text.to_string()),
                _ => None,
            })
            .collect::<Option<_>>()
            .map_or(Value::Other("list of other things than strings"), Value::List),
        DeValue::Datetime(_) => Value::Other("date"),
        DeValue::Table(_) => Value::Other("table"),
    }
}
