//! Files with holes.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// Where the next bytes of `file` begin that are no hole, at `at` or after it, and where they end; `None` when nothing but a
/// hole is left (lseek(2), `SEEK_DATA`). Moves the file's place.
///
/// # Errors
/// What lseek(2) says.
pub fn next_data(file: &File, at: i64) -> io::Result<Option<(i64, i64)>> {
    match lseek64(file, at, Whence::SeekData) {
        Ok(begin) => Ok(Some((begin, lseek64(file, begin, Whence::SeekHole)?))),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
