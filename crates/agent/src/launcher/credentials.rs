//! Who the process is and what it may: limits, user and groups, capabilities, environment.
#![allow(unsafe_code, reason = "prctl, and streams by their numbers")]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::BorrowedFd;

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

/// The environment: of equal names the last one's value, in the place of the first, as runc has it; and a home directory
/// when it has none.
pub(super) fn environment(process: &oci::Process) -> Outcome<Vec<String>> {
    environment_with(process, || home(process.User.UID))
}

/// What is wrong with it, before anything is made for the process.
pub(super) fn check_environment(process: &oci::Process) -> Outcome<()> {
    environment_with(process, String::new).map(drop)
}

fn environment_with(process: &oci::Process, home: impl FnOnce() -> String) -> Outcome<Vec<String>> {
    let mut env: Vec<(&str, &str)> = Vec::with_capacity(process.Env.len() + 1);
    let mut places: HashMap<&str, usize> = HashMap::with_capacity(process.Env.len());
    for pair in &process.Env {
        let (name, value) = pair.split_once('=').ok_or_else(|| format!("invalid environment variable: {pair:?}"))?;
        if name.is_empty() {
            return Err(format!("environment variable name can't be empty: {pair:?}"));
        }
        match places.entry(name) {
            Entry::Occupied(place) => env[*place.get()].1 = value,
            Entry::Vacant(place) => {
                place.insert(env.len());
                env.push((name, value));
            }
        }
    }
    let homes;
    match places.get("HOME") {
        Some(place) if !env[*place].1.is_empty() => {}
        Some(place) => {
            homes = home();
            env[*place].1 = &homes;
        }
        None => {
            homes = home();
            env.push(("HOME", &homes));
        }
    }
    Ok(env.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
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
        (fields.len() >= 6 && fields[2].parse() == Ok(uid)).then(|| fields[5].to_owned())
    })
}

/// Pipes that a client's words go through belong to the process's user, who may open them again by their names in `/dev`.
/// A terminal is its user's already, and `/dev/null` everybody's.
pub(super) fn own_streams(process: &oci::Process) -> Outcome<()> {
    use nix::sys::stat::{SFlag, fstat};
    for (name, fd) in ["stdin", "stdout", "stderr"].into_iter().zip(0..) {
        // SAFETY: `arrange` put the streams there, and they stay open until the program's execution.
        let stream = unsafe { BorrowedFd::borrow_raw(fd) };
        let kind = fstat(stream).map_err(named(name))?.st_mode & SFlag::S_IFMT.bits();
        if kind == SFlag::S_IFIFO.bits() {
            nix::unistd::fchown(stream, Some(Uid::from_raw(process.User.UID)), None).map_err(named(name))?;
        }
    }
    Ok(())
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
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1000::/home/app:/bin/sh\n:::::\nno:x:7:7:::\n";
        assert_eq!(home_in(passwd, 1000).as_deref(), Some("/home/app"));
        assert_eq!(home_in(passwd, 5), None);
        // one who has none there has an empty one, as runc has it
        assert_eq!(home_in(passwd, 7).as_deref(), Some(""));
    }

    #[test]
    fn an_environment_is_what_runc_makes_of_it() {
        let of = |pairs: &[&str]| {
            let env = pairs.iter().map(ToString::to_string).collect();
            environment_with(&oci::Process { Env: env, ..Default::default() }, || "/h".into())
        };
        assert_eq!(of(&["A=1", "B=2", "A=3=4"]), Ok(["A=3=4", "B=2", "HOME=/h"].map(String::from).into()));
        assert_eq!(of(&["HOME=", "B="]), Ok(["HOME=/h", "B="].map(String::from).into()));
        assert_eq!(of(&["HOME=/a", "HOME=/b"]), Ok(["HOME=/b"].map(String::from).into()));
        assert_eq!(of(&["A"]), Err("invalid environment variable: \"A\"".into()));
        assert_eq!(of(&[""]), Err("invalid environment variable: \"\"".into()));
        assert_eq!(of(&["=x"]), Err("environment variable name can't be empty: \"=x\"".into()));
    }
}
