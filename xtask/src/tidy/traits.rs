//! The border to VMMs stays small enough to be implemented in an afternoon.

use super::Source;

/// Methods.
const MOST: usize = 12;

/// The traits that every driver implements, and where they are.
const BORDER: &[(&str, &str)] =
    &[("crates/hypervisor/src/driver.rs", "pub trait Hypervisor"), ("crates/hypervisor/src/vm.rs", "pub trait Vm")];

pub(super) fn check(sources: &[Source]) -> Vec<String> {
    let wrong = |(path, name): &(&str, &str)| {
        let text = sources.iter().find(|source| source.path == *path).map_or("", |source| source.text.as_str());
        match methods(text, name) {
            None => Some(format!("{path} has no `{name}`: tell xtask/src/tidy/traits.rs where it is")),
            Some(count) => (count > MOST).then(|| {
                format!("{path}: `{name}` has {count} methods, more than {MOST}: make what is optional an accessor")
            }),
        }
    };
    BORDER.iter().filter_map(wrong).collect()
}

/// How many a trait has; `None` when it is not there.
fn methods(text: &str, name: &str) -> Option<usize> {
    let begin = text.match_indices(name).find(|(at, _)| text[at + name.len()..].starts_with([':', ' ']))?.0;
    let body = text[begin..].lines().take_while(|line| *line != "}");
    let is_method = |line: &&str| line.starts_with("    fn ") || line.starts_with("    async fn ");
    Some(body.filter(is_method).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_of_the_trait_alone_are_counted() {
        let text = "pub trait VmOther {\n    fn x();\n}\n\npub trait Vm: Send {\n    /// Doc fn.\n    fn a(&self);\n\n    \
                    async fn b(&self) {\n        fn inner() {}\n    }\n}\n\nimpl dyn Vm {\n    fn c() {}\n}\n";
        assert_eq!(methods(text, "pub trait Vm"), Some(2));
        assert_eq!(methods(text, "pub trait None"), None);
    }

    #[test]
    fn a_trait_that_grows_is_told() {
        let driver = |count: usize| {
            let text = format!("pub trait Hypervisor: Send {{\n{}}}\n", "    fn x();\n".repeat(count));
            let vm = Source { path: BORDER[1].0.into(), text: "pub trait Vm: Send {\n}\n".into() };
            check(&[Source { path: BORDER[0].0.into(), text }, vm]).len()
        };
        assert_eq!((driver(MOST), driver(MOST + 1)), (0, 1));
    }
}
