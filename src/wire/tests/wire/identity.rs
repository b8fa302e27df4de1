//! Derived names. The expected values were computed apart from this code, from the description:
//! SHA-256 over the domain string and each part, every one with its length as eight big-endian bytes
//! in front.

use hsm_wire::envelope::MAX_KEY_ID_LEN;
use hsm_wire::identity::{
    ClusterTag, FINGERPRINT_BLOCK, Fingerprint, FingerprintMethod, FingerprintPrefix, hex, key_id,
};

const IMAGE: [u8; 16] = *b"0123456789abcdef";

fn fingerprint() -> Fingerprint {
    Fingerprint::of_block_image(FingerprintMethod::Cmac, &IMAGE)
}

#[test]
fn the_fingerprint_is_the_hash_it_is_said_to_be() {
    assert_eq!(
        fingerprint().to_string(),
        "9e3bc644ce0da23138dcc1779fbad27830cb242b7a269688dac99f27e3be387e"
    );
    let ecb = Fingerprint::of_block_image(FingerprintMethod::Ecb, &IMAGE);
    assert_eq!(
        ecb.to_string(),
        "3fcba7f30289a9f4bc88eb08a5cb6dd3b49f58d56769c46fd74ab95402e2ac4f"
    );
}

#[test]
fn the_prefix_is_the_first_eight_bytes() {
    assert_eq!(fingerprint().prefix().0, fingerprint().0[..8]);
    assert_eq!(
        FingerprintPrefix::from(&fingerprint()),
        fingerprint().prefix()
    );
}

#[test]
fn the_cluster_tag_is_the_hash_it_is_said_to_be() {
    assert_eq!(
        ClusterTag::of("rciis-production").to_string(),
        "f1c7b88c0839a92e"
    );
}

#[test]
fn the_key_id_is_the_hash_it_is_said_to_be() {
    let id = key_id(&fingerprint(), 1, "rciis-production");
    assert_eq!(id, "9a66b88b0139638e59cb37a7c56f858e");
    assert!(id.len() <= MAX_KEY_ID_LEN);
}

#[test]
fn the_key_id_changes_with_key_epoch_and_cluster() {
    let other = Fingerprint::of_block_image(FingerprintMethod::Ecb, &IMAGE);
    let ids = [
        key_id(&fingerprint(), 1, "a"),
        key_id(&fingerprint(), 2, "a"),
        key_id(&fingerprint(), 1, "b"),
        key_id(&other, 1, "a"),
    ];
    for (i, id) in ids.iter().enumerate() {
        assert!(!ids[..i].contains(id), "{id} twice");
    }
}

#[test]
fn the_fingerprint_block_is_one_aes_block_and_never_a_counter_block_of_a_seal() {
    assert_ne!(FINGERPRINT_BLOCK, [0; 16]);
    let counter = u32::from_be_bytes(FINGERPRINT_BLOCK[12..].try_into().expect("four bytes"));
    // GCM counts from 1; the longest plaintext takes 32 blocks.
    assert!(counter > 1_000_000);
}

#[test]
fn names_are_shown_in_hex() {
    assert_eq!(hex(&[0, 0x0f, 0xff]), "000fff");
    assert_eq!(
        format!("{:?}", ClusterTag([0xab; 8])),
        "ClusterTag(abababababababab)"
    );
}
