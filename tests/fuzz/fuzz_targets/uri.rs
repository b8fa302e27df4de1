//! PKCS#11 URIs. What parses has one canonical text, which parses to the same.
#![no_main]

use hsm_wire::uri::Uri;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(uri) = Uri::parse(text) {
        assert_eq!(Uri::parse(&uri.to_string()), Ok(uri));
    }
});
