//! The contract between the runtime on the host and the agent in the guest.
//!
//! Owns the `.proto` files (Kata's wire: names, numbers and meanings), the generated messages and ttRPC stubs, the
//! ports, tags and guest paths that both sides must agree on, and the conversion of an OCI spec to its message form.
//! Runs nothing.

pub mod features;
pub mod limits;
pub mod mount_options;
#[cfg(feature = "oci")]
pub mod oci_convert;
pub mod paths;
pub mod ports;
pub mod storage;

/// Generated code: `proto/*.proto` through `ttrpc-codegen`, see `build.rs`.
#[allow(
    warnings,
    unsafe_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]
mod generated {
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
    pub mod csi {
        include!(concat!(env!("OUT_DIR"), "/csi.rs"));
    }
    pub mod health {
        include!(concat!(env!("OUT_DIR"), "/health.rs"));
    }
    pub mod health_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/health_ttrpc.rs"));
    }
    pub mod oci {
        include!(concat!(env!("OUT_DIR"), "/oci.rs"));
    }
    pub mod port {
        include!(concat!(env!("OUT_DIR"), "/port.rs"));
    }
    pub mod port_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/port_ttrpc.rs"));
    }
    pub mod resolver {
        include!(concat!(env!("OUT_DIR"), "/resolver.rs"));
    }
    pub mod resolver_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/resolver_ttrpc.rs"));
    }
    pub mod types {
        include!(concat!(env!("OUT_DIR"), "/types.rs"));
    }
    pub mod wake {
        include!(concat!(env!("OUT_DIR"), "/wake.rs"));
    }
    pub mod wake_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/wake_ttrpc.rs"));
    }
}

pub use generated::{
    agent, agent_ttrpc, csi, health, health_ttrpc, oci, port, port_ttrpc, resolver, resolver_ttrpc, types, wake,
    wake_ttrpc,
};

pub use protobuf;
pub use ttrpc;

/// `grpc_version` of `Health.Version`; Kata's agents answer the same.
pub const API_VERSION: &str = "0.0.1";
