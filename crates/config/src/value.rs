//! Values: of the right type and within limits, or an error that says what is allowed.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::file::{Entry, Value};

/// No VM is larger, whatever the host says.
pub(crate) const MOST_MEMORY_MIB: u64 = 16 << 20;

pub(crate) fn refuse(entry: &Entry, allowed: impl Into<String>) -> Error {
    Error::Value {
        file: entry.file.clone(),
        line: entry.line,
        key: entry.key.clone(),
        value: entry.value.to_string(),
        allowed: allowed.into(),
    }
}

pub(crate) fn text(entry: &Entry) -> Result<&str, Error> {
    match &entry.value {
        Value::Text(text) => Ok(text),
        _ => Err(refuse(entry, "must be a string")),
    }
}

/// A string that becomes a part of one argument: no line breaks.
pub(crate) fn text_line(entry: &Entry) -> Result<String, Error> {
    let text = text(entry)?;
    if !is_line(text) {
        return Err(refuse(entry, "must be one line of at most 2048 bytes"));
    }
    Ok(text.to_owned())
}

fn is_line(text: &str) -> bool {
    text.len() <= 2048 && !text.chars().any(char::is_control)
}

pub(crate) fn is_absolute(entry: &Entry) -> Result<PathBuf, Error> {
    let path = PathBuf::from(text_line(entry)?);
    if path.is_absolute() { Ok(path) } else { Err(refuse(entry, "must be an absolute path")) }
}

/// A path as a string of TOML.
pub(crate) fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}

/// A path of a socket, which has room for 107 bytes (unix(7)).
pub(crate) fn endpoint(entry: &Entry) -> Result<PathBuf, Error> {
    let path = is_absolute(entry)?;
    if path.as_os_str().len() <= 107 { Ok(path) } else { Err(refuse(entry, "must be at most 107 bytes long")) }
}

pub(crate) fn truth(entry: &Entry) -> Result<bool, Error> {
    match entry.value {
        Value::Bool(truth) => Ok(truth),
        _ => Err(refuse(entry, "must be true or false")),
    }
}

pub(crate) fn number(entry: &Entry, least: u64, most: u64) -> Result<u64, Error> {
    match entry.value {
        Value::Integer(number) if u64::try_from(number).is_ok_and(|number| (least..=most).contains(&number)) => {
            Ok(number as u64)
        }
        _ => Err(refuse(entry, format!("must be a whole number from {least} to {most}"))),
    }
}

/// MiB; [`crate::host`] checks that the host has as much.
pub(crate) fn memory(entry: &Entry) -> Result<u64, Error> {
    number(entry, 128, MOST_MEMORY_MIB).map_err(|_| refuse(entry, crate::host::memory_range()))
}

/// Kata allows fractions, which are rounded up; 0 is 1; negative and more than the host has are all of the host's.
pub(crate) fn vcpus(entry: &Entry) -> Result<u32, Error> {
    let host = host_cpus();
    match entry.value {
        Value::Integer(number) => Ok(u32::try_from(number).map_or(host, |number| number.clamp(1, host))),
        Value::Float(number) if number.is_finite() && number < 0.0 => Ok(host),
        Value::Float(number) if number.is_finite() => Ok((number.ceil() as u32).clamp(1, host)),
        _ => Err(refuse(entry, format!("must be a number of processors: 1 to {host}, or -1 for all of this host's"))),
    }
}

pub(crate) fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

/// Bytes of a disk's sector within QEMU's limits; 0 is the VMM's default.
pub(crate) fn sector(entry: &Entry) -> Result<u32, Error> {
    match number(entry, 0, 32 << 10) {
        Ok(size) if size == 0 || (size >= 512 && size.is_power_of_two()) => Ok(size as u32),
        _ => Err(refuse(entry, "must be 0 or a power of two from 512 to 32768")),
    }
}

/// Entries of a virtqueue.
pub(crate) fn queue_size(entry: &Entry) -> Result<u32, Error> {
    let size = number(entry, 2, 1024).ok().filter(|size| size.is_power_of_two());
    size.map(|size| size as u32).ok_or_else(|| refuse(entry, "must be a power of two from 2 to 1024"))
}

pub(crate) fn list(entry: &Entry) -> Result<Vec<String>, Error> {
    match &entry.value {
        Value::List(list) if list.iter().all(|item| is_line(item)) => Ok(list.clone()),
        Value::List(_) => Err(refuse(entry, "must be strings of one line of at most 2048 bytes")),
        _ => Err(refuse(entry, "must be a list of strings")),
    }
}

pub(crate) fn one_of<T: Clone>(entry: &Entry, allowed: &[(&str, T)]) -> Result<T, Error> {
    let text = text(entry)?;
    allowed.iter().find(|(name, _)| *name == text).map(|(_, value)| value.clone()).ok_or_else(|| {
        let names: Vec<_> = allowed.iter().map(|(name, _)| format!("{name:?}")).collect();
        refuse(entry, format!("must be {}", names.join(" or ")))
    })
}

/// For a key with one value that works so far: Kata's others are refused in other words than mistakes.
pub(crate) fn only(entry: &Entry, works: &str, later: &[&str]) -> Result<(), Error> {
    match text(entry)? {
        text if text == works => Ok(()),
        text if later.contains(&text) => Err(refuse(entry, format!("is not supported yet: must be {works:?}"))),
        _ => Err(refuse(entry, format!("must be {works:?}"))),
    }
}
