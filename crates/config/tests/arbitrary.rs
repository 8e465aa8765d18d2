//! Nothing that a file can hold ends the process, and every refusal is one line.

use std::path::Path;

use config::Config;
use proptest::prelude::*;

const GO: &str = include_str!("data/go.toml");
const RS: &str = include_str!("data/rs.toml");

/// Parses; an error is one line that names the file.
fn check(text: &str) {
    match Config::parse(text, Path::new("/c.toml")) {
        Ok(config) => {
            let vm = config.hypervisor;
            assert!(vm.default_vcpus >= 1 && vm.default_vcpus <= vm.default_maxvcpus.max(vm.default_vcpus));
            assert!((128..=16 << 20).contains(&vm.default_memory_mib));
            assert!(config.warnings.iter().chain(&config.notices).all(|warning| !warning.contains('\n')));
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with("/c.toml:") && !error.contains('\n'), "{error:?}");
        }
    }
}

/// `table.key` of the two test files, as they stand there.
fn keys() -> Vec<String> {
    let mut keys = Vec::new();
    for text in [GO, RS] {
        let mut table = "";
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                table = name;
            } else if let Some((key, _)) = line.split_once(" = ") {
                keys.push(format!("{table}.{key}"));
            }
        }
    }
    keys
}

/// Any value of TOML's grammar, in TOML.
fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        any::<u128>().prop_map(|number| number.to_string()),
        any::<u64>().prop_map(|number| format!("0x{number:x}")),
        (-4i64..5000).prop_map(|number| number.to_string()),
        any::<f64>()
            .prop_filter("TOML has no NaN(…)", |number| number.is_finite())
            .prop_map(|number| format!("{number:?}")),
        prop_oneof!["nan", "inf", "-inf", "true", "false", "1979-05-27T07:32:00Z", "07:32:00"],
        ".*".prop_map(|text: String| toml::Value::String(text).to_string()),
        "(/[a-z.]{0,8}){0,3}".prop_map(|path| format!("{path:?}")),
        prop_oneof!["virtio-fs", "q35", "auto", "kvm", "always", "qemu"].prop_map(|word| format!("{word:?}")),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|items| format!("[{}]", items.join(", "))),
            inner.prop_map(|value| format!("{{ a = {value} }}")),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text(text in any::<String>()) {
        check(&text);
    }

    #[test]
    fn text_of_tomls_signs(text in "[\\[\\]{}=.,\"'#\\\\ \na-f0-9_+-]{0,80}") {
        check(&text);
    }

    #[test]
    fn files_with_a_piece_replaced(go in any::<bool>(), at in any::<prop::sample::Index>(), cut in 0usize..40, put in ".{0,6}") {
        let mut text = (if go { GO } else { RS }).to_owned();
        let start = at.index(text.len());
        let end = (start + cut).min(text.len());
        // the files are ASCII
        text.replace_range(start..end, &put);
        check(&text);
    }

    #[test]
    fn any_value_for_a_known_key(key in prop::sample::select(keys()), value in value()) {
        check(&format!("{key} = {value}"));
    }

    #[test]
    fn many_values_at_once(settings in prop::collection::btree_map(prop::sample::select(keys()), value(), 0..6)) {
        let lines: Vec<_> = settings.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        check(&lines.join("\n"));
    }

    #[test]
    fn any_key(key in ".{0,40}", value in value()) {
        check(&format!("{} = {value}", toml::Value::String(key).to_string().replace("\"\"\"", "\"")));
    }
}
