//! procfs and cgroup names, which a peer may choose in part.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| hsm_fuzz::peer_of(text));
