//! Small BPF programs on a cgroup: their instructions, and how they get there.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct bpf_insn` of linux/bpf.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Insn {
    pub(crate) code: u8,
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

pub(crate) const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: dst | src << 4, offset, immediate }
}

// opcodes of linux/bpf.h, by what they do here
pub(crate) const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
pub(crate) const STORE_WORD: u8 = 0x63; // *(u32 *)(dst + offset) = src
pub(crate) const MOVE: u8 = 0xbc; // dst = (u32) src
pub(crate) const MOVE_IMM: u8 = 0xb7;
pub(crate) const AND_IMM: u8 = 0x54;
pub(crate) const SHIFT_RIGHT_IMM: u8 = 0x74;
pub(crate) const JUMP_NE_IMM: u8 = 0x55;
pub(crate) const JUMP_EQ_IMM: u8 = 0x15;
pub(crate) const JUMP_NE: u8 = 0x5d;
pub(crate) const EXIT: u8 = 0x95;

/// Loads a program of the type `kind` and attaches it to the cgroup, beside those that are there. `attach` is where (`enum
/// bpf_attach_type`), which some types want to know when they are loaded.
pub(crate) fn attach(cgroup: BorrowedFd<'_>, kind: u32, attach: u32, code: &[Insn]) -> io::Result<()> {
    const PROG_LOAD: libc::c_long = 5;
    const PROG_ATTACH: libc::c_long = 8;
    const ALLOW_MULTI: u32 = 2;

    /// The part of `union bpf_attr` for BPF_PROG_LOAD up to `expected_attach_type`.
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        code: u64,
        license: u64,
        log: [u64; 2],
        version_and_flags: u64,
        name: [u64; 2],
        interface: u32,
        expected_attach: u32,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
        rest: [u64; 4],
    }

    let load = Load {
        kind,
        count: u32::try_from(code.len()).map_err(io::Error::other)?,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach: attach,
        ..Load::default()
    };
    // SAFETY: `load` begins as bpf_attr for BPF_PROG_LOAD does, the rest is zero; code and license outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor.
    let program = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
    let attach = Attach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: attach,
        flags: ALLOW_MULTI,
        ..Attach::default()
    };
    // SAFETY: as above, for BPF_PROG_ATTACH; both descriptors are open.
    if unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of::<Attach>()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
