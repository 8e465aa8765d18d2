//! Programs for the tests that Debian 12 does not have: other generations of containerd, the CRI's tools, and those that
//! people use above containerd. Built once for each version, from the Go module proxy, and kept outside the checkout. Owns
//! the cache; table.rs has the versions, source.rs knows what a module needs before it builds, go.rs how Go is found.

mod go;
mod source;
mod table;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;
use crate::{cache, step};
use go::Go;
use table::{CLIENTS, Client, Program};

/// All of them in the cache, and links to them beside the tests' installation.
pub(crate) fn provide(workspace: &Workspace) -> Result<()> {
    step::timed("providing the test clients", || {
        let cache = cache::folder("kata-clients")?;
        let _alone = cache::lock(&cache)?;
        let missing: Vec<_> = CLIENTS.iter().filter(|client| !client.kept(&cache).is_dir()).collect();
        if !missing.is_empty() {
            // what an interrupted build has left; we hold the lock
            let work = cache.join("build");
            cache::remove(&work)?;
            let built = build(&missing, &cache, &work);
            let cleaned = cache::remove(&work);
            built.and(cleaned)?;
        }
        for client in &CLIENTS {
            link(&client.kept(&cache), &workspace.test_clients().join(client.role))?;
            println!("    {}", client.kept(&cache).join("bin").display());
        }
        Ok(())
    })
}

impl Client {
    fn kept(&self, cache: &Path) -> PathBuf {
        cache.join(format!("{}-{}", self.name, self.version))
    }
}

fn build(missing: &[&Client], cache: &Path, work: &Path) -> Result<()> {
    fs::create_dir_all(work).with_context(|| format!("{} cannot be made", work.display()))?;
    let go = Go::find(work)?;
    println!("    by {go}, some minutes of CPU, once for each version");
    for client in missing {
        step::timed(&format!("building {} {}", client.name, client.version), || client.build(&go, cache, work))?;
    }
    Ok(())
}

impl Client {
    fn build(&self, go: &Go, cache: &Path, work: &Path) -> Result<()> {
        let source = work.join("source");
        source::prepare(self, go, &source)?;
        let result = work.join("result");
        cache::remove(&result)?;
        let bin = result.join("bin");
        fs::create_dir_all(&bin).with_context(|| format!("{} cannot be made", bin.display()))?;
        for program in self.programs {
            let mut command = go.command(&source);
            let action: &[&str] = if program.is_test { &["test", "-c"] } else { &["build"] };
            command.args(action).args(self.source.flags()).args([
                "-p",
                "2",
                "-trimpath",
                "-tags",
                self.tags,
                "-ldflags",
                &self.link_flags(),
            ]);
            command.arg("-o").arg(bin.join(program.name)).arg(format!("./cmd/{}", program.name));
            step::run(&mut command)?;
            self.check(&bin, program)?;
        }
        // complete or not there at all
        let kept = self.kept(cache);
        fs::rename(&result, &kept).with_context(|| format!("{} cannot be put in place", kept.display()))
    }

    fn link_flags(&self) -> String {
        let stamps = self.stamps.iter();
        stamps
            .fold("-s -w".to_owned(), |flags, (symbol, prefix)| format!("{flags} -X {symbol}={prefix}{}", self.version))
    }

    fn check(&self, bin: &Path, program: &Program) -> Result<()> {
        let path = bin.join(program.name);
        let shown = step::output(step::command(&path.display().to_string()).arg(program.version_flag))?;
        ensure!(shown.contains(self.version), "{} says that it is {shown:?}, not {}", program.name, self.version);
        Ok(())
    }
}

/// The link replaces an older one.
fn link(to: &Path, at: &Path) -> Result<()> {
    let make = || {
        fs::create_dir_all(at.parent().unwrap_or(at))?;
        match fs::remove_file(at) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => symlink(to, at),
        }
    };
    make().with_context(|| format!("{} cannot be made a link to {}", at.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart_by_role_and_folder() {
        for (n, one) in CLIENTS.iter().enumerate() {
            for other in &CLIENTS[n + 1..] {
                assert_ne!(one.role, other.role);
                assert_ne!(one.kept(Path::new("/c")), other.kept(Path::new("/c")));
            }
        }
    }

    #[test]
    fn the_version_is_linked_in() {
        let containerd = CLIENTS.iter().find(|client| client.role == "containerd-2").expect("in the table");
        let flags = containerd.link_flags();
        assert_eq!(
            flags,
            format!("-s -w -X github.com/containerd/containerd/v2/version.Version=v{}", containerd.version)
        );
    }

    #[test]
    fn a_link_follows_the_version() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let at = folder.path().join("links/containerd-2");
        link(Path::new("/old"), &at)?;
        link(Path::new("/new"), &at)?;
        assert_eq!(fs::read_link(&at)?, Path::new("/new"));
        Ok(())
    }
}
