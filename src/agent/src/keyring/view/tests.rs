//! Which keys a rule means, which may seal, and what the status says of them.

use hsm_wire::host;

use super::*;

fn key(class: KeyClass) -> KeyInfo {
    KeyInfo {
        key: KeyRef {
            id: vec![1],
            label: "kek".to_owned(),
            fingerprint: Fingerprint([7; 32]),
        },
        class,
        bits: if class == KeyClass::Secret { 256 } else { 3072 },
        sensitive: true,
        extractable: false,
        never_extractable: true,
        wrap: Ok(Wrap::AES_CBC_HMAC),
        passed_over: vec![host::PassedOver {
            wrap: Wrap::AES_GCM,
            reason: "C_EncryptInit answers CKR_MECHANISM_INVALID".to_owned(),
        }],
    }
}

fn rule(uri: &str, allow_rsa_oaep: bool) -> KeyRule {
    KeyRule {
        uri: Uri::parse(uri).unwrap(),
        epoch: 1,
        state: KeyState::Active,
        backup_acknowledged: true,
        allow_rsa_oaep,
    }
}

#[test]
fn an_rsa_key_is_meant_only_by_a_rule_that_says_so_twice() {
    let (aes, rsa) = (key(KeyClass::Secret), key(KeyClass::Private));
    for (uri, allow_rsa_oaep, means_aes, means_rsa) in [
        ("pkcs11:object=kek", false, true, false),
        ("pkcs11:object=kek", true, true, false),
        ("pkcs11:object=kek;type=secret-key", true, true, false),
        ("pkcs11:object=kek;type=private", false, false, false),
        ("pkcs11:object=kek;type=private", true, false, true),
        ("pkcs11:id=%01;type=private", true, false, true),
        ("pkcs11:id=%02;type=private", true, false, false),
        ("pkcs11:object=ca;type=private", true, false, false),
    ] {
        let rule = rule(uri, allow_rsa_oaep);
        assert_eq!(matches_key(&rule, &aes), means_aes, "{uri}");
        assert_eq!(matches_key(&rule, &rsa), means_rsa, "{uri}");
    }
}

#[test]
fn a_kek_that_could_be_read_or_cannot_wrap_is_unusable_and_says_why() {
    assert_eq!(usable(&key(KeyClass::Secret)), Ok(Wrap::AES_CBC_HMAC));
    assert!(usable(&key(KeyClass::Private)).is_ok());
    type Change = fn(&mut KeyInfo);
    let changes: [(Change, &str); 5] = [
        (|key| key.sensitive = false, "CKA_SENSITIVE"),
        (|key| key.extractable = true, "CKA_EXTRACTABLE"),
        (|key| key.never_extractable = false, "CKA_NEVER_EXTRACTABLE"),
        (|key| key.bits = 1024, "1024 bits"),
        (
            |key| key.wrap = Err("AES-GCM: no".to_owned()),
            "cannot wrap: AES-GCM: no",
        ),
    ];
    for (change, reason) in changes {
        let mut key = key(KeyClass::Private);
        change(&mut key);
        let problem = usable(&key).unwrap_err();
        assert!(problem.contains(reason), "{problem}");
    }
}

#[test]
fn the_status_names_the_wrap_and_what_was_passed_over() {
    let info = key(KeyClass::Secret);
    assert_eq!(mechanism_name(&info), Some("AES-CBC-PAD + HMAC"));
    let expected = PassedOver {
        mechanism: "AES-GCM",
        reason: "C_EncryptInit answers CKR_MECHANISM_INVALID".to_owned(),
    };
    assert_eq!(passed_over(&info), [expected]);
}
