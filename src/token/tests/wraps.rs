//! Every wrap on the tokens that have it. What no software token does (an IV of the token's own) is
//! imitated by a module over SoftHSM, and the tests' names say so.

mod support;

use hsm_wire::envelope::{MAC_LEN, MAC_MARK_LEN, Wrap};
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{Answer, KeyClass, KeyInfo, KeyRef, Recovery, Request};
use hsm_wire::secret::Secret;
use sha2::Digest;
use support::manners::Mannered;
use support::{Host, KEY_LABEL};

const AAD: &[u8] = b"header and key_id";

fn seal(host: &mut Host, key: &KeyRef, wrap: Wrap, plaintext: &[u8]) -> Result<Vec<u8>, Fault> {
    let request = Request::Seal {
        key: key.clone(),
        wrap,
        aad: AAD.to_vec(),
        plaintext: Secret::copy_of(plaintext),
    };
    match host.ask(&request).outcome? {
        Answer::Sealed(sealed) => Ok(sealed),
        other => panic!("{other:?}"),
    }
}

fn unseal(
    host: &mut Host,
    key: &KeyRef,
    wrap: Wrap,
    aad: &[u8],
    sealed: &[u8],
    len: usize,
) -> Result<Vec<u8>, Fault> {
    let request = Request::Unseal {
        key: key.clone(),
        wrap,
        aad: aad.to_vec(),
        sealed: sealed.to_vec(),
        plaintext_len: len as u32,
    };
    let response = host.ask(&request);
    assert_eq!(
        response.recovery,
        Recovery::default(),
        "{wrap:?}: {:?}\n{}",
        response.outcome,
        host.output()
    );
    match response.outcome? {
        Answer::Unsealed(plaintext) => Ok(plaintext.expose().to_vec()),
        other => panic!("{other:?}"),
    }
}

/// The wrapping key as the host describes it.
fn kek(host: &mut Host) -> KeyInfo {
    let keys = host.describe().keys;
    let found = keys.into_iter().find(|info| info.key.label == KEY_LABEL);
    found.expect("the wrapping key")
}

/// Better wraps and why they were passed over.
fn passed_over(info: &KeyInfo) -> Vec<(Wrap, &str)> {
    let better = info.passed_over.iter();
    better
        .map(|better| (better.wrap, better.reason.as_str()))
        .collect()
}

/// Seals and opens many lengths, and changes every byte there is.
fn prove(host: &mut Host, key: &KeyRef, wrap: Wrap, most: usize) -> Vec<u8> {
    let lengths = [1, 13, 15, 16, 17, 31, 32, 33, 45, 64, 100, 511, 512];
    for len in lengths.into_iter().filter(|len| *len <= most) {
        let plaintext: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x5a).collect();
        let sealed = seal(host, key, wrap, &plaintext).expect("it seals");
        if let Some(expected) = wrap.sealed_len(len as u32) {
            assert_eq!(sealed.len(), expected, "{len} bytes by {wrap:?}");
        }
        let back = unseal(host, key, wrap, AAD, &sealed, len);
        assert_eq!(back, Ok(plaintext), "{len} bytes by {wrap:?}");
    }
    let sealed = seal(host, key, wrap, &[7; 32]).expect("it seals");
    let again = seal(host, key, wrap, &[7; 32]).expect("it seals");
    assert!(
        wrap == Wrap::AES_KWP || sealed != again,
        "an IV is used once"
    );
    let mac = match wrap {
        Wrap::AES_CBC_HMAC | Wrap::RSA_OAEP_HMAC => sealed.len() - MAC_LEN,
        _ => usize::MAX,
    };
    // Each costs an RSA operation or several calls; all of the ends and every third between.
    for at in (0..sealed.len()).filter(|at| at % 3 == 0 || *at < 16 || *at + 26 > sealed.len()) {
        let mut changed = sealed.clone();
        changed[at] ^= 0x10;
        let fault = unseal(host, key, wrap, AAD, &changed, 32).expect_err("it was changed");
        let mark = (mac.saturating_sub(MAC_MARK_LEN)..mac).contains(&at) && mac != usize::MAX;
        let expected = if mark {
            FaultKind::KeyNotFound
        } else {
            FaultKind::Tampered
        };
        assert_eq!(fault.kind, expected, "byte {at} by {wrap:?}: {fault}");
    }
    let fault = unseal(host, key, wrap, b"another header", &sealed, 32).expect_err("another AAD");
    assert_eq!(fault.kind, FaultKind::Tampered, "{fault}");
    let fault = unseal(host, key, wrap, AAD, &sealed[1..], 32).expect_err("cut");
    assert_ne!(fault.kind, FaultKind::Device, "{fault}");
    assert_eq!(
        unseal(host, key, wrap, AAD, &sealed, 32),
        Ok(vec![7; 32]),
        "it still opens after all that"
    );
    let probe = Request::Probe {
        key: key.clone(),
        wrap,
    };
    assert_eq!(host.ask(&probe).outcome, Ok(Answer::Probed));
    sealed
}

