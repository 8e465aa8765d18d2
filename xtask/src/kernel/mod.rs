//! The guest's kernel: from the distribution's source with our fragments and patches, built once for each set of inputs and kept
//! outside the checkout. Owns the cache; fragments.rs knows the configuration, make.rs the build.

mod fragments;
mod make;

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::workspace::{VMLINUX, VMLINUZ, Workspace};
use crate::{cache, step};

/// From Debian's package of the same name.
const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Part of the cache's key: to be changed with everything in make.rs that changes the result.
const RECIPE: &str = "recipe 1";

/// dist/…/vmlinux.container and vmlinuz.container, from the cache or built now.
pub(crate) fn provide(workspace: &Workspace) -> Result<()> {
    step::timed("providing the guest kernel", || {
        let fragments = fragments::merge(&workspace.kernel_fragments(), env::consts::ARCH)?;
        let patches = fragments::patches(&workspace.kernel_fragments())?;
        let key = key(&fragments, &patches)?;
        let cache = cache::folder("kata-guest")?;
        let _alone = cache::lock(&cache)?;
        let kept = cache.join(&key);
        if kept.is_dir() {
            println!("    cached: {}", kept.display());
        } else {
            println!("    not in the cache yet, 5 to 20 minutes of CPU, once: {}", kept.display());
            build(&cache, &kept, &fragments, &patches)?;
        }
        hand_out(&kept, &workspace.guest_files())
    })
}

/// What the bytes of the kernel depend on.
fn key(fragments: &str, patches: &str) -> Result<String> {
    if !Path::new(SOURCE).is_file() {
        bail!("{SOURCE} is missing: run `make deps`, which installs Debian's linux-source-6.12");
    }
    // by the tool and not by our crate: unoptimised it would take ten seconds for this file
    let source = step::output(step::command("sha256sum").arg(SOURCE))?;
    let source = source.split_whitespace().next().context("sha256sum printed nothing")?;
    let compiler = step::output(step::command("gcc").arg("--version").env("LC_ALL", "C"))?;
    let compiler = compiler.lines().next().context("gcc --version printed nothing")?;
    let inputs = format!("{RECIPE}\n{source}\n{compiler}\n{fragments}\n{patches}");
    Ok(hex(&Sha256::digest(inputs)))
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

fn build(cache: &Path, kept: &Path, fragments: &str, patches: &str) -> Result<()> {
    let work = cache.join("build");
    // what an interrupted build has left; we hold the lock
    cache::remove(&work)?;
    let log = cache.join("build.log");
    let result = make::kernel(Path::new(SOURCE), &work, &log, fragments, patches);
    if let Err(error) = result {
        let cleaned = cache::remove(&work);
        let error = error.context(format!("the guest kernel was not built; the log is {}", log.display()));
        return Err(cleaned.err().map_or(error, |second| anyhow::anyhow!("{second:#}")));
    }
    // complete or not there at all
    fs::rename(work.join("result"), kept).with_context(|| format!("{} cannot be put in place", kept.display()))?;
    cache::remove(&work)
}

fn hand_out(kept: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("{} cannot be made", to.display()))?;
    for name in [VMLINUX, VMLINUZ] {
        let (from, temporary) = (kept.join(name), to.join(format!(".{name}")));
        fs::copy(&from, &temporary)
            .and_then(|_| fs::rename(&temporary, to.join(name)))
            .with_context(|| format!("{} cannot be copied to {}", from.display(), to.display()))?;
    }
    Ok(())
}
