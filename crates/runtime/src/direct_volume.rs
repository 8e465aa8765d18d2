//! Volumes that are block devices of the host, mounted by the guest alone: what a storage driver says of them, in Kata's
//! file format. A folder a volume below `/run/kata-containers/shared/direct-volumes`, named by the volume path's base64,
//! with `mountInfo.json` in it and, while a pod has the volume, an empty file of the pod's name.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Error;

const ROOT: &str = "/run/kata-containers/shared/direct-volumes";
const INFO: &str = "mountInfo.json";
/// For errors.
const EXAMPLE: &str = r#"{"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4"}"#;
/// Largest `mountInfo.json` that is read, bytes.
const LIMIT: u64 = 64 << 10;

/// What stands behind a volume path. The names are the Go runtime's; the Rust runtime's are read too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// `block`, or `directvol`, which is the same.
    #[serde(rename = "volume-type", alias = "volume_type")]
    pub volume_type: String,
    /// A block device or a regular file of the host.
    pub device: PathBuf,
    /// The file system on it.
    #[serde(rename = "fstype", alias = "fs_type")]
    pub fs_type: String,
    /// `fsGroup` and `fsGroupChangePolicy`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Mount options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl VolumeInfo {
    /// Reads and checks the JSON.
    ///
    /// # Errors
    /// It is none, or asks for what we do not do.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let info: Self = serde_json::from_str(text)
            .map_err(|error| Error::Invalid(format!("invalid mount info: {error}: must be like {EXAMPLE}")))?;
        if !["block", "directvol"].contains(&info.volume_type.as_str()) {
            let kind = &info.volume_type;
            return Err(Error::Unsupported(format!(
                "volume-type {kind:?} of a direct volume is not supported: must be \"block\""
            )));
        }
        if !info.device.is_absolute() {
            let device = info.device.display();
            return Err(Error::Invalid(format!("device {device} of a direct volume must be an absolute path")));
        }
        if info.fs_type.is_empty() {
            return Err(Error::Invalid("a direct volume needs its fstype, such as \"ext4\"".into()));
        }
        for (key, value) in &info.metadata {
            match key.as_str() {
                "fsGroup" if value.parse::<u32>().is_ok() => {}
                "fsGroupChangePolicy" if ["", "Always", "OnRootMismatch"].contains(&value.as_str()) => {}
                "fsGroup" | "fsGroupChangePolicy" => {
                    return Err(Error::Invalid(format!(
                        "invalid {key} {value:?} of a direct volume: fsGroup must be a number, fsGroupChangePolicy must be Always or OnRootMismatch"
                    )));
                }
                _ => {
                    return Err(Error::Unsupported(format!(
                        "metadata {key:?} of a direct volume is not supported: remove it"
                    )));
                }
            }
        }
        Ok(info)
    }
}

/// All that is known of direct volumes.
#[derive(Debug, Clone)]
pub struct Store(PathBuf);

impl Default for Store {
    fn default() -> Self {
        Self(ROOT.into())
    }
}

impl Store {
    /// Takes a volume up; one that is there already is replaced.
    ///
    /// # Errors
    /// As [`VolumeInfo::parse`]; or it cannot be written.
    pub fn add(&self, volume: &Path, text: &str) -> Result<(), Error> {
        VolumeInfo::parse(text)?;
        if text.len() as u64 > LIMIT {
            return Err(Error::Invalid(format!("the mount info is too large: the limit is {LIMIT} bytes")));
        }
        let folder = self.folder(volume)?;
        let write = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            // in one step for a shim that reads it at this moment
            let draft = folder.join(".new");
            fs::write(&draft, text)?;
            fs::set_permissions(&draft, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
            fs::rename(&draft, folder.join(INFO))
        };
        write().map_err(Error::host(folder.display().to_string()))
    }

    /// Forgets a volume; one that is not there is no mistake.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, volume: &Path) -> Result<(), Error> {
        let folder = self.folder(volume)?;
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::host(folder.display().to_string())(error))
            }
            _ => Ok(()),
        }
    }

    /// What stands behind a path; `None` when it is no direct volume.
    ///
    /// # Errors
    /// It is one, and its description cannot be read.
    pub fn find(&self, volume: &Path) -> Result<Option<VolumeInfo>, Error> {
        let Ok(folder) = self.folder(volume) else { return Ok(None) };
        let path = folder.join(INFO);
        let mut text = String::new();
        match File::open(&path).and_then(|file| file.take(LIMIT + 1).read_to_string(&mut text)) {
            Ok(_) => VolumeInfo::parse(&text)
                .map(Some)
                .map_err(|error| Error::Invalid(format!("{}: {error}", path.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::host(path.display().to_string())(error)),
        }
    }

    /// Where it is written down that a pod has a volume.
    ///
    /// # Errors
    /// The path is too long for a volume.
    pub(crate) fn user(&self, volume: &Path, sandbox: &str) -> Result<PathBuf, Error> {
        Ok(self.folder(volume)?.join(sandbox))
    }

    /// Writes it down there.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn record(path: &Path) -> io::Result<()> {
        File::options().create(true).write(true).truncate(true).mode(0o600).open(path).map(drop)
    }

    /// Which pods have a volume.
    ///
    /// # Errors
    /// There is no such volume, or it cannot be looked at.
    pub fn users(&self, volume: &Path) -> Result<Vec<String>, Error> {
        let folder = self.folder(volume)?;
        let entries = fs::read_dir(&folder).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound(format!("direct volume {}", volume.display())),
            _ => Error::host(folder.display().to_string())(error),
        })?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| name != INFO && !name.starts_with('.')).collect())
    }

    fn folder(&self, volume: &Path) -> Result<PathBuf, Error> {
        let name = base64_url(volume.as_os_str().as_bytes());
        // a name's longest in Linux
        if name.is_empty() || name.len() > 255 {
            return Err(Error::Invalid(format!("invalid volume path {}: must have 1 to 189 bytes", volume.display())));
        }
        Ok(self.0.join(name))
    }
}

