//! Listening, tried with real sockets in real folders.

#[allow(
    dead_code,
    unused_imports,
    reason = "a test uses a part of what the daemon uses"
)]
#[path = "../src/listen/mod.rs"]
mod listen;
#[allow(
    dead_code,
    unused_imports,
    reason = "a test uses a part of what the daemon uses"
)]
#[path = "../src/peer/mod.rs"]
mod peer;
