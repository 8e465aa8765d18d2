//! The kernel's configuration as we keep it: fragments by topic, merged in the order of their names, and the question
//! whether the kernel's own tools took every line of them. A symbol that depends on one we did not set is dropped by
//! them without a word; found here, it costs a minute, found in a guest, a day.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// All fragments that an architecture needs, as one text.
pub(super) fn merge(directory: &Path, arch: &str) -> Result<String> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("the kernel's fragments {} cannot be listed", directory.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        names.push(name.into_string().map_err(|name| anyhow::anyhow!("{} is not UTF-8", name.display()))?);
    }
    names.sort();
    let platform = format!("platform-{arch}.conf");
    if !names.contains(&platform) {
        bail!("{} is missing: there is no guest kernel for {arch} yet", directory.join(platform).display());
    }
    let mut merged = String::new();
    for name in names.iter().filter(|name| Path::new(name).extension().is_some_and(|kind| kind == "conf")) {
        if name.starts_with("platform-") && *name != platform {
            continue;
        }
        let path = directory.join(name);
        merged += &fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        if !merged.ends_with('\n') {
            merged.push('\n');
        }
    }
    symbols(&merged)?;
    Ok(merged)
}

/// All patches of `directory`/patches in the order of their names, as one text.
pub(super) fn patches(directory: &Path) -> Result<String> {
    let directory = directory.join("patches");
    let cannot = || format!("the kernel's patches {} cannot be read", directory.display());
    let entries = fs::read_dir(&directory).with_context(cannot)?.collect::<std::io::Result<Vec<_>>>();
    let mut paths: Vec<_> = entries.with_context(cannot)?.into_iter().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|kind| kind == "patch"));
    paths.sort();
    paths.iter().map(|path| fs::read_to_string(path).with_context(|| path.display().to_string())).collect()
}

/// Fails with the name of every symbol that `config` does not have as the fragments want it.
pub(super) fn verify(fragments: &str, config: &str) -> Result<()> {
    let (wanted, has) = (symbols(fragments)?, symbols(config)?);
    let mut wrong = Vec::new();
    for (symbol, value) in wanted {
        let found = has.get(symbol).copied().unwrap_or("n");
        if found != value {
            wrong.push(format!("{symbol} is {found} instead of {value}"));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    bail!(
        "the kernel's configuration dropped {} of guest/kernel/'s lines, for what they depend on: {}",
        wrong.len(),
        wrong.join(", ")
    )
}

/// Symbol to value; `n` is how "is not set" reads.
fn symbols(text: &str) -> Result<BTreeMap<&str, &str>> {
    let mut symbols = BTreeMap::new();
    for line in text.lines().map(str::trim_end) {
        let unset = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set"));
        let (symbol, value) = match (unset, line.split_once('=')) {
            (Some(symbol), _) if symbol.starts_with("CONFIG_") && !symbol.contains(' ') => (symbol, "n"),
            _ if line.is_empty() || line.starts_with('#') => continue,
            (None, Some((symbol, value))) if symbol.starts_with("CONFIG_") => (symbol, value),
            _ => bail!("{line:?} is neither CONFIG_X=value nor \"# CONFIG_X is not set\" nor a comment"),
        };
        if let Some(other) = symbols.insert(symbol, value).filter(|other| *other != value) {
            bail!("{symbol} is wanted as {other} and as {value}: keep one of the two lines");
        }
    }
    Ok(symbols)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_passes() -> Result<()> {
        verify("# why\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=n\nCONFIG_D=\"x\"\n", "CONFIG_A=y\nCONFIG_D=\"x\"\n")
    }

    #[test]
    fn every_dropped_symbol_is_named() {
        let error = verify("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\n", "CONFIG_B=y\nCONFIG_C=y\n").unwrap_err().to_string();
        assert!(error.contains("CONFIG_A is n instead of y, CONFIG_C is y instead of n"), "{error}");
        assert!(!error.contains("CONFIG_B"), "{error}");
    }

    #[test]
    fn contradictions_and_misspellings_are_refused() {
        assert!(symbols("CONFIG_A=y\nCONFIG_A=n\n").is_err());
        assert!(symbols("CONFIG_A y\n").is_err());
        assert!(symbols("CONFIG_A=y\nCONFIG_A=y\n").is_ok());
    }

    #[test]
    fn only_our_platform_is_merged() -> Result<()> {
        let directory = tempfile::tempdir()?;
        for (name, text) in [("b.conf", "CONFIG_B=y"), ("a.conf", "CONFIG_A=y"), ("platform-x.conf", "CONFIG_X=y")] {
            fs::write(directory.path().join(name), text)?;
        }
        fs::write(directory.path().join("platform-z.conf"), "CONFIG_Z=y")?;
        assert_eq!(merge(directory.path(), "x")?, "CONFIG_A=y\nCONFIG_B=y\nCONFIG_X=y\n");
        assert!(merge(directory.path(), "y").is_err());
        Ok(())
    }
}
