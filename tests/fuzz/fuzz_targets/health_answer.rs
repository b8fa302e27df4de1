//! What a health socket answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hsm_fuzz::health_answer(bytes));
