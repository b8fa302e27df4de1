//! The body of a gRPC request, of a caller of whom only its identity has been judged.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| hsm_fuzz::kms_request(body));
