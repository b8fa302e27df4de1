//! The committed fuzzing corpus, run once without a fuzzer: whoever has only the pinned compiler still
//! sees a crash that was found once.

use std::fs;
use std::path::PathBuf;

use hsm_wire::envelope;
use hsm_wire::host::{Request, Response};
use hsm_wire::uri::Uri;

fn each(target: &str, check: impl Fn(&[u8])) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fuzz/corpus")
        .join(target);
    let entries = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", folder.display()));
    let mut seeds = 0;
    for entry in entries {
        check(&fs::read(entry.expect("an entry").path()).expect("a seed is readable"));
        seeds += 1;
    }
    assert!(seeds > 0, "{target} has no seeds");
}

#[test]
fn envelope_seeds_are_survived() {
    each("envelope", |bytes| {
        let _ = envelope::split(bytes);
    });
}

#[test]
fn host_seeds_are_survived() {
    each("host_request", |bytes| {
        let _ = Request::decode(bytes);
    });
    each("host_response", |bytes| {
        let _ = Response::decode(bytes);
    });
}

#[test]
fn uri_seeds_are_survived() {
    each("uri", |bytes| {
        let _ = Uri::parse(&String::from_utf8_lossy(bytes));
    });
}
