//! What is said to come out of etcd, or off a clipboard.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hsm_fuzz::stored(bytes));
