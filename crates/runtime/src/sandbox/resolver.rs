//! The pod's name servers, for the guest itself: the containers have the file as a mount of their own.

use std::fs::File;
use std::io::Read;

use oci_spec::runtime::Spec;

use crate::network;

/// Most of the file that is read, bytes; resolv.conf(5) gives three name servers and a search list of 2 KiB at the most.
const LIMIT: u64 = 16 << 10;

/// The lines of what the container has at `/etc/resolv.conf`, without comments; none when it has none.
pub(super) fn lines(spec: &Spec) -> Vec<String> {
    let Some(source) = network::resolver_file(spec) else { return Vec::new() };
    let mut text = Vec::new();
    if let Err(error) = File::open(source).and_then(|file| file.take(LIMIT).read_to_end(&mut text)) {
        // the container's own mount of it is refused with its own words
        tracing::warn!(file = %source.display(), %error, "reading the pod's name servers");
    }
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
        .map(String::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn comments_are_left_out_and_a_missing_file_is_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("resolv.conf");
        std::fs::write(&file, "# made by\nnameserver 10.0.0.10\n\n search a b\n").expect("written");
        let spec = |source: &Path| -> Spec {
            let mount = serde_json::json!({"destination": "/etc/resolv.conf", "source": source, "type": "bind"});
            serde_json::from_value(serde_json::json!({"ociVersion": "1.0.2", "mounts": [mount]})).expect("a spec")
        };
        assert_eq!(lines(&spec(&file)), ["nameserver 10.0.0.10", "search a b"]);
        assert!(lines(&spec(Path::new("/not/there"))).is_empty());
    }
}
