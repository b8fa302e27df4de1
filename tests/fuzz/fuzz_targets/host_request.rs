//! What hsm-token receives. What decodes is the one encoding of its meaning.
#![no_main]

use hsm_wire::host::Request;

libfuzzer_sys::fuzz_target!(|packet: &[u8]| {
    if let Ok((id, request)) = Request::decode(packet) {
        assert_eq!(request.encode(id)[..], *packet);
    }
});
