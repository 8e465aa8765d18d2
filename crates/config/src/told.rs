//! Keys that have no effect: what the log says of them, so that nobody believes that they work.

use std::path::Path;

use crate::OneLine;
use crate::file::{Entry, Value};
use crate::key::When;
use crate::types::Config;

/// Adds a line for an entry whose key has no effect; `why` is a sentence.
pub(crate) fn tell(
    config: &mut Config,
    entry: &Entry,
    (met, usual): (&[&str], &[&str]),
    when: When,
    why: &str,
    exists: &dyn Fn(&Path) -> bool,
) {
    let value = entry.value.to_string();
    let matters = match (when, &entry.value) {
        (When::HostHas(file), _) => exists(Path::new(file)),
        (When::ValueExists, Value::Text(path)) => exists(Path::new(path)),
        (When::Always | When::ValueExists, _) => true,
    };
    if !matters || met.contains(&value.as_str()) {
        return;
    }
    let (file, line, key) = (entry.file.display(), entry.line, &entry.key);
    let told = format!("{file}:{line}: {key} = {value} has no effect: {}", why.trim_end_matches('.'));
    let lines = if usual.contains(&value.as_str()) { &mut config.notices } else { &mut config.warnings };
    lines.push(OneLine(told).to_string());
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parsed(text: &str, host: &[&str]) -> Config {
        let source = Path::new("/c.toml");
        let entries = crate::file::parse(text, source).expect("is TOML");
        let exists = |path: &Path| host.iter().any(|file| path == Path::new(file));
        crate::apply::apply(entries, source, &exists).expect("accepted").0
    }

    #[test]
    fn katas_default_is_a_notice_and_a_wish_is_a_warning() {
        let usual = parsed("runtime.static_sandbox_resource_mgmt = false", &[]);
        assert_eq!(usual.warnings, Vec::<String>::new());
        let start = "/c.toml:1: runtime.static_sandbox_resource_mgmt = false has no effect: a VM keeps the size";
        assert!(usual.notices.len() == 1 && usual.notices[0].starts_with(start), "{:?}", usual.notices);
        let met = parsed("runtime.static_sandbox_resource_mgmt = true", &[]);
        assert!(met.warnings.is_empty() && met.notices.is_empty());
        let wish = parsed("hypervisor.qemu.enable_annotations = [\"default_vcpus\"]", &[]);
        let start = "/c.toml:1: hypervisor.qemu.enable_annotations = [\"default_vcpus\"] has no effect: annotations";
        assert!(wish.notices.is_empty() && wish.warnings.len() == 1, "{:?}", wish.notices);
        assert!(wish.warnings[0].starts_with(start), "{:?}", wish.warnings);
        assert!(parsed("hypervisor.qemu.enable_annotations = []", &[]).notices.is_empty());
    }

    #[test]
    fn what_matters_on_some_hosts_is_told_there() {
        let selinux = "hypervisor.qemu.disable_selinux = false";
        assert!(parsed(selinux, &[]).notices.is_empty());
        assert_eq!(parsed(selinux, &["/sys/fs/selinux/enforce"]).notices.len(), 1);
        let networks = "runtime.dan_conf = \"/dans\"";
        assert!(parsed(networks, &[]).warnings.is_empty());
        assert_eq!(parsed(networks, &["/dans"]).warnings.len(), 1);
        // the folder of another host's file is not the shim's to find
        assert_eq!(parsed("runtime.dan_conf = 3", &[]).warnings.len(), 1);
    }
}
