//! What the compiler does not check about the shape of the source: names of VMMs stay behind their border (`words`), folders of
//! the runtime do not import each other in a loop (`imports`), no file grows for ever (`length`), and neither does
//! the border (`traits`).

mod imports;
mod length;
mod traits;
mod words;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;

/// A source file: its path from the workspace's root on, with `/`, and its text.
#[derive(Debug)]
struct Source {
    path: String,
    text: String,
}

/// Prints the import graph, and everything that is wrong.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let mut sources = Vec::new();
    collect(workspace.root(), Path::new("crates"), &mut sources)?;
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    let graph = imports::Graph::of(&sources);
    print!("{graph}");
    let mut wrong = words::check(&sources);
    wrong.extend(imports::check(&graph));
    wrong.extend(length::check(&sources));
    wrong.extend(traits::check(&sources));
    for line in &wrong {
        eprintln!("tidy: {line}");
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{} things are not tidy (xtask/src/tidy)", wrong.len()) }
}

fn collect(root: &Path, folder: &Path, into: &mut Vec<Source>) -> Result<()> {
    let at = root.join(folder);
    for entry in fs::read_dir(&at).with_context(|| at.display().to_string())? {
        let entry = entry?;
        let path: PathBuf = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            collect(root, &path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(entry.path()).with_context(|| path.display().to_string())?;
            into.push(Source { path: path.display().to_string(), text });
        }
    }
    Ok(())
}

/// A file's text without its unit tests, which stand at its end.
fn without_tests(text: &str) -> &str {
    text.split_once("\n#[cfg(test)]\nmod tests {").map_or(text, |(code, _)| code)
}