#[test]
fn softhsm_wraps_by_gcm_with_our_iv_and_nothing_is_passed_over() {
    let token = Mannered::softhsm();
    let mut host = token.host("");
    let info = kek(&mut host);
    assert_eq!(
        (info.wrap, info.class),
        (Ok(Wrap::AES_GCM), KeyClass::Secret)
    );
    assert_eq!(info.passed_over, []);
    let sealed = prove(&mut host, &info.key, Wrap::AES_GCM, 512);
    assert_eq!(sealed.len(), 60);
}

#[test]
fn an_imitated_token_that_returns_its_iv_is_noticed_and_any_gcm_opens_what_it_sealed() {
    let token = Mannered::softhsm();
    let mut cloud = token.host("returned");
    let info = kek(&mut cloud);
    assert_eq!(info.wrap, Ok(Wrap::AES_GCM_RETURNED));
    assert_eq!(
        passed_over(&info),
        [(
            Wrap::AES_GCM,
            "C_EncryptInit answers CKR_MECHANISM_PARAM_INVALID"
        )]
    );
    let sealed = prove(&mut cloud, &info.key, Wrap::AES_GCM_RETURNED, 512);
    drop(cloud);
    let mut plain = token.host("");
    let key = kek(&mut plain).key;
    assert_eq!(key, info.key, "the fingerprint does not depend on the wrap");
    let mut open =
        |sealed: &[u8]| unseal(&mut plain, &key, Wrap::AES_GCM_RETURNED, AAD, sealed, 32);
    assert_eq!(open(&sealed), Ok(vec![7; 32]));
    let mut changed = sealed;
    changed[30] ^= 1;
    let fault = open(&changed).expect_err("changed");
    assert_eq!(fault.kind, FaultKind::Tampered, "{fault}");
}

#[test]
fn an_imitated_token_that_returns_its_iv_is_noticed_whatever_it_says_of_ours() {
    let token = Mannered::softhsm();
    let info = kek(&mut token.host("returned vague"));
    assert_eq!(info.wrap, Ok(Wrap::AES_GCM_RETURNED), "{info:?}");
}

#[test]
fn an_imitated_token_that_appends_its_iv_is_noticed_and_any_gcm_opens_what_it_sealed() {
    let token = Mannered::softhsm();
    let mut luna = token.host("appended");
    let info = kek(&mut luna);
    assert_eq!(info.wrap, Ok(Wrap::AES_GCM_APPENDED));
    let own = "the token does not take our IV for AES-GCM but chooses its own";
    assert_eq!(
        passed_over(&info),
        [(Wrap::AES_GCM, own), (Wrap::AES_GCM_RETURNED, own)]
    );
    let sealed = prove(&mut luna, &info.key, Wrap::AES_GCM_APPENDED, 512);
    assert_eq!(sealed.len(), 64);
    drop(luna);
    let mut plain = token.host("");
    let key = kek(&mut plain).key;
    let mut open =
        |sealed: &[u8]| unseal(&mut plain, &key, Wrap::AES_GCM_APPENDED, AAD, sealed, 32);
    assert_eq!(open(&sealed), Ok(vec![7; 32]));
    let mut changed = sealed;
    changed[5] ^= 1;
    let fault = open(&changed).expect_err("changed");
    assert_eq!(fault.kind, FaultKind::Tampered, "{fault}");
}

