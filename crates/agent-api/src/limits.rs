//! Bounds that both sides keep, so that neither can make the other hold more.

/// Largest ttRPC message, bytes (the protocol's own default).
pub const MESSAGE: usize = 4 << 20;
/// Most bytes of one stdio read or write call.
pub const STREAM_CHUNK: usize = 256 << 10;
/// Longest container or exec id, bytes.
pub const ID: usize = 256;
