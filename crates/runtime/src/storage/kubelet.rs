//! What kubelet's folders tell of a volume: its layout, `…/pods/<uid>/volumes/kubernetes.io~<plugin>/<name>`, is the only
//! word on a volume's kind that reaches a runtime. Pure.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// Written by kubelet alone, and swapped as a whole.
const SWAPPED: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];
/// Where kubelet binds parts of volumes: `…/pods/<uid>/volume-subpaths/<volume>/<container>/<number>`.
const SUBPATHS: &str = "volume-subpaths";

/// It is an emptyDir as a whole.
pub(crate) fn is_empty_dir(source: &Path) -> bool {
    is_of(source, &[EMPTY_DIR])
}

/// It is a configMap, a secret, a projected volume or one of the downward API, as a whole.
pub(crate) fn is_swapped(source: &Path) -> bool {
    is_of(source, &SWAPPED)
}

fn is_of(source: &Path, plugins: &[&str]) -> bool {
    source.parent().and_then(Path::file_name).is_some_and(|plugin| plugins.iter().any(|one| plugin == OsStr::new(one)))
}

/// The emptyDir of which this may be a part that kubelet has bound elsewhere; whether there is one is not known.
pub(crate) fn empty_dir_of_subpath(source: &Path) -> Option<PathBuf> {
    let container = source.parent()?;
    let volume = container.parent()?;
    let subpaths = volume.parent()?;
    if subpaths.file_name()? != SUBPATHS {
        return None;
    }
    Some(subpaths.parent()?.join("volumes").join(EMPTY_DIR).join(volume.file_name()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_the_folder_above() {
        let pod = "/var/lib/kubelet/pods/u1/volumes";
        let path = |rest: &str| PathBuf::from(format!("{pod}/{rest}"));
        assert!(is_empty_dir(&path("kubernetes.io~empty-dir/scratch")));
        assert!(!is_empty_dir(&path("kubernetes.io~empty-dir/scratch/part")));
        assert!(!is_empty_dir(&path("kubernetes.io~empty-dir")));
        for plugin in ["configmap", "secret", "projected", "downward-api"] {
            assert!(is_swapped(&path(&format!("kubernetes.io~{plugin}/x"))), "{plugin}");
        }
        assert!(!is_swapped(&path("kubernetes.io~csi/x")));
        assert!(!is_swapped(Path::new("/")) && !is_empty_dir(Path::new("x")));
    }

    #[test]
    fn a_part_leads_to_its_volume() {
        let part = Path::new("/var/lib/kubelet/pods/u1/volume-subpaths/scratch/one/0");
        let whole = Path::new("/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/scratch");
        assert_eq!(empty_dir_of_subpath(part).as_deref(), Some(whole));
        assert_eq!(empty_dir_of_subpath(whole), None);
        assert_eq!(empty_dir_of_subpath(Path::new("/volume-subpaths/x")), None);
    }
}
