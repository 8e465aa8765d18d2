//! Names of `Storage.driver_options`, each followed by `=` and a value; and an option of a `Storage` and a `Device`.

/// Kata's: a folder that is made before the mount, in a file system that was mounted before.
pub const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory";
/// Ours: another disk that the file system is on, where its driver finds it; becomes the mount option `device`.
pub const MORE_DEVICE: &str = "disk.more";
/// The host has the disk open for reading only.
pub const READ_ONLY: &str = "ro";
