//! Who the process is and what it may: limits, user and groups, capabilities, environment.
#![allow(unsafe_code, reason = "prctl")]

use std::io;

use agent_api::oci;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::caps;
use super::child::{Outcome, named};

/// Largest passwd file that is looked at, bytes: the image is not ours.
const PASSWD_LIMIT: u64 = 1 << 20;

pub(super) fn limits(process: &oci::Process) -> Outcome<()> {
    for limit in &process.Rlimits {
        let which = match limit.Type.as_str() {
            "RLIMIT_AS" => Resource::RLIMIT_AS,
            "RLIMIT_CORE" => Resource::RLIMIT_CORE,
            "RLIMIT_CPU" => Resource::RLIMIT_CPU,
            "RLIMIT_DATA" => Resource::RLIMIT_DATA,
            "RLIMIT_FSIZE" => Resource::RLIMIT_FSIZE,
            "RLIMIT_LOCKS" => Resource::RLIMIT_LOCKS,
            "RLIMIT_MEMLOCK" => Resource::RLIMIT_MEMLOCK,
            "RLIMIT_MSGQUEUE" => Resource::RLIMIT_MSGQUEUE,
            "RLIMIT_NICE" => Resource::RLIMIT_NICE,
            "RLIMIT_NOFILE" => Resource::RLIMIT_NOFILE,
            "RLIMIT_NPROC" => Resource::RLIMIT_NPROC,
            "RLIMIT_RSS" => Resource::RLIMIT_RSS,
            "RLIMIT_RTPRIO" => Resource::RLIMIT_RTPRIO,
            "RLIMIT_RTTIME" => Resource::RLIMIT_RTTIME,
            "RLIMIT_SIGPENDING" => Resource::RLIMIT_SIGPENDING,
            "RLIMIT_STACK" => Resource::RLIMIT_STACK,
            other => return Err(format!("invalid rlimit type: {other}")),
        };
        setrlimit(which, limit.Soft, limit.Hard).map_err(named(format!("error setting {}", limit.Type)))?;
    }
    if process.OOMScoreAdj != 0 {
        std::fs::write("/proc/self/oom_score_adj", process.OOMScoreAdj.to_string()).map_err(named("oom_score_adj"))?;
    }
    Ok(())
}

/// The environment, and a home directory when it has none.
pub(super) fn environment(process: &oci::Process) -> (Vec<String>, Option<String>) {
    let env: Vec<String> = process.Env.iter().filter(|pair| pair.contains('=')).cloned().collect();
    let has_home = env.iter().any(|pair| pair.starts_with("HOME=") && pair.len() > 5);
    (env, (!has_home).then(|| home(process.User.UID)))
}

/// From the image's passwd, which is read as data and nothing more.
fn home(uid: u32) -> String {
    use io::Read;
    let mut text = String::new();
    if let Ok(file) = std::fs::File::open("/etc/passwd") {
        let _ = file.take(PASSWD_LIMIT).read_to_string(&mut text);
    }
    home_in(&text, uid).unwrap_or_else(|| "/".into())
}

fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        (fields.len() >= 6 && fields[2].parse() == Ok(uid) && !fields[5].is_empty()).then(|| fields[5].to_owned())
    })
}

/// Bounding set, groups, user. The permitted capabilities survive until [`finish`].
pub(super) fn become_user(process: &oci::Process) -> Outcome<()> {
    let wanted = process.Capabilities.as_ref();
    let bounding = wanted.map_or(0, |sets| caps::set(&sets.Bounding));
    caps::bound(bounding).map_err(named("bounding capabilities"))?;
    // SAFETY: prctl with numbers takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) } < 0 {
        return Err(format!("keeping capabilities: {}", io::Error::last_os_error()));
    }
    let user = &process.User;
    let groups: Vec<Gid> = user.AdditionalGids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups).map_err(named("additional groups"))?;
    let (gid, uid) = (Gid::from_raw(user.GID), Uid::from_raw(user.UID));
    setresgid(gid, gid, gid).map_err(named("group"))?;
    setresuid(uid, uid, uid).map_err(named("user"))?;
    // a change of user clears them; the directory is then entered with what the process will have
    let sets = wanted.map_or((0, 0, 0), |sets| {
        (caps::set(&sets.Effective), caps::set(&sets.Permitted), caps::set(&sets.Inheritable))
    });
    caps::apply(sets.0, sets.1, sets.2).map_err(named("capabilities"))?;
    let ambient = wanted.map_or(0, |sets| caps::set(&sets.Ambient));
    caps::ambient(ambient).map_err(named("ambient capabilities"))
}

/// What needs no privilege and comes last.
pub(super) fn finish(process: &oci::Process) -> Outcome<()> {
    let umask = process.User.Umask.unwrap_or(0o022);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
    if process.NoNewPrivileges {
        nix::sys::prctl::set_no_new_privs().map_err(named("no_new_privs"))?;
    }
    // SAFETY: prctl with numbers takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_found_and_nonsense_survived() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1000::/home/app:/bin/sh\n:::::\n";
        assert_eq!(home_in(passwd, 1000).as_deref(), Some("/home/app"));
        assert_eq!(home_in(passwd, 5), None);
    }
}
