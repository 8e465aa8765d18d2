//! The documentation that is made from the code: written by `xtask docs`, compared by `make check`.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// Writes docs/configuration.md.
pub(crate) fn write(workspace: &Workspace) -> Result<()> {
    let path = workspace.reference();
    fs::write(&path, config::render::reference()).with_context(|| format!("{} cannot be written", path.display()))?;
    println!("    {}", path.display());
    Ok(())
}

/// Fails where docs/configuration.md is not what `write` would make of it.
pub(crate) fn compare(workspace: &Workspace) -> Result<()> {
    let path = workspace.reference();
    let text = fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let is_current = text == config::render::reference();
    ensure!(is_current, "{} differs from the table of keys: run `cargo run -p xtask docs`", path.display());
    Ok(())
}
