//! Which Go builds, and how it is called. One that knows how to fetch a newer one by itself (1.21 and later) is left to do
//! so; Debian 12's does not know, so we fetch the newer one with it: toolchains are modules like any other.

use std::fmt;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step;

/// For a Go that is too old: new enough for everything in the table.
const TOOLCHAIN: &str = "1.26.8";

/// From here on Go obeys GOTOOLCHAIN.
const KNOWS_TOOLCHAINS: (u32, u32) = (1, 21);

/// Where Go's own archive is unpacked, which not every PATH has.
const USUAL: &str = "/usr/local/go/bin/go";

/// A Go that can build everything in the table.
pub(super) struct Go {
    program: PathBuf,
    version: String,
    /// Of its compiled packages: ours alone, to be gone with the rest.
    build_cache: PathBuf,
}

impl fmt::Display for Go {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.version, self.program.display())
    }
}

impl Go {
    /// The best there is; `work` takes what it needs for this build.
    pub(super) fn find(work: &Path) -> Result<Self> {
        let found: Vec<_> = ["go", USUAL].into_iter().filter_map(|program| Self::at(program.into(), work)).collect();
        if let Some(able) = found.iter().position(|go| at_least(&go.version, KNOWS_TOOLCHAINS)) {
            return Ok(found.into_iter().nth(able).context("a Go just found")?);
        }
        let Some(old) = found.first() else {
            bail!("Go is missing: run `make deps`, which installs Debian's golang-go, or install it in /usr/local/go");
        };
        old.fetch_newer(work)
    }

    fn at(program: PathBuf, work: &Path) -> Option<Self> {
        let mut go = Self { program, version: String::new(), build_cache: work.join("go-build") };
        go.version = step::output(go.command(work).args(["env", "GOVERSION"])).ok()?.trim().to_owned();
        Some(go)
    }

    /// A copy of the toolchain's module that can be executed: the module cache has no such permissions, and is not ours
    /// to change.
    fn fetch_newer(&self, work: &Path) -> Result<Self> {
        let toolchain = format!("v0.0.1-go{TOOLCHAIN}.linux-{}", architecture()?);
        println!("    {self} is too old: fetching Go {TOOLCHAIN}");
        let module = self.download("golang.org/toolchain", &toolchain)?;
        let root = work.join("go");
        step::run(step::command("cp").args(["-R", "--no-preserve=mode", "--"]).arg(&module).arg(&root))?;
        for folder in ["bin", "pkg/tool"] {
            make_executable(&root.join(folder))?;
        }
        // a module cannot have another one in it, so they travel under another name
        for folder in ["src", "src/cmd"] {
            let (from, to) = (root.join(folder).join("_go.mod"), root.join(folder).join("go.mod"));
            fs::rename(&from, &to).with_context(|| format!("{} cannot be renamed", from.display()))?;
        }
        let program = root.join("bin/go");
        let shown = program.display().to_string();
        Self::at(program, work).with_context(|| format!("{shown} does not run"))
    }

    /// Go in a folder, with nothing of the user's settings that would change what is built.
    pub(super) fn command(&self, folder: &Path) -> Command {
        let mut command = step::command("nice");
        command.arg(&self.program).current_dir(folder);
        for variable in ["GOROOT", "GOOS", "GOARCH", "GOAMD64", "GOEXPERIMENT", "GOBIN"] {
            command.env_remove(variable);
        }
        command
            .env("GOTOOLCHAIN", "auto")
            .env("GO111MODULE", "on")
            .env("GOWORK", "off")
            // not empty: then Go would take the user's from its own file
            .env("GOFLAGS", "-buildvcs=false")
            .env("CGO_ENABLED", "0")
            .env("GOCACHE", &self.build_cache);
        command
    }

    /// A module into the usual module cache, checked against Go's database of checksums; returns its folder.
    pub(super) fn download(&self, module: &str, version: &str) -> Result<PathBuf> {
        // away from every go.mod, which could have its own opinion of versions
        let mut command = self.command(Path::new("/"));
        let told = step::output(command.args(["mod", "download", "-json", &format!("{module}@{version}")]))?;
        let told: serde_json::Value = serde_json::from_str(&told).context("`go mod download` printed no JSON")?;
        let folder = told.get("Dir").and_then(|folder| folder.as_str());
        folder.map(PathBuf::from).with_context(|| format!("`go mod download` named no folder for {module}: {told}"))
    }
}

/// Go's name of this machine's architecture.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("{other}: Go's name of this architecture is not known here: install Go 1.21 or newer"),
    }
}

/// Whether `go1.26.8` is of this release or a later one.
fn at_least(version: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = version.trim_start_matches("go").split(|sign: char| !sign.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok());
    let Some(major) = next() else { return false };
    (major, next().unwrap_or(0)) >= wanted
}

/// Every file below the folder.
fn make_executable(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("{} cannot be listed", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            make_executable(&path)?;
        } else {
            fs::set_permissions(&path, Permissions::from_mode(0o755))
                .with_context(|| format!("{} cannot be made executable", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_later_releases_know_toolchains() {
        for (version, knows) in [
            ("go1.19.8", false),
            ("go1.20", false),
            ("go1.21.0", true),
            ("go1.26rc1", true),
            ("go2.0", true),
            ("", false),
        ] {
            assert_eq!(at_least(version, KNOWS_TOOLCHAINS), knows, "{version}");
        }
    }
}
