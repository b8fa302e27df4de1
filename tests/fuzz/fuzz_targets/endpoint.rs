//! The address of a socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| hsm_fuzz::endpoint(text));
