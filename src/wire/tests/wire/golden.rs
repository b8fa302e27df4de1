//! Golden bytes: `tests/golden/NAME.hex`, compared with what the code writes today.
//!
//! They are in etcd and between two binaries of different versions, so a difference is a mistake until
//! proven otherwise. To record a new message: `TALOS_HSM_RECORD_GOLDEN=1 cargo test -p hsm-wire`; the
//! run that writes a file fails, so that nobody records by accident.

use std::fs;
use std::path::PathBuf;

use hsm_wire::envelope::{self, HEADER_LEN};
use hsm_wire::host::{Request, Response};
use hsm_wire::identity::hex;

use crate::samples;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(format!("{name}.hex"))
}

/// The recorded bytes: hex digits in any grouping, `#` begins a comment.
fn recorded(name: &str) -> Vec<u8> {
    let path = path(name);
    let text = fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let digits: Vec<u8> = text
        .lines()
        .flat_map(|line| line.split('#').next().unwrap_or_default().bytes())
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    assert_eq!(digits.len() % 2, 0, "{name}: an odd number of hex digits");
    digits
        .chunks(2)
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("hex digits are ASCII");
            u8::from_str_radix(pair, 16).unwrap_or_else(|_| panic!("{name}: `{pair}` is not hex"))
        })
        .collect()
}

/// Compares `written` with the recorded bytes and returns those.
fn assert_golden(name: &str, written: &[u8]) -> Vec<u8> {
    if std::env::var_os("TALOS_HSM_RECORD_GOLDEN").is_some() && !path(name).exists() {
        let lines: Vec<String> = written.chunks(32).map(|line| hex(line) + "\n").collect();
        fs::write(path(name), lines.concat()).expect("the golden folder is writable");
        panic!("recorded {name}.hex: look at it, commit it, and run again without the variable");
    }
    let recorded = recorded(name);
    assert_eq!(
        hex(written),
        hex(&recorded),
        "{name} is written differently now"
    );
    recorded
}

#[test]
fn requests_are_the_recorded_bytes_and_read_back_as_what_was_meant() {
    for (name, id, request) in samples::requests() {
        let bytes = assert_golden(&format!("request-{name}"), &request.encode(id));
        let (read_id, read) = Request::decode(&bytes).expect("a golden request decodes");
        assert_eq!((read_id, read), (id, request), "{name}");
    }
}

#[test]
fn responses_are_the_recorded_bytes_and_read_back_as_what_was_meant() {
    for (name, response) in samples::responses() {
        let bytes = assert_golden(&format!("response-{name}"), &response.encode());
        let read = Response::decode(&bytes).expect("a golden response decodes");
        assert_eq!(read, response, "{name}");
    }
}

#[test]
fn the_envelope_is_the_recorded_bytes_and_comes_apart_again() {
    let (header, sealed) = samples::envelope();
    let bytes = assert_golden("envelope-aes-gcm", &envelope::join(header, &sealed));
    assert_eq!(envelope::split(&bytes), Ok((header, &sealed[..])));
}

#[test]
fn the_envelopes_of_other_wraps_are_the_recorded_bytes_and_within_their_limits() {
    for (name, header, sealed) in samples::other_envelopes() {
        let bytes = assert_golden(name, &envelope::join(header, &sealed));
        assert_eq!(envelope::split(&bytes), Ok((header, &sealed[..])), "{name}");
        match header.wrap.sealed_len(header.plaintext_len) {
            Some(len) => assert!(len == sealed.len() && bytes.len() <= 120, "{name}"),
            None => assert!(bytes.len() <= 256 + 64, "{name}"),
        }
    }
}

#[test]
fn the_aad_is_the_recorded_header_and_key_id() {
    let (header, _) = samples::envelope();
    let bytes = assert_golden("envelope-aad", &header.aad(samples::KEY_ID));
    assert_eq!(
        bytes[..HEADER_LEN],
        recorded("envelope-aes-gcm")[..HEADER_LEN]
    );
    assert_eq!(&bytes[HEADER_LEN..], samples::KEY_ID.as_bytes());
}

#[test]
fn a_golden_message_cut_anywhere_or_prolonged_is_an_error() {
    for (name, ..) in samples::requests() {
        let mut bytes = recorded(&format!("request-{name}"));
        for end in 0..bytes.len() {
            assert!(
                Request::decode(&bytes[..end]).is_err(),
                "{name} cut at {end}"
            );
        }
        bytes.push(0);
        assert!(Request::decode(&bytes).is_err(), "{name} with a byte more");
    }
    for (name, _) in samples::responses() {
        let mut bytes = recorded(&format!("response-{name}"));
        for end in 0..bytes.len() {
            assert!(
                Response::decode(&bytes[..end]).is_err(),
                "{name} cut at {end}"
            );
        }
        bytes.push(0);
        assert!(Response::decode(&bytes).is_err(), "{name} with a byte more");
    }
    let mut bytes = recorded("envelope-aes-gcm");
    for end in 0..bytes.len() {
        assert!(
            envelope::split(&bytes[..end]).is_err(),
            "envelope cut at {end}"
        );
    }
    bytes.push(0);
    assert!(
        envelope::split(&bytes).is_err(),
        "envelope with a byte more"
    );
}

#[test]
fn no_golden_file_is_without_a_test() {
    let mut expected: Vec<String> = samples::requests()
        .iter()
        .map(|(name, ..)| format!("request-{name}.hex"))
        .chain(
            samples::responses()
                .iter()
                .map(|(name, _)| format!("response-{name}.hex")),
        )
        .chain([
            "envelope-aes-gcm.hex".to_owned(),
            "envelope-aad.hex".to_owned(),
        ])
        .chain(
            samples::other_envelopes()
                .iter()
                .map(|(name, ..)| format!("{name}.hex")),
        )
        .collect();
    let folder = path("x");
    let folder = folder.parent().expect("a file has a folder");
    let mut found: Vec<String> = fs::read_dir(folder)
        .expect("the golden folder is readable")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}
