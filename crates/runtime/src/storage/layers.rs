//! The mounts of a root file system as containerd 2.x describes them: several that build on one another.
//!
//! A kind may begin with what is still to be done, as in `format/mkdir/overlay`: `format` fills in where the earlier ones
//! are mounted (`{{ mount 0 }}`, `{{ overlay 1 3 }}`), `mkdir` makes folders. Whoever mounts them, here or in the guest,
//! says where. Pure, but for a look at what a source is.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::rootfs::RootfsMount;
use crate::Error;

/// What begins an option that is containerd's, not the file system's.
const OURS: &str = "X-containerd.";
const FOLDER: &str = "X-containerd.mkdir.path=";
/// More parts are not a root file system: overlayfs itself takes 500 layers.
const MOST: usize = 500;

/// One of the mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// The file system.
    pub(crate) kind: String,
    pub(crate) source: String,
    pub(crate) options: Vec<String>,
    /// Folders to be made before.
    pub(crate) folders: Vec<String>,
    /// The source is a block device, or a file with a file system in it.
    pub(crate) is_disk: bool,
}

/// All of them; `None` where they are ordinary mounts, each for itself.
pub(crate) fn understand(mounts: &[RootfsMount]) -> Result<Option<Vec<Part>>, Error> {
    if mounts.iter().all(|one| matches!(one.kind.as_str(), "bind" | "overlay")) {
        return Ok(None);
    }
    if mounts.len() > MOST {
        return Err(Error::Invalid(format!("the root file system has {} mounts: the limit is {MOST}", mounts.len())));
    }
    let parts = mounts.iter().map(part).collect::<Result<Vec<_>, _>>()?;
    let is_ordinary = !parts.iter().any(|part| part.is_disk) && !mounts.iter().any(|one| one.kind.contains('/'));
    Ok((!is_ordinary).then_some(parts))
}

fn part(from: &RootfsMount) -> Result<Part, Error> {
    let mut steps: Vec<&str> = from.kind.split('/').collect();
    let kind = steps.pop().unwrap_or_default();
    if let Some(step) = steps.iter().find(|step| !["format", "mkdir"].contains(step)) {
        return Err(Error::Unsupported(format!(
            "{step:?} in the root file system's mount type {:?} is not supported",
            from.kind
        )));
    }
    let (mut options, mut folders, mut is_loop) = (Vec::new(), Vec::new(), false);
    for option in &from.options {
        if let Some(folder) = option.strip_prefix(FOLDER) {
            folders.push(folder_of(folder)?);
        } else if option.starts_with(OURS) {
            return Err(Error::Unsupported(format!(
                "mount option {option:?} of the root file system {} is not supported: if it comes from the erofs snapshotter, set dmverity_mode = \"off\" there",
                from.source
            )));
        } else if option == "loop" {
            is_loop = true;
        } else {
            options.push(option.clone());
        }
    }
    let is_built = ["bind", "overlay"].contains(&kind);
    let is_disk = !is_built && disk(Path::new(&from.source), is_loop)?;
    Ok(Part { kind: kind.to_owned(), source: from.source.clone(), options, folders, is_disk })
}

/// Whether a file system's source is a disk; a loop device is wanted for nothing else.
fn disk(source: &Path, is_loop: bool) -> Result<bool, Error> {
    match fs::metadata(source) {
        Ok(meta) => Ok(meta.is_file() || meta.file_type().is_block_device()),
        Err(error) if is_loop || source.is_absolute() => {
            Err(Error::host(format!("{} of the container's root file system", source.display()))(error))
        }
        // a name, as of a tmpfs
        Err(_) => Ok(false),
    }
}

/// `path[:mode[:uid:gid]]`, of which we make what a root file system's folders are.
fn folder_of(text: &str) -> Result<String, Error> {
    match text.rsplit_once(':') {
        Some((path, "0755" | "755")) if !path.contains(':') => Ok(path.to_owned()),
        _ => Err(Error::Unsupported(format!(
            "mode of folder {text:?} of the root file system is not supported: must be 0755"
        ))),
    }
}

impl Part {
    /// What it needs lies in the earlier parts alone, no folder of the host's.
    pub(crate) fn is_within(&self) -> bool {
        let is_filled = |text: &str| text.starts_with("{{");
        let places = self.options.iter().filter_map(|option| {
            let (name, value) = option.split_once('=')?;
            ["lowerdir", "upperdir", "workdir"].contains(&name).then_some(value)
        });
        let source = (self.kind == "bind").then_some(self.source.as_str());
        places.chain(source).chain(self.folders.iter().map(String::as_str)).all(is_filled)
    }

