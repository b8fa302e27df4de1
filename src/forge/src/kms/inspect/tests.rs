//! What is found in bytes, whatever they are wrapped in, and that no bytes at all make it panic.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hsm_wire::envelope::Wrap;
use hsm_wire::identity::{ClusterTag, FingerprintPrefix, hex};
use proptest::prelude::*;

use super::*;

/// What a kube-apiserver 1.34 stored.
const SECRET: &[u8] = include_bytes!("../../../tests/cmd/inspect/secret.bin");

fn envelope_of(sealed: &[u8]) -> Vec<u8> {
    let header = Header {
        wrap: Wrap::AES_GCM,
        key: FingerprintPrefix([7; 8]),
        cluster: ClusterTag::of("here"),
        plaintext_len: sealed.len().saturating_sub(28) as u32,
    };
    envelope::join(header, sealed)
}

#[test]
fn a_stored_secret_is_found_in_every_form_it_is_copied_in() {
    let stored = stored::find(SECRET).unwrap();
    assert!(envelope::split(&stored.envelope).is_ok());
    let spaced: String = hex(SECRET).chars().flat_map(|c| [c, ' ']).collect();
    for form in [
        hex(SECRET),
        hex(SECRET).to_uppercase(),
        spaced,
        STANDARD.encode(SECRET),
        URL_SAFE_NO_PAD.encode(SECRET),
        format!("{}\n", STANDARD.encode(SECRET)),
    ] {
        assert_eq!(stored::find(form.as_bytes()).as_ref(), Ok(&stored));
    }
    let with_line_end = [SECRET, b"\n"].concat();
    assert_eq!(stored::find(&with_line_end).as_ref(), Ok(&stored));
    let printed = [b"/registry/secrets/default/db\n", SECRET, b"\n"].concat();
    let named = stored::find(&printed).unwrap();
    let object = named.object.unwrap();
    assert_eq!(object.name.as_deref(), Some("/registry/secrets/default/db"));
    assert_eq!(object.key_id, stored.object.unwrap().key_id);
}

#[test]
fn a_value_cut_anywhere_gives_no_whole_envelope_and_no_other_object() {
    let whole = stored::find(SECRET).unwrap();
    for end in 0..SECRET.len() {
        if let Ok(found) = stored::find(&SECRET[..end]) {
            // Its last field is two bytes long and has a default.
            assert_eq!(found.envelope, whole.envelope, "{end}");
            assert!(end >= SECRET.len() - 2);
        }
    }
}

#[test]
fn the_parts_of_every_mechanism_add_up() {
    for mechanism in 1..=4 {
        for iv_mode in 0..=3 {
            let wrap = Wrap::from_bytes([mechanism, iv_mode]).unwrap();
            for len in [0, 1, 8, 24, 60, 64, 88, 280] {
                let sealed = vec![1; len];
                let sum: usize = words::parts(wrap, &sealed).iter().map(|(_, len)| len).sum();
                assert!(sum == len || len < 64, "{wrap:?} {len}");
                let _ = words::mac_key(wrap, &sealed);
            }
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = stored::find(&bytes);
        let value = [&b"k8s:enc:kms:v2:p:"[..], &bytes].concat();
        let _ = stored::find(&value);
    }

    #[test]
    fn a_value_with_bytes_changed_is_told_or_refused(
        at in 0..SECRET.len(), byte in any::<u8>()
    ) {
        let mut bytes = SECRET.to_vec();
        bytes[at] = byte;
        if let Ok(stored) = stored::find(&bytes) {
            let _ = envelope::split(&stored.envelope);
        }
    }

    #[test]
    fn an_envelope_is_found_in_hexadecimal_and_base64(
        sealed in proptest::collection::vec(any::<u8>(), 1..300)
    ) {
        let envelope = envelope_of(&sealed);
        for form in [hex(&envelope), STANDARD.encode(&envelope), URL_SAFE_NO_PAD.encode(&envelope)] {
            let stored = stored::find(form.as_bytes());
            prop_assert_eq!(&stored.unwrap().envelope, &envelope);
        }
    }
}
