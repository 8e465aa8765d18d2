//! Which folder of the runtime imports which: a graph without a loop, so that each can be read after those below it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Source, without_tests};

/// Whose folders.
const ROOT: &str = "crates/runtime/src/";

/// Folders, and files that have none, with what each imports.
#[derive(Debug, Default)]
pub(super) struct Graph(BTreeMap<String, BTreeSet<String>>);

impl Graph {
    pub(super) fn of(sources: &[Source]) -> Self {
        let own: Vec<_> = sources.iter().filter_map(|one| Some((one.path.strip_prefix(ROOT)?, &one.text))).collect();
        let names: BTreeSet<&str> = own.iter().map(|(path, _)| node(path)).filter(|name| *name != "lib").collect();
        // what the crate's root gives another name
        let lib = own.iter().find(|(path, _)| *path == "lib.rs").map_or("", |(_, text)| text.as_str());
        let exported = exports(lib, &names);
        let mut graph = Self::default();
        for (path, text) in own.iter().filter(|(path, _)| *path != "lib.rs") {
            let from = node(path);
            let to = graph.0.entry(from.to_owned()).or_default();
            for name in paths(without_tests(text), "crate::") {
                let target = names.get(name.as_str()).copied().or_else(|| exported.get(&name).map(String::as_str));
                to.extend(target.filter(|target| *target != from).map(ToOwned::to_owned));
            }
        }
        graph
    }

    /// Sets of folders of which each reaches all others.
    fn loops(&self) -> Vec<BTreeSet<&str>> {
        let reach: BTreeMap<&str, BTreeSet<&str>> =
            self.0.keys().map(|from| (from.as_str(), self.reachable(from))).collect();
        let mut found: Vec<BTreeSet<&str>> = Vec::new();
        for (from, to) in &reach {
            let back = |other: &&&str| reach.get(*other).is_some_and(|theirs| theirs.contains(from));
            let mut all: BTreeSet<&str> = to.iter().filter(back).copied().collect();
            if all.remove(from) && !all.is_empty() {
                all.insert(from);
                if !found.contains(&all) {
                    found.push(all);
                }
            }
        }
        found
    }

    fn reachable<'a>(&'a self, from: &'a str) -> BTreeSet<&'a str> {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
        while let Some(at) = next.pop() {
            for to in self.0.get(at).into_iter().flatten() {
                if seen.insert(to.as_str()) {
                    next.push(to);
                }
            }
        }
        seen
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (from, to) in &self.0 {
            let to: Vec<_> = to.iter().map(String::as_str).collect();
            writeln!(f, "    runtime::{from} -> {}", to.join(", "))?;
        }
        Ok(())
    }
}

pub(super) fn check(graph: &Graph) -> Vec<String> {
    let told = |all: BTreeSet<&str>| {
        let names: Vec<_> = all.into_iter().collect();
        format!("folders of {ROOT} import each other in a loop: {}", names.join(", "))
    };
    graph.loops().into_iter().map(told).collect()
}

/// A folder and the file that is called as it are one.
fn node(path: &str) -> &str {
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
}

/// Where each name comes from that the crate's root has by `pub use a::b`.
fn exports(lib: &str, names: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for line in lib
        .split(';')
        .filter_map(|line| line.trim().strip_prefix("pub use ").or(line.trim().strip_prefix("pub(crate) use ")))
    {
        let first = line.trim_start_matches("self::").split("::").next().unwrap_or_default();
        if names.contains(first) {
            for word in line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()) {
                all.insert(word.to_owned(), first.to_owned());
            }
        }
    }
    all
}

/// The first name of every path that begins so; of `crate::{a, b::{c, d}}` both `a` and `b`.
fn paths(text: &str, begin: &str) -> BTreeSet<String> {
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .fold(String::new(), |all, line| all + line + "\n");
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices(begin) {
        let rest = &code[at + begin.len()..];
        match rest.strip_prefix('{') {
            Some(group) => found.extend(heads(group)),
            None => drop(found.insert(word(rest))),
        }
    }
    found
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The first name of each part of a group, up to its end.
fn heads(group: &str) -> Vec<String> {
    let (mut depth, mut is_first, mut all) = (0, true, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => is_first = true,
            c if depth == 0 && is_first && !c.is_whitespace() => {
                is_first = false;
                all.push(word(&group[at..]));
            }
            _ => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(files: &[(&str, &str)]) -> Graph {
        let source = |(path, text): &(&str, &str)| Source { path: format!("{ROOT}{path}"), text: (*text).into() };
        Graph::of(&files.iter().map(source).collect::<Vec<_>>())
    }

    #[test]
    fn a_loop_is_found_whatever_way_it_is_written() {
        let lib = ("lib.rs", "mod a;\npub use error::Error;\npub use b::{B, Other};");
        let error = ("error.rs", "");
        for import in [
            "use crate::b::x;",
            "use crate::{Error,\n    b::{c, d}};",
            "fn f() -> crate::B {}",
            "use crate::{Error, Other};",
        ] {
            let files = [
                lib,
                error,
                ("a/mod.rs", import),
                ("a/more.rs", ""),
                ("b/mod.rs", "use crate::c;"),
                ("c.rs", "use crate::a;"),
            ];
            let wrong = check(&graph(&files));
            assert_eq!(wrong.len(), 1, "{import}");
            assert!(wrong[0].ends_with("loop: a, b, c"), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_no_import_is_none() {
        let lib = ("lib.rs", "pub use error::Error;");
        let tests = "use crate::c;\n#[cfg(test)]\nmod tests {\n    use crate::a;\n}";
        let files = [
            lib,
            ("error.rs", ""),
            ("a/mod.rs", "use crate::{Error, b};"),
            ("b.rs", tests),
            ("c.rs", "// crate::a\nuse crate::c::x;"),
        ];
        let graph = graph(&files);
        assert_eq!(check(&graph), Vec::<String>::new());
        assert_eq!(graph.to_string().lines().nth(1), Some("    runtime::b -> c"));
    }
}
