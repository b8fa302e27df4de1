//! A configuration file, or what was meant to be one.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hsm_fuzz::configuration(bytes));
