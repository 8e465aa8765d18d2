//! Which devices a container may open: a small BPF program on its cgroup (kernel: BPF_PROG_TYPE_CGROUP_DEVICE).
//!
//! Without the program everything is allowed, so every failure here is an error of the container's creation.

use std::io;
use std::os::fd::BorrowedFd;

use agent_api::oci::LinuxDeviceCgroup;

use crate::bpf::{
    self, AND_IMM, EXIT, Insn, JUMP_EQ_IMM, JUMP_NE, JUMP_NE_IMM, LOAD_WORD, MOVE, MOVE_IMM, SHIFT_RIGHT_IMM, insn,
};

const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;
/// More rules than that are refused: the verifier's own limit is near.
const MOST_RULES: usize = 500;

/// What every container may use, whatever its specification says: as runc.
const ALWAYS: &[(&str, i64, i64, &str)] = &[
    ("c", -1, -1, "m"),
    ("b", -1, -1, "m"),
    ("c", 1, 3, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 5, 1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 136, -1, "rwm"),
];

/// Rules in the specification's order, later ones stronger; nothing that is not allowed is.
fn program(rules: &[LinuxDeviceCgroup]) -> io::Result<Vec<Insn>> {
    let always = ALWAYS.iter().map(|(kind, major, minor, access)| LinuxDeviceCgroup {
        Allow: true,
        Type: (*kind).to_owned(),
        Major: *major,
        Minor: *minor,
        Access: (*access).to_owned(),
        ..Default::default()
    });
    // what is said again by a stronger rule is not said: most clients' rules are these, and one program fits them all
    let all: Vec<_> = rules.iter().filter(|rule| !is_said(rule)).cloned().chain(always).collect();
    if all.len() > MOST_RULES {
        return Err(io::Error::other(format!("{} device rules: the limit is {MOST_RULES}", all.len())));
    }
    // r2 access, r3 type, r4 major, r5 minor
    let mut code = vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(MOVE, 3, 2, 0, 0),
        insn(AND_IMM, 3, 0, 0, 0xffff),
        insn(SHIFT_RIGHT_IMM, 2, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in all.iter().rev() {
        let steps = one(rule)?;
        // move and exit alone: it fits everything, and the verifier refuses what can never be reached
        let fits_everything = steps.len() == 2;
        code.extend(steps);
        if fits_everything {
            return Ok(code);
        }
    }
    code.extend([insn(MOVE_IMM, 0, 0, 0, 0), insn(EXIT, 0, 0, 0, 0)]);
    Ok(code)
}

/// Whether it is one of those that all containers have.
fn is_said(rule: &LinuxDeviceCgroup) -> bool {
    rule.Allow
        && ALWAYS.iter().any(|(kind, major, minor, access)| {
            rule.Type == *kind && (rule.Major, rule.Minor) == (*major, *minor) && rule.Access == *access
        })
}

/// Whether these are the rules of a container that asked for nothing.
pub(crate) fn is_plain(rules: &[LinuxDeviceCgroup]) -> bool {
    matches!((program(rules), program(&[])), (Ok(one), Ok(other)) if one == other)
}

fn one(rule: &LinuxDeviceCgroup) -> io::Result<Vec<Insn>> {
    let mut tests = Vec::new();
    match rule.Type.as_str() {
        "" | "a" => {}
        "b" => tests.push(insn(JUMP_NE_IMM, 3, 0, 0, 1)),
        "c" | "u" => tests.push(insn(JUMP_NE_IMM, 3, 0, 0, 2)),
        other => return Err(io::Error::other(format!("invalid device type {other:?}: must be a, b or c"))),
    }
    let mut access = 0;
    for letter in rule.Access.chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => return Err(io::Error::other(format!("invalid device access {other:?}: must be of r, w and m"))),
        };
    }
    if access == 0 {
        access = ALL;
    }
    if access != ALL {
        tests.extend([insn(MOVE, 1, 2, 0, 0), insn(AND_IMM, 1, 0, 0, access)]);
        // allowed: everything asked for is in the rule; denied: anything is
        tests.push(if rule.Allow { insn(JUMP_NE, 1, 2, 0, 0) } else { insn(JUMP_EQ_IMM, 1, 0, 0, 0) });
    }
    for (register, number) in [(4, rule.Major), (5, rule.Minor)] {
        if number >= 0 {
            let number = i32::try_from(number).map_err(io::Error::other)?;
            tests.push(insn(JUMP_NE_IMM, register, 0, 0, number));
        }
    }
    tests.extend([insn(MOVE_IMM, 0, 0, 0, i32::from(rule.Allow)), insn(EXIT, 0, 0, 0, 0)]);
    // every test that fails jumps behind the rule
    let length = tests.len();
    for (at, test) in tests.iter_mut().enumerate() {
        if [JUMP_NE_IMM, JUMP_NE, JUMP_EQ_IMM].contains(&test.code) {
            test.offset = (length - at - 1) as i16;
        }
    }
    Ok(tests)
}

