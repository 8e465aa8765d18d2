//! Where a process's output shall go, as containerd says it: a path, or a log URI (`file://`, `binary://`).

use std::path::{Path, PathBuf};

use super::Stdio;
use crate::Error;

/// Of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    /// Thrown away.
    Nowhere,
    /// What is there: a named pipe as a rule, else a file.
    Path(PathBuf),
    /// A file, made with its folders where there is none; written at its end.
    File(PathBuf),
    /// A program that gets it, both streams together.
    Program(Program),
}

/// A log program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) args: Vec<String>,
}

/// Of both streams of a process.
///
/// # Errors
/// [`Error::Invalid`], which names the stream and its value.
pub(super) fn of(stdio: &Stdio) -> Result<(Destination, Destination), Error> {
    let stdout = parse("stdout", &stdio.stdout)?;
    // a terminal has one output
    if stdio.terminal {
        return Ok((stdout, Destination::Nowhere));
    }
    let stderr = parse("stderr", &stdio.stderr)?;
    let is_stdouts = stderr == stdout || stderr == Destination::Nowhere;
    match (&stdout, &stderr) {
        (Destination::Program(_), _) if !is_stdouts => Err(Error::Invalid(format!(
            "stderr {:.200?}: the log program of stdout takes both streams, so stderr must be the same URI",
            stdio.stderr
        ))),
        (Destination::Program(_), _) => Ok((stdout, Destination::Nowhere)),
        (_, Destination::Program(_)) => Err(Error::Invalid(format!(
            "stderr {:.200?}: a log program takes both streams, so stdout must be the same URI",
            stdio.stderr
        ))),
        _ => Ok((stdout, stderr)),
    }
}

fn parse(stream: &str, text: &str) -> Result<Destination, Error> {
    let refused = |why: &str| Error::Invalid(format!("{stream} {text:.200?}: {why}"));
    if text.is_empty() {
        return Ok(Destination::Nowhere);
    }
    let Some((scheme, rest)) = text.split_once(':').filter(|(scheme, _)| is_scheme(scheme)) else {
        return Ok(Destination::Path(text.into()));
    };
    if !["file", "binary"].contains(&scheme) {
        return Err(refused(&format!(
            "unknown STDIO scheme {scheme}: it must be a named pipe's path, file:///PATH or binary:///PROGRAM?KEY=VALUE"
        )));
    }
    let rest = rest.split('#').next().unwrap_or_default();
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    // a host before the path means nothing here, as with containerd's shim
    let path = place.strip_prefix("//").map_or(place, |rest| rest.find('/').map_or("", |at| &rest[at..]));
    let path = decoded(path, false).ok_or_else(|| refused("invalid percent-encoding in its path"))?;
    if !Path::new(&path).is_absolute() {
        return Err(refused(&format!("a {scheme} URI must have an absolute path, such as {scheme}:///var/log/x")));
    }
    if scheme == "file" {
        return Ok(Destination::File(path.into()));
    }
    let args = arguments(query).ok_or_else(|| refused("invalid percent-encoding in its query"))?;
    Ok(Destination::Program(Program { path: path.into(), args }))
}

/// As RFC 3986 has it. A path begins with `/`, so it never is one.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// A query's keys and values, one after the other, each key once with its first value; in its order.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let (key, value) = (decoded(key, true)?, decoded(value, true)?);
        if pairs.iter().all(|(known, _)| *known != key) {
            pairs.push((key, value));
        }
    }
    Some(pairs.into_iter().flat_map(|(key, value)| [key, value]).collect())
}

/// Without its % codes; in a query `+` is a space. `None` for what is no text, or cannot be a name: a zero.
fn decoded(text: &str, in_query: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let (high, low) = (digit()?, digit()?);
                u8::try_from(high << 4 | low).ok()?
            }
            b'+' if in_query => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(path: &str, args: &[&str]) -> Destination {
        let args = args.iter().map(ToString::to_string).collect();
        Destination::Program(Program { path: path.into(), args })
    }

    fn both(stdout: &str, stderr: &str, terminal: bool) -> Result<(Destination, Destination), Error> {
        of(&Stdio { stdout: stdout.into(), stderr: stderr.into(), terminal, ..Stdio::default() })
    }

    #[test]
    fn paths_files_and_programs() {
        let parsed = |text: &str| parse("stdout", text).expect(text);
        assert_eq!(parsed(""), Destination::Nowhere);
        assert_eq!(parsed("/run/a:b"), Destination::Path("/run/a:b".into()));
        assert_eq!(parsed("file:///var/log/a%20b?x#y"), Destination::File("/var/log/a b".into()));
        assert_eq!(parsed("binary:///bin/log"), program("/bin/log", &[]));
        let nerdctl = "binary:///usr/local/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fnerdctl%2F1935db59";
        let data = ["_NERDCTL_INTERNAL_LOGGING", "/var/lib/nerdctl/1935db59"];
        assert_eq!(parsed(nerdctl), program("/usr/local/bin/nerdctl", &data));
        let odd = parsed("binary:///l?b=1+2&a&b=3&&c=x%3dy");
        assert_eq!(odd, program("/l", &["b", "1 2", "a", "", "c", "x=y"]));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (text, words) in [
            ("npipe:////./pipe/log", "unknown STDIO scheme npipe"),
            ("attachablebinary:///bin/log", "unknown STDIO scheme attachablebinary"),
            ("https://example.com/", "unknown STDIO scheme https"),
            ("file://relative", "absolute path"),
            ("file:relative", "absolute path"),
            ("binary://", "absolute path"),
            ("file:///%zz", "percent-encoding"),
            ("binary:///x?a=%0", "percent-encoding"),
            ("file:///%00", "percent-encoding"),
        ] {
            let said = parse("stdout", text).expect_err(text).to_string();
            assert!(said.contains(words) && said.contains(text), "{said}");
        }
    }

    #[test]
    fn a_program_takes_both_streams() {
        let one = program("/l", &[]);
        for stderr in ["", "binary:///l"] {
            assert_eq!(both("binary:///l", stderr, false).expect("fine"), (one.clone(), Destination::Nowhere));
        }
        assert_eq!(both("binary:///l", "/run/x", true).expect("fine"), (one, Destination::Nowhere));
        both("binary:///l", "file:///x", false).expect_err("two");
        both("", "binary:///l", false).expect_err("half");
        let file = Destination::File("/x".into());
        assert_eq!(both("file:///x", "file:///x", false).expect("fine"), (file.clone(), file));
    }
}
