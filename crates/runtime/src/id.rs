//! Identifiers that are safe as path components, because only such can be made.

use std::fmt;

use crate::Error;

/// Longest id, bytes: containerd's own limit (`identifiers.Validate`) is 76, CRI ids are 64.
const MAX: usize = 128;

fn check(kind: &'static str, id: &str) -> Result<(), Error> {
    let shown: String = id.chars().take(80).collect();
    let refuse = |why| Err(Error::Invalid(format!("{kind} id {shown:?} {why}")));
    if id.is_empty() {
        return refuse("is empty: give it a name");
    }
    if id.len() > MAX {
        return refuse("is too long: at most 128 bytes");
    }
    let bytes = id.as_bytes();
    let inside = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-".contains(byte);
    if !bytes[0].is_ascii_alphanumeric() || !bytes.iter().all(inside) {
        return refuse("has characters outside A-Z a-z 0-9 _ . - or does not begin with a letter or digit");
    }
    Ok(())
}

macro_rules! id {
    ($name:ident, $kind:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// Its text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<&str> for $name {
            type Error = Error;

            fn try_from(id: &str) -> Result<Self, Error> {
                check($kind, id).map(|()| Self(id.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(ContainerId, "container", "Names a container; the first one of a pod names the sandbox too.");
id!(ExecId, "exec", "Names a process that was added to a container.");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_is_no_name() {
        for bad in ["", ".", "..", "../x", "a/b", "-a", "a b", "a\0", "é", &"a".repeat(1000)] {
            let error = ContainerId::try_from(bad).expect_err(bad).to_string();
            assert!(error.len() < 300, "{error}");
        }
        ContainerId::try_from("c1_a.b-c").expect("a name");
    }

    proptest! {
        #[test]
        fn an_id_is_one_path_component(text in ".*") {
            if let Ok(id) = ContainerId::try_from(text.as_str()) {
                let path = std::path::Path::new("/base").join(id.as_str());
                prop_assert_eq!(path.parent(), Some(std::path::Path::new("/base")));
            }
        }
    }
}
