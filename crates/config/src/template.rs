//! Tests of `config/configuration-qemu.toml`, the file that is installed, against the defaults of the code.

use std::path::Path;

use crate::{Config, keys};

const TEMPLATE: &str = include_str!("../../../config/configuration-qemu.toml");
/// Names of the Rust runtime, and what is accepted for other reasons than to be used.
const LEFT_OUT: &[&str] = &[
    "hypervisor.qemu.image",
    "hypervisor.qemu.vm_rootfs_driver",
    "hypervisor.qemu.seccomp_sandbox",
    "agent.kata.dial_timeout_ms",
    "agent.kata.reconnect_timeout_ms",
    "agent.kata.create_container_timeout",
    "hypervisor.qemu.factory.enable_template",
    "hypervisor.qemu.factory.template_path",
];

/// As it is installed in /usr/local, with the lines that `chosen` picks uncommented.
fn installed(chosen: impl Fn(&str) -> bool) -> String {
    let lines = TEMPLATE.lines().map(|line| match line.strip_prefix('#') {
        Some(setting) if is_setting(setting) && chosen(setting) => setting,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n").replace("@PREFIX@", "/usr/local")
}

/// `key = value` straight after the `#`; prose has a space there.
fn is_setting(line: &str) -> bool {
    line.split_once(" = ").is_some_and(|(key, _)| {
        key.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    })
}

fn parse(text: &str) -> Config {
    Config::parse(text, Path::new("/c.toml")).expect("the template is right")
}

#[test]
fn as_installed_it_is_the_defaults() {
    assert_eq!(parse(&installed(|_| false)), parse(""));
}

#[test]
fn every_commented_default_is_the_default() {
    let defaults = parse("");
    let settings: Vec<_> =
        TEMPLATE.lines().filter_map(|line| line.strip_prefix('#')).filter(|s| is_setting(s)).collect();
    assert!(settings.len() > 20, "{settings:?}");
    for setting in settings {
        assert_eq!(parse(&installed(|line| line == setting)), defaults, "{setting}");
    }
    assert_eq!(parse(&installed(|_| true)), defaults);
}

#[test]
fn every_key_that_works_is_in_it() {
    let entries = crate::file::parse(&installed(|_| true), Path::new("/c.toml")).expect("is TOML");
    let shown: Vec<_> = entries.iter().map(|entry| entry.key.as_str()).collect();
    for key in keys::SUPPORTED.iter().filter(|key| !LEFT_OUT.contains(key)) {
        assert!(shown.contains(key), "{key} is not in the template");
    }
    for key in shown {
        assert!(keys::SUPPORTED.contains(&key), "{key} does nothing");
    }
}

#[test]
fn no_placeholder_but_the_prefix() {
    assert_eq!(TEMPLATE.matches('@').count(), 2 * TEMPLATE.matches("@PREFIX@").count());
}
