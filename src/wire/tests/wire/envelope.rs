//! The envelope's form: every way in which stored bytes can be wrong has its own finding.

use hsm_wire::cursor::MalformedError;
use hsm_wire::envelope::{
    EnvelopeError, HEADER_LEN, Header, IvMode, MAX_LEN, MAX_PLAINTEXT_LEN, Mechanism, Wrap, join,
    split,
};
use hsm_wire::identity::{ClusterTag, FingerprintPrefix};
use proptest::prelude::*;

use crate::samples;

fn sample() -> Vec<u8> {
    let (header, sealed) = samples::envelope();
    join(header, &sealed)
}

/// The sample with one byte set.
fn with(offset: usize, value: u8) -> Vec<u8> {
    let mut bytes = sample();
    bytes[offset] = value;
    bytes
}

fn error(bytes: &[u8]) -> EnvelopeError {
    split(bytes).expect_err("a damaged envelope is refused")
}

#[test]
fn no_bytes_are_empty_not_truncated() {
    assert_eq!(error(&[]), EnvelopeError::Empty);
}

#[test]
fn the_longest_storable_length_is_read_and_one_more_is_too_long() {
    let (mut header, _) = samples::envelope();
    header.wrap = Wrap {
        mechanism: Mechanism::RsaOaepHmac,
        iv_mode: IvMode::None,
    };
    let mut bytes = join(header, &vec![7; MAX_LEN - HEADER_LEN]);
    assert!(split(&bytes).is_ok());
    bytes.push(7);
    assert_eq!(error(&bytes), EnvelopeError::TooLong(MAX_LEN + 1));
}

#[test]
fn an_envelope_cut_anywhere_is_truncated_not_tampered() {
    let bytes = sample();
    for end in 1..bytes.len() {
        assert_eq!(error(&bytes[..end]), EnvelopeError::Truncated(end));
    }
}

#[test]
fn bytes_behind_an_aes_gcm_tag_are_trailing() {
    let mut bytes = sample();
    bytes.extend([0, 0]);
    assert_eq!(error(&bytes), EnvelopeError::Trailing(2));
}

#[test]
fn another_magic_is_a_foreign_format_however_short() {
    assert_eq!(error(b"k8s:enc:kms:v2:other"), EnvelopeError::ForeignFormat);
    assert_eq!(error(b"X"), EnvelopeError::ForeignFormat);
    for offset in 0..4 {
        assert_eq!(error(&with(offset, 0)), EnvelopeError::ForeignFormat);
    }
}

#[test]
fn a_later_format_version_is_named_before_anything_else_is_judged() {
    let mut bytes = with(4, 2);
    // What follows may mean anything in a later version.
    bytes[5..9].fill(0xff);
    assert_eq!(error(&bytes), EnvelopeError::Version(2));
    assert_eq!(error(&with(4, 0)), EnvelopeError::Version(0));
}

#[test]
fn a_mechanism_iv_mode_or_reserved_byte_that_does_not_exist_is_a_damaged_header() {
    let damaged = |field| EnvelopeError::Header(MalformedError::Value(field));
    assert_eq!(error(&with(5, 0)), damaged("mechanism"));
    assert_eq!(error(&with(5, 5)), damaged("mechanism"));
    assert_eq!(error(&with(6, 4)), damaged("IV mode"));
    assert_eq!(error(&with(7, 1)), damaged("reserved byte"));
}

#[test]
fn a_plaintext_length_over_the_limit_is_refused_before_it_is_used() {
    let mut bytes = sample();
    bytes[24..28].copy_from_slice(&(MAX_PLAINTEXT_LEN as u32 + 1).to_be_bytes());
    assert_eq!(error(&bytes), EnvelopeError::PlaintextLen(513));
    bytes[24..28].fill(0xff);
    assert_eq!(error(&bytes), EnvelopeError::PlaintextLen(u32::MAX));
}

#[test]
fn an_envelope_of_a_seed_is_within_120_bytes() {
    assert_eq!(sample().len(), 88);
}

#[test]
fn every_header_byte_is_authenticated() {
    let (header, _) = samples::envelope();
    let aad = header.aad(samples::KEY_ID);
    for offset in 5..HEADER_LEN {
        for bit in 0..8 {
            let mut bytes = sample();
            bytes[offset] ^= 1 << bit;
            if let Ok((changed, _)) = split(&bytes) {
                assert_ne!(
                    changed.aad(samples::KEY_ID),
                    aad,
                    "bit {bit} of byte {offset}"
                );
            }
        }
    }
}

fn wrap() -> impl Strategy<Value = Wrap> {
    (1..=4u8, 0..=3u8).prop_map(|(mechanism, iv_mode)| {
        Wrap::from_bytes([mechanism, iv_mode]).expect("every one of these exists")
    })
}

prop_compose! {
    fn header()(
        wrap in wrap(),
        key in any::<[u8; 8]>(),
        cluster in any::<[u8; 8]>(),
        plaintext_len in 0..=MAX_PLAINTEXT_LEN as u32,
    ) -> Header {
        Header { wrap, key: FingerprintPrefix(key), cluster: ClusterTag(cluster), plaintext_len }
    }
}

proptest! {
    #[test]
    fn what_is_joined_comes_apart_again(header in header(), filler in 1..400usize, byte in any::<u8>()) {
        let len = header.wrap.sealed_len(header.plaintext_len).unwrap_or(filler);
        let sealed = vec![byte; len];
        let joined = join(header, &sealed);
        prop_assert_eq!(split(&joined), Ok((header, &sealed[..])));
    }

    #[test]
    fn what_comes_apart_joins_to_the_same_bytes(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..1100),
        magic in any::<bool>(),
    ) {
        // Random bytes hardly ever begin with the magic.
        if magic && bytes.len() > 8 {
            bytes[..5].copy_from_slice(b"THSM\x01");
            bytes[5] %= 6;
            bytes[6] %= 5;
            bytes[7] %= 2;
        }
        if let Ok((header, sealed)) = split(&bytes) {
            prop_assert_eq!(join(header, sealed), bytes);
        }
    }
}
