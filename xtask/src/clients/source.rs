//! What a module's source needs before Go builds it by itself: some are published as parts of something larger.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::go::Go;
use super::table::Client;
use crate::{cache, step};

/// In which state a module is published.
pub(super) enum Source {
    /// As it is built.
    Whole,
    /// It requires a module that exists only in its own repository, and files use it that the program does not need.
    Without { module: &'static str, version: &'static str, files: &'static [&'static str] },
    /// It has no go.mod but a vendor.mod of the same content, and its version is `+incompatible` therefore.
    Vendored,
    /// It requires modules of its own repository by a version that does not exist; they are published by this one.
    Staged { prefix: &'static str, version: &'static str },
}

impl Source {
    /// How Go is told to take it.
    pub(super) fn flags(&self) -> &'static [&'static str] {
        match self {
            // go.sum does not have the sums of what was replaced; Go's database of checksums has
            Self::Staged { .. } => &["-mod=mod"],
            _ => &[],
        }
    }

    fn suffix(&self) -> &'static str {
        match self {
            Self::Vendored => "+incompatible",
            _ => "",
        }
    }
}

/// Lays the client's source out in a folder, to be built there.
pub(super) fn prepare(client: &Client, go: &Go, at: &Path) -> Result<()> {
    let module = go.download(client.module, &format!("v{}{}", client.version, client.source.suffix()))?;
    // Go builds nothing inside its cache, and the module's own go.sum counts only where it is the main module
    cache::remove(at)?;
    step::run(step::command("cp").args(["-R", "--no-preserve=mode", "--"]).arg(&module).arg(at))?;
    // a list of packages without them: Go would believe that they are there
    cache::remove(&at.join("vendor"))?;
    let edit = |changes: &[String]| step::run(go.command(at).args(["mod", "edit"]).args(changes));
    match client.source {
        Source::Whole => Ok(()),
        Source::Without { module, version, files } => {
            edit(&[format!("-droprequire={module}"), format!("-dropreplace={module}@{version}")])?;
            for file in files.iter().map(|file| at.join(file)) {
                fs::remove_file(&file).with_context(|| format!("{} cannot be left out", file.display()))?;
            }
            Ok(())
        }
        Source::Vendored => ["mod", "sum"].into_iter().try_for_each(|end| {
            let (from, to) = (at.join(format!("vendor.{end}")), at.join(format!("go.{end}")));
            fs::rename(&from, &to).with_context(|| format!("{} cannot be renamed", from.display()))
        }),
        Source::Staged { prefix, version } => {
            let file = at.join("go.mod");
            let text = fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?;
            let replaced = staged(&text, prefix).map(|name| format!("-replace={name}={name}@{version}"));
            edit(&replaced.collect::<Vec<_>>())
        }
    }
}

/// The modules with that prefix that are required by no real version.
fn staged<'a>(go_mod: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    go_mod.lines().filter_map(move |line| {
        let (name, version) = line.trim().trim_start_matches("require ").split_once(' ')?;
        (name.starts_with(prefix) && version.split(' ').next() == Some("v0.0.0")).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::staged;

    #[test]
    fn only_versions_that_do_not_exist_are_replaced() {
        let text = "module k8s.io/kubernetes\n\nrequire (\n\tk8s.io/api v0.0.0\n\tk8s.io/klog/v2 v2.140.0\n\
                    \tk8s.io/kms v0.0.0 // indirect\n\tk8s.io/utils v0.0.0-2026\n)\nrequire k8s.io/one v0.0.0\n";
        assert_eq!(staged(text, "k8s.io/").collect::<Vec<_>>(), ["k8s.io/api", "k8s.io/kms", "k8s.io/one"]);
    }
}