#[test]
fn a_token_that_takes_our_iv_gives_nothing_sealed_under_an_iv_of_zeros() {
    let token = Mannered::softhsm();
    let mut host = token.host("");
    let key = kek(&mut host).key;
    for wrap in [Wrap::AES_GCM_RETURNED, Wrap::AES_GCM_APPENDED] {
        let fault = seal(&mut host, &key, wrap, &[7; 32]).expect_err("not its manner");
        assert_eq!(fault.kind, FaultKind::Refused, "{fault}");
    }
}

#[test]
fn softhsm_without_gcm_and_without_a_key_for_hmac_wraps_by_nothing_and_every_reason_is_said() {
    let token = Mannered::softhsm();
    let mut host = token.host("no-gcm");
    let info = kek(&mut host);
    let reasons = passed_over(&info);
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert_eq!(
        reasons[0],
        (Wrap::AES_GCM, "C_EncryptInit answers CKR_MECHANISM_INVALID")
    );
    assert_eq!(reasons[1].0, Wrap::AES_KWP);
    assert_eq!(
        reasons[1].1, "AES-KWP of 33 bytes gives 40 back",
        "SoftHSM pads"
    );
    assert_eq!(
        reasons[2],
        (Wrap::AES_CBC_HMAC, "no key for HMAC has the same CKA_ID")
    );
    let error = info.wrap.clone().expect_err("none");
    for (_, reason) in reasons {
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn softhsm_without_gcm_wraps_by_cbc_and_hmac_with_the_key_of_the_same_id() {
    let token = Mannered::softhsm();
    token.add_mac_key("01");
    let mut host = token.host("no-gcm");
    let info = kek(&mut host);
    assert_eq!(info.wrap, Ok(Wrap::AES_CBC_HMAC));
    let better: Vec<Wrap> = passed_over(&info).iter().map(|(wrap, _)| *wrap).collect();
    assert_eq!(better, [Wrap::AES_GCM, Wrap::AES_KWP]);
    let sealed = prove(&mut host, &info.key, Wrap::AES_CBC_HMAC, 512);
    assert_eq!(sealed.len(), 88);
}

#[test]
fn a_second_key_for_hmac_opens_nothing_of_the_first_and_two_seal_nothing() {
    let token = Mannered::softhsm();
    token.add_mac_key("01");
    let mut host = token.host("no-gcm");
    let key = kek(&mut host).key;
    let first = seal(&mut host, &key, Wrap::AES_CBC_HMAC, &[1; 32]).expect("it seals");
    drop(host);
    token.add("GENERIC:32", "mac-2", "01", &["--sensitive"]);
    let mut host = token.host("no-gcm");
    let fault = seal(&mut host, &key, Wrap::AES_CBC_HMAC, &[2; 32]).expect_err("which one?");
    assert_eq!(fault.kind, FaultKind::KeyAmbiguous, "{fault}");
    let open =
        |host: &mut Host, sealed: &[u8]| unseal(host, &key, Wrap::AES_CBC_HMAC, AAD, sealed, 32);
    assert_eq!(open(&mut host, &first), Ok(vec![1; 32]), "by its mark");
    drop(host);
    token.change_id("mac", "01", "99");
    let mut host = token.host("no-gcm");
    let fault = open(&mut host, &first).expect_err("its MAC key has another id");
    assert_eq!(fault.kind, FaultKind::KeyNotFound, "{fault}");
    let second = seal(&mut host, &key, Wrap::AES_CBC_HMAC, &[2; 32]).expect("it seals");
    assert_eq!(open(&mut host, &second), Ok(vec![2; 32]));
}

#[test]
fn a_key_for_hmac_that_can_be_read_does_not_seal() {
    let token = Mannered::softhsm();
    token.add("GENERIC:32", "mac", "01", &["--extractable"]);
    let info = kek(&mut token.host("no-gcm"));
    let (wrap, reason) = passed_over(&info)[2];
    assert_eq!(wrap, Wrap::AES_CBC_HMAC);
    assert!(reason.contains("can be read"), "{reason}");
}

#[test]
fn an_envelope_opens_after_the_tokens_preferred_wrap_became_better() {
    let token = Mannered::softhsm();
    token.add_mac_key("01");
    let mut before = token.host("no-gcm");
    let info = kek(&mut before);
    let sealed = seal(&mut before, &info.key, Wrap::AES_CBC_HMAC, &[9; 32]).expect("it seals");
    drop(before);
    let mut after = token.host("");
    let now = kek(&mut after);
    assert_eq!(now.wrap, Ok(Wrap::AES_GCM));
    assert_eq!(now.key, info.key);
    let back = unseal(&mut after, &now.key, Wrap::AES_CBC_HMAC, AAD, &sealed, 32);
    assert_eq!(back, Ok(vec![9; 32]));
}

#[test]
fn an_envelope_opens_after_the_token_stopped_sealing_by_its_mechanism() {
    let token = Mannered::softhsm();
    token.add_mac_key("01");
    let mut before = token.host("");
    let info = kek(&mut before);
    let sealed = seal(&mut before, &info.key, Wrap::AES_GCM, &[9; 32]).expect("it seals");
    drop(before);
    let mut after = token.host("no-gcm-seal");
    let now = kek(&mut after);
    assert_eq!(now.wrap, Ok(Wrap::AES_CBC_HMAC));
    let mut open = |sealed: &[u8]| unseal(&mut after, &now.key, Wrap::AES_GCM, AAD, sealed, 32);
    assert_eq!(open(&sealed), Ok(vec![9; 32]));
    let mut changed = sealed;
    changed[20] ^= 1;
    let fault = open(&changed).expect_err("changed");
    assert_eq!(fault.kind, FaultKind::Tampered, "{fault}");
}

#[test]
fn a_key_keeps_its_fingerprint_whatever_the_token_wraps_by() {
    let token = Mannered::softhsm();
    token.add_mac_key("01");
    let of = |manners: &str| kek(&mut token.host(manners)).key.fingerprint;
    let plain = of("");
    for manners in ["returned", "appended", "no-gcm", "no-gcm no-import"] {
        assert_eq!(of(manners), plain, "{manners}");
    }
    assert_ne!(of("no-cmac"), plain, "by ECB it is another");
}

#[test]
fn softhsm_wraps_by_rsa_oaep_and_hmac_with_sha1_since_it_has_no_other() {
    let token = Mannered::softhsm();
    token.add("rsa:2048", "rsa-kek", "0a", &["--sensitive"]);
    token.add("rsa:2048", "ca", "0b", &["--sensitive"]);
    token.add_mac_key("0a");
    let mut host = token.host("");
    let keys = host.describe().keys;
    let labels: Vec<&str> = keys.iter().map(|info| info.key.label.as_str()).collect();
    assert_eq!(
        labels,
        [KEY_LABEL, "rsa-kek"],
        "no RSA key without one for HMAC"
    );
    let info = &keys[1];
    assert_eq!(info.class, KeyClass::Private);
    assert_eq!(info.bits, 2048);
    assert!(info.sensitive && !info.extractable && info.never_extractable);
    assert_eq!(info.wrap, Ok(Wrap::RSA_OAEP_HMAC));
    let spki = token.public_key("rsa-kek");
    assert_eq!(info.key.fingerprint.0, *sha2::Sha256::digest(spki));
    let sealed = prove(&mut host, &info.key, Wrap::RSA_OAEP_HMAC, 100);
    assert_eq!((sealed.len(), sealed[0]), (1 + 256 + 24, 2));
    let fault = seal(&mut host, &info.key, Wrap::RSA_OAEP_HMAC, &[0; 300]).expect_err("too long");
    assert_eq!(fault.kind, FaultKind::BadRequest, "{fault}");
}

#[test]
fn kryoptic_wraps_by_gcm_with_our_iv() {
    let token = Mannered::kryoptic();
    let mut host = token.host("");
    let info = kek(&mut host);
    assert_eq!(info.wrap, Ok(Wrap::AES_GCM), "{info:?}");
    prove(&mut host, &info.key, Wrap::AES_GCM, 512);
}

#[test]
fn kryoptic_without_gcm_wraps_by_kwp() {
    let token = Mannered::kryoptic();
    let mut host = token.host("no-gcm");
    let info = kek(&mut host);
    assert_eq!(info.wrap, Ok(Wrap::AES_KWP), "{info:?}");
    let sealed = prove(&mut host, &info.key, Wrap::AES_KWP, 512);
    assert_eq!(sealed.len(), 72);
}

#[test]
fn kryoptic_without_gcm_that_takes_no_plaintext_wraps_by_cbc_and_hmac() {
    let token = Mannered::kryoptic();
    token.add_mac_key("01");
    let mut host = token.host("no-gcm no-import");
    let info = kek(&mut host);
    assert_eq!(info.wrap, Ok(Wrap::AES_CBC_HMAC), "{info:?}");
    assert_eq!(
        passed_over(&info)[1],
        (
            Wrap::AES_KWP,
            "C_CreateObject answers CKR_FUNCTION_NOT_SUPPORTED"
        )
    );
    prove(&mut host, &info.key, Wrap::AES_CBC_HMAC, 512);
}

#[test]
fn kryoptic_wraps_by_rsa_oaep_and_hmac_with_sha256() {
    let token = Mannered::kryoptic();
    token.add("rsa:3072", "rsa-kek", "0a", &["--sensitive"]);
    token.add_mac_key("0a");
    let mut host = token.host("");
    let keys = host.describe().keys;
    let info = keys.iter().find(|info| info.class == KeyClass::Private);
    let info = info.expect("the RSA key").clone();
    assert_eq!(info.wrap, Ok(Wrap::RSA_OAEP_HMAC), "{info:?}");
    let sealed = prove(&mut host, &info.key, Wrap::RSA_OAEP_HMAC, 100);
    assert_eq!((sealed.len(), sealed[0]), (1 + 384 + 24, 1));
}

#[test]
fn opencryptoki_the_poor_one_wraps_by_cbc_and_hmac_and_its_keys_are_told_apart_by_ecb() {
    let token = Mannered::opencryptoki();
    token.add_mac_key("01");
    let mut host = token.host("");
    let info = kek(&mut host);
    assert_eq!(info.wrap, Ok(Wrap::AES_CBC_HMAC), "{info:?}");
    let better: Vec<Wrap> = passed_over(&info).iter().map(|(wrap, _)| *wrap).collect();
    assert_eq!(better, [Wrap::AES_GCM, Wrap::AES_KWP]);
    prove(&mut host, &info.key, Wrap::AES_CBC_HMAC, 512);
}

#[test]
fn opencryptoki_wraps_by_rsa_oaep_and_hmac() {
    let token = Mannered::opencryptoki();
    token.add("rsa:2048", "rsa-kek", "0a", &["--sensitive"]);
    token.add_mac_key("0a");
    let mut host = token.host("");
    let keys = host.describe().keys;
    let info = keys.iter().find(|info| info.class == KeyClass::Private);
    let info = info.expect("the RSA key").clone();
    assert_eq!(info.wrap, Ok(Wrap::RSA_OAEP_HMAC), "{info:?}");
    let sealed = prove(&mut host, &info.key, Wrap::RSA_OAEP_HMAC, 100);
    assert_eq!((sealed.len(), sealed[0]), (1 + 256 + 24, 1));
}
