//! Nothing outside a driver's folder knows which VMM there is.

use super::Source;

/// Crates that must not know; `config` has a table for each driver.
const CRATES: &[&str] = &["shim", "kata-runtime", "runtime", "agent", "hypervisor"];

/// Where a VMM is named: its driver, and the file that chooses one.
const PLACES: &[&str] = &["crates/hypervisor/src/qemu/", "crates/runtime/src/driver.rs"];

/// VMMs and their parts, in lower case. A letter or digit before or after makes another word of it.
const WORDS: &[&str] = &[
    "qemu",
    "qmp",
    "tcg",
    "q35",
    "seabios",
    "cloud hypervisor",
    "cloud-hypervisor",
    "cloud_hypervisor",
    "clh",
    "firecracker",
    "acrn",
    "krun",
    "libkrun",
    // buses, slots and events of a machine that a VMM makes
    "pcie.0",
    "1e",
    "gpe01",
];

/// What may stand in such a file all the same: the line has `text`. `path` is the file, or all that begin so.
struct Exception {
    path: &'static str,
    text: &'static str,
    #[expect(dead_code, reason = "for readers")]
    why: &'static str,
}

const EXCEPTIONS: &[Exception] = &[
    Exception { path: "crates/", text: "[hypervisor.qemu]", why: "the name of a table in Kata's configuration files" },
    Exception { path: "crates/hypervisor/src/lib.rs", text: "pub mod qemu;", why: "the driver's folder" },
    Exception {
        path: "crates/agent/src/translator.rs",
        text: "",
        why: "the one test at run time for a guest whose processor is a program",
    },
    Exception {
        path: "crates/runtime/src/storage/daemon.rs",
        text: "/usr/lib/qemu/virtiofsd",
        why: "where Debian installs the C virtiofsd",
    },
    Exception {
        path: "crates/runtime/src/storage/daemon.rs",
        text: "install qemu-system-common",
        why: "the package of the C virtiofsd",
    },
];

pub(super) fn check(sources: &[Source]) -> Vec<String> {
    sources.iter().filter(|source| is_checked(&source.path)).flat_map(in_file).collect()
}

fn is_checked(path: &str) -> bool {
    let is_of_crate =
        |name: &&str| path.strip_prefix("crates/").is_some_and(|rest| rest.starts_with(&format!("{name}/")));
    CRATES.iter().any(is_of_crate) && !PLACES.iter().any(|place| path.starts_with(place))
}

fn in_file(source: &Source) -> Vec<String> {
    let is_allowed = |line: &str| {
        EXCEPTIONS.iter().any(|exception| source.path.starts_with(exception.path) && line.contains(exception.text))
    };
    let mut found = Vec::new();
    for (number, line) in source.text.lines().enumerate().filter(|(_, line)| !is_allowed(line)) {
        let lower = line.to_lowercase();
        found.extend(WORDS.iter().filter(|word| has_word(&lower, word)).map(|word| {
            let (path, number) = (&source.path, number + 1);
            format!("{path}:{number} names \"{word}\": only {} may", PLACES.join(" and "))
        }));
    }
    found
}

fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    line.match_indices(word)
        .any(|(at, _)| !is_part(line[..at].chars().next_back()) && !is_part(line[at + word.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> usize {
        check(&[Source { path: path.into(), text: text.into() }]).len()
    }

    #[test]
    fn a_vmm_is_named_in_its_driver_only() {
        for text in
            ["// as QEMU does", "let qmp = 1;", "\"kata-qemu\"", "under TCG, which", "\"1e/02\"", "0000:00:1e.0"]
        {
            assert_eq!(found("crates/runtime/src/sandbox/mod.rs", text), 1, "{text}");
            assert_eq!(found("crates/hypervisor/src/qemu/pci.rs", text), 0, "{text}");
            assert_eq!(found("crates/config/src/key.rs", text), 0, "{text}");
        }
        for text in ["a VMM", "tcgetattr(fd)", "0x1e4", "51e"] {
            assert_eq!(found("crates/agent/src/io.rs", text), 0, "{text}");
        }
    }

    #[test]
    fn an_exception_is_for_its_file_and_its_words() {
        assert_eq!(found("crates/runtime/src/storage/daemon.rs", "\"/usr/lib/qemu/virtiofsd\""), 0);
        assert_eq!(found("crates/runtime/src/storage/share.rs", "\"/usr/lib/qemu/virtiofsd\""), 1);
        assert_eq!(found("crates/runtime/src/storage/daemon.rs", "QEMU's"), 1);
    }
}
