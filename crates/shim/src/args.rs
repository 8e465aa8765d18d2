//! What containerd passes on the command line (core/runtime/v2/README.md of containerd: Go flags, an action last).

use anyhow::{Result, bail};

/// The flags, by their names.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
pub(crate) struct Args {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) bundle: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    pub(crate) debug: bool,
    pub(crate) version: bool,
    pub(crate) help: bool,
    pub(crate) info: bool,
    /// `start`, `delete`, `features`, or empty for the server.
    pub(crate) action: String,
}

/// Parses as Go's `flag` package does: one dash or two, `-x=v` or `-x v`, unknown flags refused.
pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Args> {
    let mut out = Args::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).filter(|flag| !flag.is_empty())
        else {
            out.action = arg;
            break;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let switch = match name {
            "debug" => Some(&mut out.debug),
            "v" | "version" => Some(&mut out.version),
            "h" | "help" => Some(&mut out.help),
            "info" => Some(&mut out.info),
            _ => None,
        };
        if let Some(switch) = switch {
            *switch = value.is_none_or(|value| value == "true" || value == "1");
            continue;
        }
        let mut ignored = String::new();
        let slot = match name {
            "namespace" => &mut out.namespace,
            "id" => &mut out.id,
            "bundle" => &mut out.bundle,
            "address" => &mut out.address,
            // events go over ttRPC; the socket is inherited
            "publish-binary" | "socket" => &mut ignored,
            _ => bail!(
                "unknown flag -{name}: this program is run by containerd; see -help, and kata-runtime for administrators"
            ),
        };
        match value.or_else(|| args.next()) {
            Some(value) => *slot = value,
            None => bail!("flag -{name} needs a value"),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Args> {
        parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn as_containerd_calls() {
        let args = parse_line("-namespace k8s.io --id c1 -address=/run/c.sock -publish-binary /bin/c -debug start")
            .expect("parsed");
        let want = Args {
            namespace: "k8s.io".into(),
            id: "c1".into(),
            address: "/run/c.sock".into(),
            debug: true,
            action: "start".into(),
            ..Args::default()
        };
        assert_eq!(args, want);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert!(parse_line("-nope x start").is_err());
        assert!(parse_line("-id").is_err());
    }

    #[test]
    fn help_is_asked_for_as_with_go() {
        for flag in ["-h", "-help", "--help"] {
            assert!(parse_line(flag).expect("parsed").help, "{flag}");
        }
    }
}
