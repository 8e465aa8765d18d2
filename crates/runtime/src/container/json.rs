//! Specifications as clients write them, in JSON. What runc passes over with a warning, where the types of the crate that
//! reads them know no such thing: capabilities that a newer, or another, system has.

use oci_spec::runtime::{Capability, Process, Spec};
use serde::de::DeserializeOwned;
use serde_json::{Error, Value};

const SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// A process, as in a request for an exec.
///
/// # Errors
/// What is wrong with it, and where.
pub fn process(text: &[u8]) -> Result<Process, Error> {
    read(text, |whole| Some(whole))
}

/// A whole specification.
pub(super) fn spec(text: &[u8]) -> Result<Spec, Error> {
    read(text, |whole| whole.get_mut("process"))
}

fn read<T: DeserializeOwned>(text: &[u8], process: impl Fn(&mut Value) -> Option<&mut Value>) -> Result<T, Error> {
    let mut value: Value = serde_json::from_slice(text)?;
    let unknown = process(&mut value).map(forget_unknown_capabilities).unwrap_or_default();
    if !unknown.is_empty() {
        tracing::warn!(capabilities = ?unknown, "ignoring unknown capabilities");
        return serde_json::from_value(value);
    }
    // only the text has lines, which an error names
    serde_json::from_value(value).or_else(|_| serde_json::from_slice(text))
}

/// Takes them out of all sets of a process, and returns them.
fn forget_unknown_capabilities(process: &mut Value) -> Vec<String> {
    let mut unknown = Vec::new();
    let Some(sets) = process.get_mut("capabilities").and_then(Value::as_object_mut) else { return unknown };
    for set in SETS {
        let Some(names) = sets.get_mut(set).and_then(Value::as_array_mut) else { continue };
        names.retain(|name| {
            let Some(text) = name.as_str() else { return true };
            let known = is_known(text);
            if !known && !unknown.iter().any(|known| known == text) {
                unknown.push(text.chars().take(80).collect());
            }
            known
        });
    }
    unknown
}

/// As it is written in specifications; the crate takes other spellings too.
fn is_known(name: &str) -> bool {
    serde_json::from_value::<Capability>(name.into())
        .and_then(serde_json::to_value)
        .is_ok_and(|written| written.as_str() == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_capabilities_are_passed_over() {
        let sets = serde_json::json!({"bounding": ["CAP_KILL", "CAP_FUTURE", "cap_chown", "SETUID"], "ambient": null,
            "effective": ["CAP_FUTURE"]});
        let text = serde_json::json!({"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/", "capabilities": sets});
        let read = process(text.to_string().as_bytes()).expect("read");
        let sets = read.capabilities().clone().expect("capabilities");
        assert_eq!(sets.bounding().clone().map(Vec::from_iter), Some(vec![Capability::Kill]));
        assert_eq!(sets.effective().clone().map(|set| set.len()), Some(0));
        let whole = serde_json::json!({"ociVersion": "1.0.2", "process": text, "root": {"path": "r"}});
        assert_eq!(spec(whole.to_string().as_bytes()).expect("read").process().as_ref(), Some(&read));
    }

    #[test]
    fn an_error_says_where() {
        let error = process(b"{\n \"args\": 7\n}").expect_err("no list").to_string();
        assert!(error.contains("line 2"), "{error}");
        process(b"[").expect_err("no JSON");
        process(b"7").expect_err("no process");
    }
}