/// Loads the program for `rules` and attaches it to the cgroup.
pub(crate) fn attach(cgroup: BorrowedFd<'_>, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    const CGROUP_DEVICE_PROGRAM: u32 = 15;
    const CGROUP_DEVICE_ATTACH: u32 = 6;
    bpf::attach(cgroup, CGROUP_DEVICE_PROGRAM, CGROUP_DEVICE_ATTACH, &program(rules)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroup {
            Allow: allow,
            Type: kind.into(),
            Major: major,
            Minor: minor,
            Access: access.into(),
            ..Default::default()
        }
    }

    /// Runs a program as the kernel would.
    fn allowed(code: &[Insn], kind: u32, access: i32, major: u32, minor: u32) -> bool {
        let context = [(access as u32) << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let step = code[at];
            let (dst, src) = ((step.registers & 15) as usize, (step.registers >> 4) as usize);
            let mut jump = false;
            match step.code {
                LOAD_WORD => registers[dst] = context[step.offset as usize / 4].into(),
                MOVE => registers[dst] = u64::from(registers[src] as u32),
                MOVE_IMM => registers[dst] = step.immediate as u64,
                AND_IMM => registers[dst] &= u64::from(step.immediate as u32),
                SHIFT_RIGHT_IMM => registers[dst] >>= step.immediate,
                JUMP_NE_IMM => jump = registers[dst] != step.immediate as u64,
                JUMP_EQ_IMM => jump = registers[dst] == step.immediate as u64,
                JUMP_NE => jump = registers[dst] != registers[src],
                EXIT => return registers[0] != 0,
                other => panic!("opcode {other:#x}"),
            }
            at += 1 + if jump { step.offset as usize } else { 0 };
        }
    }

    #[test]
    fn later_rules_win_and_the_rest_is_denied() {
        let rules = [rule(false, "a", -1, -1, "rwm"), rule(true, "c", 10, 229, "rw"), rule(false, "c", 10, 229, "w")];
        let code = program(&rules).expect("a program");
        assert!(allowed(&code, 2, READ, 1, 3), "/dev/null");
        assert!(allowed(&code, 2, READ, 10, 229));
        assert!(!allowed(&code, 2, WRITE, 10, 229));
        assert!(!allowed(&code, 2, READ | WRITE, 10, 229));
        assert!(!allowed(&code, 1, READ, 8, 0), "a disk");
        assert!(allowed(&code, 1, MKNOD, 8, 0), "a node may be made, not opened");
        assert!(allowed(&code, 2, READ | WRITE, 136, 7), "terminals");
    }

    #[test]
    fn the_usual_rules_are_none() {
        let mut usual =
            vec![rule(false, "", -1, -1, "rwm"), rule(true, "c", -1, -1, "m"), rule(true, "c", 1, 3, "rwm")];
        assert!(is_plain(&usual));
        usual.push(rule(false, "c", 1, 3, "w"));
        assert!(!is_plain(&usual), "it is said, if in vain");
        assert!(!is_plain(&[rule(true, "c", 10, 229, "rwm")]) && !is_plain(&[rule(true, "a", -1, -1, "rwm")]));
        assert!(!is_plain(&[rule(true, "c", 1, 3, "x")]), "nonsense is told where it is used");
    }

    #[test]
    fn privileged_is_everything() {
        let code = program(&[rule(true, "", -1, -1, "rwm")]).expect("a program");
        assert!(allowed(&code, 1, READ | WRITE, 8, 0));
    }

    #[test]
    fn nothing_stands_behind_a_rule_for_everything() {
        let with = program(&[rule(true, "c", 7, 7, "r"), rule(false, "a", -1, -1, "rwm")]).expect("a program");
        let without = program(&[rule(false, "a", -1, -1, "rwm")]).expect("a program");
        assert_eq!(with, without);
        assert_eq!(with[with.len() - 2..], [insn(MOVE_IMM, 0, 0, 0, 0), insn(EXIT, 0, 0, 0, 0)]);
    }

    #[test]
    fn nonsense_is_refused() {
        program(&[rule(true, "x", 0, 0, "r")]).expect_err("type");
        program(&[rule(true, "c", 0, 0, "q")]).expect_err("access");
        program(&vec![rule(true, "c", 0, 0, "r"); 501]).expect_err("too many");
    }
}
