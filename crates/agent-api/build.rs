//! Generates messages and ttRPC stubs from `proto/` with Rust crates alone: no `protoc` is needed.

use std::{env, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

/// What a generated service answers to a call that it does not have; Kata's agent and gRPC say UNIMPLEMENTED.
const NOT_FOUND: &str = "::ttrpc::Code::NOT_FOUND";
const UNIMPLEMENTED: &str = "::ttrpc::Code::UNIMPLEMENTED";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let protos = ["agent", "csi", "health", "oci", "port", "resolver", "types", "wake"]
        .map(|name| format!("proto/{name}.proto"));
    for proto in &protos {
        println!("cargo:rerun-if-changed={proto}");
    }
    Codegen::new()
        .out_dir(&out)
        .inputs(&protos)
        .include("proto")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .expect("generating the agent protocol");

    // `include!` cannot take inner attributes and inner docs; the including module in lib.rs has its own
    for entry in fs::read_dir(&out).expect("reading OUT_DIR").flatten() {
        let text = fs::read_to_string(entry.path()).expect("reading generated code");
        let kept: Vec<_> = text.lines().filter(|line| !line.starts_with("#![") && !line.starts_with("//!")).collect();
        fs::write(entry.path(), kept.join("\n").replace(NOT_FOUND, UNIMPLEMENTED)).expect("writing generated code");
    }
}
