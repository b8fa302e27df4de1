//! What etcd holds. What comes apart must join to the same bytes.
#![no_main]

use hsm_wire::envelope::{join, split};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok((header, sealed)) = split(bytes) {
        assert_eq!(join(header, sealed), bytes);
    }
});