    /// With the places of the earlier parts filled in.
    pub(crate) fn filled(&self, points: &[String]) -> Result<Self, Error> {
        let all = |texts: &[String]| texts.iter().map(|text| fill(text, points)).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            source: fill(&self.source, points)?,
            options: all(&self.options)?,
            folders: all(&self.folders)?,
            ..self.clone()
        })
    }

    /// The host's other files that it is on (erofs has several).
    pub(crate) fn more(&self) -> impl Iterator<Item = &str> {
        self.options.iter().filter_map(|option| option.strip_prefix("device="))
    }

    /// It is only read.
    pub(crate) fn is_read_only(&self) -> bool {
        self.kind == "erofs" || self.options.iter().any(|option| option == "ro")
    }
}

/// Puts in where the earlier ones are.
fn fill(text: &str, points: &[String]) -> Result<String, Error> {
    let wrong = || Error::Invalid(format!("invalid {text:?} in the root file system's mounts"));
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once("{{") {
        let (inside, after) = after.split_once("}}").ok_or_else(wrong)?;
        out.push_str(before);
        let words: Vec<&str> = inside.split_whitespace().collect();
        let point = |word: &str| word.parse().ok().and_then(|number: usize| points.get(number)).ok_or_else(wrong);
        match words.as_slice() {
            ["mount", number] => out.push_str(point(number)?),
            ["overlay", first, last] => {
                let (first, last): (usize, usize) =
                    (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
                let (low, high) = (first.min(last), first.max(last));
                let range = points.get(low..=high).ok_or_else(wrong)?;
                let mut list: Vec<&str> = range.iter().map(String::as_str).collect();
                if first > last {
                    list.reverse();
                }
                out.push_str(&list.join(":"));
            }
            _ => return Err(wrong()),
        }
        rest = after;
    }
    Ok(out + rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mount(kind: &str, source: &Path, options: &[&str]) -> RootfsMount {
        RootfsMount {
            kind: kind.into(),
            source: source.display().to_string(),
            options: options.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn layers_of_the_erofs_snapshotter() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mounts = [
            mount("ext4", file.path(), &["rw", "loop"]),
            mount("erofs", file.path(), &["ro", "loop", "device=/x"]),
            mount("erofs", file.path(), &["ro", "loop"]),
            mount(
                "format/mkdir/overlay",
                Path::new("overlay"),
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ overlay 1 2 }}",
                ],
            ),
        ];
        let parts = understand(&mounts).expect("understood").expect("layers");
        let disks: Vec<_> = parts.iter().map(|part| part.is_disk).collect();
        assert_eq!(disks, [true, true, true, false]);
        assert_eq!(parts[0].options, ["rw"]);
        assert_eq!(parts[1].more().collect::<Vec<_>>(), ["/x"]);
        assert!(parts[1].is_read_only() && !parts[0].is_read_only() && parts[3].is_within());
        let top = parts[3].filled(&["/a", "/b", "/c"].map(String::from)).expect("filled");
        assert_eq!((top.kind.as_str(), top.folders.as_slice()), ("overlay", ["/a/upper".to_owned()].as_slice()));
        assert_eq!(top.options, ["workdir=/a/work", "upperdir=/a/upper", "lowerdir=/b:/c"]);
        // the upper layer may be a folder of the host's
        let on_host = mount("format/overlay", Path::new("overlay"), &["upperdir=/u", "lowerdir={{ mount 0 }}"]);
        assert!(!part(&on_host).expect("understood").is_within());
    }

    #[test]
    fn ordinary_mounts_are_left_alone() {
        let overlay = mount("overlay", Path::new("overlay"), &["lowerdir=/a"]);
        assert_eq!(understand(&[overlay]).expect("understood"), None);
        assert_eq!(understand(&[mount("tmpfs", Path::new("tmpfs"), &[])]).expect("understood"), None);
        assert_eq!(understand(&[]).expect("understood"), None);
        // that nothing comes before it is no reason to leave it to the kernel
        let formatted = mount("format/overlay", Path::new("overlay"), &["lowerdir=/a"]);
        assert_eq!(understand(&[formatted]).expect("understood").expect("ours")[0].kind, "overlay");
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for (mount, word) in [
            (mount("mkfs/ext4", file.path(), &[]), "mkfs"),
            (mount("erofs", file.path(), &["X-containerd.dmverity=/m"]), "dmverity"),
            (mount("mkdir/bind", file.path(), &["X-containerd.mkdir.path=/p:0700:1:1"]), "0700"),
            (mount("ext4", Path::new("/not/there"), &["loop"]), "/not/there"),
        ] {
            let error = understand(&[mount]).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_filled(text in ".{0,40}|(a|\\{\\{|\\}\\}| mount | overlay |[0-9]{1,3}| ){0,8}") {
            let _ = fill(&text, &["/a".into(), "/b".into()]);
        }
    }
}
