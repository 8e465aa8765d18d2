//! One idea a file: no file is longer than what can be read in one go.

use super::Source;

/// Lines.
const LONGEST: usize = 500;

/// Files that are longer, and how long each may be. They shrink; none is added.
const LONGER: &[(&str, usize)] = &[
    ("crates/agent/src/cgroup.rs", 527),
    ("crates/runtime/src/cleanup.rs", 541),
    ("crates/runtime/src/sandbox/mod.rs", 603),
];

pub(super) fn check(sources: &[Source]) -> Vec<String> {
    check_with(sources, LONGER)
}

fn check_with(sources: &[Source], longer: &[(&str, usize)]) -> Vec<String> {
    let too_long = |source: &Source| {
        let lines = source.text.lines().count();
        let most = longer.iter().find(|(path, _)| *path == source.path).map_or(LONGEST, |(_, most)| *most);
        (lines > most).then(|| format!("{} has {lines} lines, more than {most}: part it in two", source.path))
    };
    sources.iter().filter_map(too_long).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_file_is_told_and_an_exception_has_a_bound() {
        let source = |path: &str, lines: usize| Source { path: path.into(), text: "x\n".repeat(lines) };
        let longer = [("crates/a/old.rs", 600)];
        let of = |path, lines| check_with(&[source(path, lines)], &longer).len();
        assert_eq!((of("crates/a/new.rs", LONGEST), of("crates/a/new.rs", LONGEST + 1)), (0, 1));
        assert_eq!((of("crates/a/old.rs", 600), of("crates/a/old.rs", 601)), (0, 1));
    }
}