/// Makes a volume's file as large as is wanted; a device is as large as it is. Returns its size.
pub(crate) fn grow(device: &Path, size: u64) -> Result<u64, Error> {
    let named = |error| Error::host(device.display().to_string())(error);
    let mut file = File::options().read(true).write(true).open(device).map_err(named)?;
    let now = file.seek(SeekFrom::End(0)).map_err(named)?;
    let is_file = file.metadata().map_err(named)?.is_file();
    let shown = device.display();
    match now.cmp(&size) {
        Ordering::Equal => return Ok(now),
        // whoever enlarged it may have had to round
        Ordering::Greater if !is_file => return Ok(now),
        Ordering::Greater => return Err(Error::Invalid(format!("{shown} has {now} bytes: a volume cannot shrink"))),
        Ordering::Less if is_file => {}
        Ordering::Less => {
            return Err(Error::Invalid(format!(
                "{shown} has {now} bytes, which is less than {size}: grow the device first"
            )));
        }
    }
    file.set_len(size).map_err(named)?;
    Ok(size)
}

/// RFC 4648's alphabet for file names, with padding.
fn base64_url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let index = (word >> (18 - 6 * digit)) as usize & 63;
            text.push(if digit <= group.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO_TEXT: &str = r#"{"volume-type":"block","device":"/dev/sdf","fstype":"ext4","options":["noatime"]}"#;

    #[test]
    fn names_are_as_katas() {
        // RFC 4648's own examples, and one of the digits that differ from the usual alphabet
        for (text, want) in [("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy"), ("", "")] {
            assert_eq!(base64_url(text.as_bytes()), want);
        }
        assert_eq!(base64_url(&[0xfb, 0xff]), "-_8=");
    }

    #[test]
    fn volumes_come_and_go() {
        let root = tempfile::tempdir().expect("a folder");
        let store = Store(root.path().join("direct-volumes"));
        let volume = Path::new("/var/lib/kubelet/v");
        assert_eq!(store.find(volume).expect("read"), None);
        store.remove(volume).expect("nothing to do");
        store.add(volume, INFO_TEXT).expect("added");
        store.add(volume, INFO_TEXT).expect("replaced");
        let info = store.find(volume).expect("read").expect("there");
        assert_eq!((info.device.to_str(), info.fs_type.as_str()), (Some("/dev/sdf"), "ext4"));
        assert_eq!(info.options, ["noatime"]);
        Store::record(&store.user(volume, "pod").expect("a path")).expect("written");
        assert_eq!(store.users(volume).expect("listed"), ["pod"]);
        store.remove(volume).expect("removed");
        assert_eq!(store.find(volume).expect("read"), None);
        assert!(store.add(Path::new(&"x".repeat(200)), INFO_TEXT).is_err());
    }

    #[test]
    fn the_rust_runtimes_names_are_read() {
        let text = r#"{"volume_type":"directvol","device":"/disk","fs_type":"xfs","metadata":{},"options":[]}"#;
        assert_eq!(VolumeInfo::parse(text).expect("read").fs_type, "xfs");
    }

    #[test]
    fn volumes_only_grow() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(file.path(), [0; 1024]).expect("written");
        assert_eq!(grow(file.path(), 4096).expect("grown"), 4096);
        assert_eq!(fs::metadata(file.path()).expect("there").len(), 4096);
        assert_eq!(grow(file.path(), 4096).expect("as it is"), 4096);
        let error = grow(file.path(), 512).expect_err("smaller").to_string();
        assert!(error.contains("4096") && error.contains("cannot shrink"), "{error}");
    }

    #[test]
    fn what_is_not_done_is_refused() {
        for (text, part) in [
            ("{", "mount info"),
            (r#"{"volume-type":"spdkvol","device":"/d","fstype":"ext4"}"#, "spdkvol"),
            (r#"{"volume-type":"block","device":"d","fstype":"ext4"}"#, "absolute"),
            (r#"{"volume-type":"block","device":"/d","fstype":""}"#, "fstype"),
            (
                r#"{"volume-type":"block","device":"/d","fstype":"ext4","metadata":{"encryptionKey":"x"}}"#,
                "encryptionKey",
            ),
            (r#"{"volume-type":"block","device":"/d","fstype":"ext4","metadata":{"fsGroup":"-1"}}"#, "fsGroup"),
        ] {
            let error = VolumeInfo::parse(text).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
