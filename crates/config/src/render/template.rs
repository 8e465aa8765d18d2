//! `configuration.toml` as it is installed: every key that works, at its default, with its text.

use std::fmt::Write as _;

use super::{MISTAKES, default, rows, wrap};
use crate::driver::Driver;
use crate::key::{Key, Table};

/// Width of a comment.
const WIDTH: usize = 110;

/// What the guest of an installed file boots.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// The kernel's path, without characters that TOML's quotes do not take.
    pub kernel: &'a str,
    /// Settings of the initrd or of the image: key and value in TOML.
    pub root: &'a [(&'a str, String)],
}

/// The whole file.
pub fn template(driver: Driver, guest: Guest<'_>) -> String {
    let mut text =
        String::from("# How containers run as virtual machines. Keys and meanings are those of Kata Containers.\n#\n");
    comment(
        &mut text,
        "A line that begins with `#key = value` shows the default: remove the `#` to change it. Files of config.d/*.toml beside this \
         one are read after it, in alphabetical order, and win key by key: put changes there, because an update overwrites this \
         file.",
    );
    comment(&mut text, MISTAKES);
    for table in [Table::Hypervisor, Table::Agent, Table::Runtime, Table::Factory] {
        let _ = write!(text, "\n[{}]\n", table.header(driver));
        for row in rows(table, driver, true) {
            one(&mut text, row, guest);
        }
    }
    text
}

fn one(text: &mut String, row: &Key, guest: Guest<'_>) {
    let set = |name: &str| guest.root.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    let value = match row.name {
        "kernel" => Some(format!("\"{}\"", guest.kernel)),
        // the Rust runtime's word for a key that is there too
        "vm_rootfs_driver" => return,
        name => set(name),
    };
    let takes = row.slot().map(crate::key::Slot::takes).unwrap_or_default();
    text.push('\n');
    comment(text, &format!("{} ({takes})", row.doc));
    let _ = match value {
        Some(value) => writeln!(text, "{} = {value}", row.name),
        None if matches!(row.name, "initrd" | "image") => writeln!(text, "#{} = \"\"", row.name),
        None => writeln!(text, "#{} = {}", row.name, default(row)),
    };
}

fn comment(text: &mut String, words: &str) {
    for line in wrap(words, WIDTH) {
        let _ = writeln!(text, "# {line}");
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Config, table};

    fn installed() -> String {
        let root = [("initrd", "\"/usr/local/share/kata-containers/kata-containers-initrd.img\"".to_owned())];
        template(Driver::Qemu, Guest { kernel: "/usr/local/share/kata-containers/vmlinux.container", root: &root })
    }

    /// With the lines that `chosen` picks uncommented.
    fn uncommented(chosen: impl Fn(&str) -> bool) -> String {
        let text = installed();
        let lines = text.lines().map(|line| match line.strip_prefix('#') {
            Some(setting) if is_setting(setting) && chosen(setting) => setting,
            _ => line,
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// `key = value` straight after the `#`; prose has a space there.
    fn is_setting(line: &str) -> bool {
        line.split_once(" = ").is_some_and(|(key, _)| {
            key.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        })
    }

    fn parse(text: &str) -> Config {
        Config::parse(text, Path::new("/c.toml")).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn as_installed_it_is_the_defaults() {
        assert_eq!(parse(&installed()), parse(""));
    }

    #[test]
    fn every_commented_default_is_the_default() {
        let (defaults, text) = (parse(""), installed());
        let settings: Vec<_> =
            text.lines().filter_map(|line| line.strip_prefix('#')).filter(|s| is_setting(s)).collect();
        assert!(settings.len() > 40, "{settings:?}");
        for setting in settings {
            assert_eq!(parse(&uncommented(|line| line == setting)), defaults, "{setting}");
        }
        assert_eq!(parse(&uncommented(|_| true)), defaults);
    }

    #[test]
    fn every_key_that_works_is_in_it_once() {
        let entries = crate::file::parse(&uncommented(|_| true), Path::new("/c.toml")).expect("is TOML");
        let works = table::all().filter(|row| row.slot().is_some() && row.name != "vm_rootfs_driver");
        let mut wanted: Vec<_> = works.map(|row| row.path(Driver::Qemu)).collect();
        let mut shown: Vec<_> = entries.into_iter().map(|entry| entry.key).collect();
        wanted.sort();
        shown.sort();
        assert_eq!(shown, wanted);
    }

    #[test]
    fn an_image_takes_the_place_of_the_initrd() {
        let root = [("image", "\"/i.img\"".to_owned()), ("rootfs_type", "\"erofs\"".to_owned())];
        let config = parse(&template(Driver::Qemu, Guest { kernel: "/k", root: &root })).hypervisor;
        assert_eq!((config.initrd, config.image.as_deref()), (None, Some(Path::new("/i.img"))));
        assert_eq!((config.rootfs_type, config.kernel.as_path()), (crate::FileSystem::Erofs, Path::new("/k")));
    }
}
