//! Gives one socket every TCP connection that is made inside a network namespace, whatever its port.
//!
//! A small BPF program on the namespace (kernel: Documentation/bpf/prog_sk_lookup.rst, since 5.9) names the socket when
//! the kernel looks for a listener. It goes with its descriptor, so a crash leaves nothing.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// commands and types of linux/bpf.h
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const MAP_OF_SOCKETS: u32 = 15;
const PROGRAM_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

// helpers
const LOOKUP_ELEMENT: i32 = 1;
const RELEASE: i32 = 86;
const ASSIGN: i32 = 124;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: dst | src << 4, offset, immediate }
}

/// Where `struct bpf_sk_lookup` has the protocol.
const PROTOCOL: i16 = 12;

/// r6 keeps the lookup, r7 the socket.
fn program(map: BorrowedFd<'_>) -> [Insn; 19] {
    const MOVE: u8 = 0xbf;
    const MOVE_IMM: u8 = 0xb7;
    const ADD_IMM: u8 = 0x07;
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD_IMM: u8 = 0x62;
    const LOAD_MAP: u8 = 0x18;
    const JUMP_NE_IMM: u8 = 0x55;
    const JUMP_EQ_IMM: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const OF_MAP: u8 = 1;
    const PASS: i32 = 1;
    [
        insn(MOVE, 6, 1, 0, 0),
        insn(LOAD_WORD, 2, 6, PROTOCOL, 0),
        insn(JUMP_NE_IMM, 2, 0, 14, libc::IPPROTO_TCP),
        insn(STORE_WORD_IMM, 10, 0, -4, 0),
        // two slots: the descriptor is a 64-bit immediate
        insn(LOAD_MAP, 1, OF_MAP, 0, map.as_raw_fd()),
        insn(0, 0, 0, 0, 0),
        insn(MOVE, 2, 10, 0, 0),
        insn(ADD_IMM, 2, 0, 0, -4),
        insn(CALL, 0, 0, 0, LOOKUP_ELEMENT),
        insn(JUMP_EQ_IMM, 0, 0, 7, 0),
        insn(MOVE, 7, 0, 0, 0),
        insn(MOVE, 1, 6, 0, 0),
        insn(MOVE, 2, 7, 0, 0),
        insn(MOVE_IMM, 3, 0, 0, 0),
        insn(CALL, 0, 0, 0, ASSIGN),
        insn(MOVE, 1, 7, 0, 0),
        insn(CALL, 0, 0, 0, RELEASE),
        insn(MOVE_IMM, 0, 0, 0, PASS),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

/// What keeps the steering up.
#[derive(Debug)]
pub(super) struct Steering {
    _link: OwnedFd,
}

/// Steers every connection of `namespace` to `listener`, which must be in it.
pub(super) fn all_to(listener: BorrowedFd<'_>, namespace: &File) -> io::Result<Steering> {
    // each begins as bpf_attr does for its command; what follows is zero
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
    }
    #[repr(C)]
    struct Update {
        map: u32,
        _pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach: u32,
    }
    #[repr(C)]
    struct Link {
        program: u32,
        target: u32,
        attach: u32,
        flags: u32,
    }

    let map = bpf(MAP_CREATE, &Create { kind: MAP_OF_SOCKETS, key_size: 4, value_size: 8, entries: 1 })?;
    let map = map.ok_or_else(no_descriptor)?;
    let (key, value) = (0_u32, listener.as_raw_fd() as u64);
    let update = Update {
        map: map.as_raw_fd() as u32,
        _pad: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE, &update)?;
    let code = program(map.as_fd());
    let load = Load {
        kind: PROGRAM_SK_LOOKUP,
        count: code.len() as u32,
        code: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"kata_forward\0\0\0\0",
        interface: 0,
        attach: ATTACH_SK_LOOKUP,
    };
    let program = bpf(PROG_LOAD, &load)?.ok_or_else(no_descriptor)?;
    let link = Link {
        program: program.as_raw_fd() as u32,
        target: namespace.as_raw_fd() as u32,
        attach: ATTACH_SK_LOOKUP,
        flags: 0,
    };
    Ok(Steering { _link: bpf(LINK_CREATE, &link)?.ok_or_else(no_descriptor)? })
}

/// A command; the descriptor that it returns, if it makes one.
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<Option<OwnedFd>> {
    // SAFETY: `attributes` begins as bpf_attr does for the command, with its true size; what it points to lives through
    // the call. The kernel takes what is missing behind it as zero.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    if command == MAP_UPDATE {
        return Ok(None);
    }
    let fd = i32::try_from(answer).map_err(io::Error::other)?;
    // SAFETY: the other commands return a new descriptor.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn no_descriptor() -> io::Error {
    io::Error::other("bpf(2) returned no descriptor")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    /// In a namespace of its own, where the machine lets us make one.
    #[test]
    fn every_port_leads_to_the_one_listener() {
        let thread = std::thread::spawn(|| -> Option<()> {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
            // SAFETY: ifreq is plain data, all zeroes is a valid value.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
                *to = *from as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
            // SAFETY: a valid socket and an ifreq that lives through the call.
            let up = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
            assert_eq!(up, 0, "{}", io::Error::last_os_error());
            let namespace = File::open("/proc/thread-self/ns/net").expect("opened");
            let listener = TcpListener::bind("[::]:0").expect("bound");
            TcpStream::connect("127.0.0.1:8080").expect_err("nobody listens there");
            let steering = all_to(listener.as_fd(), &namespace).expect("steered");
            for address in ["127.0.0.1:8080", "127.0.0.1:1", "[::1]:443"] {
                let there = TcpStream::connect(address).expect(address);
                let (here, _) = listener.accept().expect("accepted");
                let (to, from) = (here.local_addr().expect("told"), there.peer_addr().expect("told"));
                assert_eq!(to.port(), from.port());
            }
            drop(steering);
            TcpStream::connect("127.0.0.1:8080").expect_err("as before");
            Some(())
        });
        if thread.join().expect("ended").is_none() {
            eprintln!("skipped: network namespaces need root");
        }
    }
}
