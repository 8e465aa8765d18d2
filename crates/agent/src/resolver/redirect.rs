//! Leads what the guest's programs send to one port of an address to another port, where we listen, and its answers back.
//!
//! Nobody takes the first port by that: a name server of a container's own may have it, as where Docker redirects inside the
//! network namespace. It is done where sockets are given addresses, by programs on the root of the cgroups
//! (`BPF_PROG_TYPE_CGROUP_SOCK_ADDR`), so no packet is touched.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use crate::bpf::{self, EXIT, Insn, JUMP_NE_IMM, LOAD_WORD, MOVE_IMM, STORE_WORD, insn};

const SOCKET_ADDRESS_PROGRAM: u32 = 18;
/// `struct bpf_sock_addr`: the address and the port, both in network order.
const ADDRESS: i16 = 4;
const PORT: i16 = 24;

// enum bpf_attach_type: when a program names the other side ...
const CONNECT: u32 = 10;
const SEND: u32 = 14;
// ... and when it is told of it
const RECEIVE: u32 = 19;
const PEER_NAME: u32 = 29;

/// From `port` to `ours` at `address`, for as long as the guest runs.
pub(super) fn add(address: Ipv4Addr, port: u16, ours: u16) -> io::Result<()> {
    let root = File::open("/sys/fs/cgroup")?;
    for (attach, from, to) in
        [(CONNECT, port, ours), (SEND, port, ours), (RECEIVE, ours, port), (PEER_NAME, ours, port)]
    {
        bpf::attach(root.as_fd(), SOCKET_ADDRESS_PROGRAM, attach, &program(address, from, to))?;
    }
    Ok(())
}

fn program(address: Ipv4Addr, from: u16, to: u16) -> [Insn; 8] {
    let network = |port: u16| i32::from(u16::from_ne_bytes(port.to_be_bytes()));
    let address = i32::from_ne_bytes(address.octets());
    [
        insn(LOAD_WORD, 2, 1, ADDRESS, 0),
        insn(JUMP_NE_IMM, 2, 0, 4, address),
        insn(LOAD_WORD, 2, 1, PORT, 0),
        insn(JUMP_NE_IMM, 2, 0, 2, network(from)),
        insn(MOVE_IMM, 2, 0, 0, network(to)),
        insn(STORE_WORD, 1, 2, PORT, 0),
        // it may
        insn(MOVE_IMM, 0, 0, 0, 1),
        insn(EXIT, 0, 0, 0, 0),
    ]
}
