//! Who is let in, tried with real processes in real cgroups.

#[allow(
    dead_code,
    unused_imports,
    reason = "a test uses a part of what the daemon uses"
)]
#[path = "../src/peer/mod.rs"]
mod peer;
