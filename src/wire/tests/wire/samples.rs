//! One message of every kind, with no two fields alike, for the golden bytes.

use hsm_wire::envelope::{Header, IvMode, MAX_KEY_ID_LEN, Mechanism, Wrap};
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{
    Answer, Description, KeyClass, KeyInfo, KeyRef, LatchNote, Open, PassedOver, Recovery, Request,
    Response, TokenInfo,
};
use hsm_wire::identity::{ClusterTag, Fingerprint, FingerprintPrefix};
use hsm_wire::secret::Secret;

/// What kube-apiserver keeps beside the golden envelope.
pub(crate) const KEY_ID: &str = "0123456789abcdef0123456789abcdef";
const _: () = assert!(KEY_ID.len() <= MAX_KEY_ID_LEN);

/// `first`, `first` + 1, …: bytes whose order can be seen.
fn counting<const N: usize>(first: u8) -> [u8; N] {
    std::array::from_fn(|i| first.wrapping_add(i as u8))
}

/// An AES-GCM envelope of a 32-byte seed, as every node writes.
pub(crate) fn envelope() -> (Header, Vec<u8>) {
    let header = Header {
        wrap: Wrap::AES_GCM,
        key: FingerprintPrefix(counting(0xa0)),
        cluster: ClusterTag::of("rciis-production"),
        plaintext_len: 32,
    };
    (header, counting::<60>(0x01).to_vec())
}

/// Envelopes of the wraps that other tokens need: name, header, sealed part.
pub(crate) fn other_envelopes() -> Vec<(&'static str, Header, Vec<u8>)> {
    let of = |name, wrap: Wrap, len| {
        let header = Header {
            wrap,
            ..envelope().0
        };
        let bytes = (0..len).map(|i| 0x01_u8.wrapping_add(i as u8)).collect();
        (name, header, bytes)
    };
    vec![
        of("envelope-aes-gcm-returned", Wrap::AES_GCM_RETURNED, 60),
        of("envelope-aes-gcm-appended", Wrap::AES_GCM_APPENDED, 64),
        of("envelope-aes-kwp", Wrap::AES_KWP, 72),
        of("envelope-aes-cbc-hmac", Wrap::AES_CBC_HMAC, 88),
        // Of a modulus of 2048 bits.
        of("envelope-rsa-oaep-hmac", Wrap::RSA_OAEP_HMAC, 281),
    ]
}

fn key() -> KeyRef {
    KeyRef {
        id: vec![0x01, 0xff],
        label: "k8s-secrets-kek".to_owned(),
        fingerprint: Fingerprint(counting(0xa0)),
    }
}

fn token() -> TokenInfo {
    TokenInfo {
        label: "rciis-production".to_owned(),
        serial: "48ae1b3c0f5d2a71".to_owned(),
        manufacturer: "SoftHSM project".to_owned(),
        model: "SoftHSM v2".to_owned(),
    }
}

/// Name, id and request, for every kind.
pub(crate) fn requests() -> Vec<(&'static str, u64, Request)> {
    let open = Open {
        module: "/usr/lib/softhsm/libsofthsm2.so".to_owned(),
        token: "pkcs11:token=rciis-production".to_owned(),
        sessions: 4,
        pin: Some(Secret::copy_of(b"1234")),
        pin_generation: 7,
        latched: vec![
            LatchNote {
                serial: "48ae1b3c0f5d2a71".to_owned(),
                generation: 6,
            },
            LatchNote {
                serial: "é".to_owned(),
                generation: u32::MAX,
            },
        ],
    };
    let bare = Open {
        module: "/m.so".to_owned(),
        token: "pkcs11:slot-id=0".to_owned(),
        sessions: 1,
        pin: None,
        pin_generation: 1,
        latched: Vec::new(),
    };
    vec![
        ("open", 1, Request::Open(open)),
        ("open-without-pin", 2, Request::Open(bare)),
        ("describe", 3, Request::Describe),
        (
            "seal",
            0x0102_0304_0506_0708,
            Request::Seal {
                key: key(),
                wrap: Wrap::AES_GCM,
                aad: counting::<60>(0x10).to_vec(),
                plaintext: Secret::copy_of(&counting::<32>(0x80)),
            },
        ),
        (
            "unseal",
            5,
            Request::Unseal {
                key: key(),
                wrap: Wrap {
                    mechanism: Mechanism::AesGcm,
                    iv_mode: IvMode::Returned,
                },
                aad: counting::<60>(0x10).to_vec(),
                sealed: counting::<60>(0x01).to_vec(),
                plaintext_len: 32,
            },
        ),
        (
            "probe",
            u64::MAX,
            Request::Probe {
                key: key(),
                wrap: Wrap {
                    mechanism: Mechanism::RsaOaepHmac,
                    iv_mode: IvMode::None,
                },
            },
        ),
    ]
}

/// Name and response, for every kind.
pub(crate) fn responses() -> Vec<(&'static str, Response)> {
    let quiet = Recovery::default();
    let description = Description {
        token: token(),
        keys: vec![
            KeyInfo {
                key: key(),
                class: KeyClass::Secret,
                bits: 256,
                sensitive: true,
                extractable: false,
                never_extractable: true,
                wrap: Ok(Wrap {
                    mechanism: Mechanism::AesKwp,
                    iv_mode: IvMode::None,
                }),
                passed_over: vec![
                    PassedOver {
                        wrap: Wrap::AES_GCM,
                        reason: "another AAD is accepted".to_owned(),
                    },
                    PassedOver {
                        wrap: Wrap::AES_GCM_APPENDED,
                        reason: "é".to_owned(),
                    },
                ],
            },
            KeyInfo {
                key: KeyRef {
                    id: Vec::new(),
                    label: String::new(),
                    fingerprint: Fingerprint([0; 32]),
                },
                class: KeyClass::Private,
                bits: 128,
                sensitive: false,
                extractable: true,
                never_extractable: false,
                wrap: Err("CKA_ENCRYPT is false".to_owned()),
                passed_over: Vec::new(),
            },
        ],
        omitted: 3,
    };
    let fault = Fault {
        kind: FaultKind::PinIncorrect,
        ckr: 0xa0,
        function: "C_Login".to_owned(),
        detail: "the token refused the PIN".to_owned(),
        serial: "48ae1b3c0f5d2a71".to_owned(),
    };
    [
        ("opened", quiet, Ok(Answer::Opened(token()))),
        ("described", quiet, Ok(Answer::Described(description))),
        (
            "sealed",
            Recovery {
                retried: true,
                ..quiet
            },
            Ok(Answer::Sealed(counting::<60>(0x01).to_vec())),
        ),
        (
            "unsealed",
            Recovery {
                relogin: true,
                ..quiet
            },
            Ok(Answer::Unsealed(Secret::copy_of(&counting::<32>(0x80)))),
        ),
        (
            "probed",
            Recovery {
                reinit: true,
                ..quiet
            },
            Ok(Answer::Probed),
        ),
        (
            "fault",
            Recovery {
                retried: true,
                relogin: true,
                reinit: true,
            },
            Err(fault),
        ),
    ]
    .into_iter()
    .zip(0x1122_3344_5566_7701..)
    .map(|((name, recovery, outcome), id)| {
        let response = Response {
            id,
            recovery,
            outcome,
        };
        (name, response)
    })
    .collect()
}
