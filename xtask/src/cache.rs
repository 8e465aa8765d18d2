//! What is dear to make and belongs to no checkout: folders in the user's cache, each used by one process at a time.

use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// A folder of ours in `$XDG_CACHE_HOME` or `~/.cache`, made where it is missing.
pub(crate) fn folder(name: &str) -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            Path::new(&env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set: set one")?).join(".cache")
        }
    };
    let cache = base.join(name);
    fs::create_dir_all(&cache).with_context(|| format!("the cache {} cannot be made", cache.display()))?;
    Ok(cache)
}

/// One build at a time, also from other checkouts; whoever waits finds the result. The kernel frees it with us.
pub(crate) fn lock(cache: &Path) -> Result<Flock<File>> {
    let path = cache.join("lock");
    let open = || File::options().create(true).truncate(false).write(true).open(&path);
    let file = open().with_context(|| format!("{} cannot be opened", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((_, nix::Error::EWOULDBLOCK)) => println!("    another build holds {}: waiting for it", path.display()),
        Err((_, error)) => bail!("{} cannot be locked: {error}", path.display()),
    }
    let file = open().with_context(|| format!("{} cannot be opened", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| anyhow::anyhow!("{} cannot be locked: {error}", path.display()))
}

/// Removes a folder with everything in it; one that is not there is fine.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed: remove it by hand", directory.display()))
        }
        _ => Ok(()),
    }
}
