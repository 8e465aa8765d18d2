//! Which file a program's name means, and runc's words when there is none.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;

use super::child::Outcome;
use crate::error::words;

/// The path to execute. Names without a slash are looked for in the `PATH` of `env`.
pub(super) fn find(name: &str, env: &[String]) -> Outcome<String> {
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied || error.raw_os_error() == Some(libc::EISDIR) =>
            {
                Err(format!("exec: {name:?}: {}", words(&error)))
            }
            Err(error) => Err(format!("exec: {name:?}: stat {name}: {}", words(&error))),
        };
    }
    let path = env.iter().rev().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or_default();
    for folder in path.split(':') {
        let folder = if folder.is_empty() { "." } else { folder };
        let candidate = format!("{}/{name}", folder.trim_end_matches('/'));
        if executable(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(format!("exec: {name:?}: executable file not found in $PATH"))
}

fn executable(path: &str) -> io::Result<()> {
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if meta.permissions().mode() & 0o111 == 0 {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_runc_words_it() {
        let env = vec!["PATH=/nowhere:/bin".to_owned()];
        assert_eq!(find("sh", &env).as_deref(), Ok("/bin/sh"));
        assert_eq!(find("nosuch", &env), Err("exec: \"nosuch\": executable file not found in $PATH".into()));
        assert_eq!(find("/no/such", &env), Err("exec: \"/no/such\": stat /no/such: no such file or directory".into()));
        assert_eq!(find("/etc/passwd", &env), Err("exec: \"/etc/passwd\": permission denied".into()));
        assert_eq!(find("/etc", &env), Err("exec: \"/etc\": is a directory".into()));
        assert_eq!(find("sh", &[]), Err("exec: \"sh\": executable file not found in $PATH".into()));
    }
}
