//! What a process with a vendor's module in it answers. What decodes is the one encoding of its
//! meaning.
#![no_main]

use hsm_wire::host::{MAX_MESSAGE_LEN, Response};

libfuzzer_sys::fuzz_target!(|packet: &[u8]| {
    if let (true, Ok(response)) = (packet.len() <= MAX_MESSAGE_LEN, Response::decode(packet)) {
        assert_eq!(response.encode()[..], *packet);
    }
});
