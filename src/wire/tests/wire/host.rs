//! Host messages: whatever is sent is received as it was meant, and nothing that a vendor's module or
//! a damaged peer can produce is believed.

use hsm_wire::cursor::MalformedError;
use hsm_wire::envelope::{MAX_LEN, MAX_PLAINTEXT_LEN, Wrap};
use hsm_wire::fault::{Fault, FaultKind, MAX_DETAIL_LEN, ckr_name};
use hsm_wire::host::{
    Answer, Description, KeyClass, KeyInfo, KeyRef, LatchNote, MAX_AAD_LEN, MAX_KEYS,
    MAX_MESSAGE_LEN, MAX_NAME_LEN, MAX_PASSED_OVER, MAX_PIN_LEN, MAX_REASON_LEN, Open, PassedOver,
    Recovery, Request, Response, TokenInfo,
};
use hsm_wire::identity::Fingerprint;
use hsm_wire::secret::Secret;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::samples;

fn sample(name: &str) -> (u64, Request) {
    samples::requests()
        .into_iter()
        .find_map(|(found, id, request)| (found == name).then_some((id, request)))
        .unwrap_or_else(|| panic!("there is no sample {name}"))
}

/// The sample request with one byte set.
fn request_with(name: &str, offset: usize, value: u8) -> MalformedError {
    let (id, request) = sample(name);
    let mut bytes = request.encode(id).to_vec();
    bytes[offset] = value;
    Request::decode(&bytes).expect_err("a damaged request is refused")
}

fn probed_with(offset: usize, value: u8) -> MalformedError {
    let response = Response {
        id: 1,
        recovery: Recovery::default(),
        outcome: Ok(Answer::Probed),
    };
    let mut bytes = response.encode().to_vec();
    bytes[offset] = value;
    Response::decode(&bytes).expect_err("a damaged response is refused")
}

#[test]
fn another_protocol_version_is_refused_on_both_sides() {
    assert_eq!(
        request_with("describe", 0, 2),
        MalformedError::Value("version")
    );
    assert_eq!(probed_with(0, 0), MalformedError::Value("version"));
}

#[test]
fn a_kind_that_does_not_exist_is_refused_on_both_sides() {
    for kind in [0, 6, 0x7f, 0x82, 0xff] {
        assert_eq!(
            request_with("describe", 1, kind),
            MalformedError::Value("request kind")
        );
    }
    // A response without the high bit is a request that came back.
    for kind in [0x80, 0x86, 0x05, 0x7f, 0xfe] {
        assert_eq!(probed_with(1, kind), MalformedError::Value("response kind"));
    }
}

#[test]
fn reserved_bytes_must_be_zero() {
    assert_eq!(
        request_with("describe", 2, 1),
        MalformedError::Value("reserved bytes")
    );
    assert_eq!(probed_with(3, 1), MalformedError::Value("reserved bytes"));
}

#[test]
fn recovery_steps_that_do_not_exist_are_refused() {
    assert_eq!(probed_with(12, 8), MalformedError::Value("recovery steps"));
}

#[test]
fn a_request_may_carry_what_is_at_its_limit_and_not_a_byte_more() {
    let seal = |id: usize, label: usize, aad: usize, plaintext: usize| {
        let request = Request::Seal {
            key: KeyRef {
                id: vec![1; id],
                label: "l".repeat(label),
                fingerprint: Fingerprint([2; 32]),
            },
            wrap: Wrap::AES_GCM,
            aad: vec![3; aad],
            plaintext: Secret::new(vec![4; plaintext]),
        };
        Request::decode(&request.encode(9)).map(|(_, read)| assert_eq!(read, request))
    };
    let (name, aad, plaintext) = (MAX_NAME_LEN, MAX_AAD_LEN, MAX_PLAINTEXT_LEN);
    assert_eq!(seal(name, name, aad, plaintext), Ok(()));
    let over = |field| Err(MalformedError::Limit(field));
    assert_eq!(seal(name + 1, name, aad, plaintext), over("key id"));
    assert_eq!(seal(name, name + 1, aad, plaintext), over("key label"));
    assert_eq!(seal(name, name, aad + 1, plaintext), over("AAD"));
    assert_eq!(seal(name, name, aad, plaintext + 1), over("plaintext"));
}

#[test]
fn an_unseal_may_carry_an_envelope_at_its_limit_and_not_a_byte_more() {
    let unseal = |sealed: usize| {
        let (id, request) = sample("unseal");
        let Request::Unseal {
            key,
            wrap,
            aad,
            plaintext_len,
            ..
        } = request
        else {
            panic!("the sample is an Unseal");
        };
        let sealed = vec![5; sealed];
        let request = Request::Unseal {
            key,
            wrap,
            aad,
            sealed,
            plaintext_len,
        };
        Request::decode(&request.encode(id)).map(|_| ())
    };
    assert_eq!(unseal(MAX_LEN), Ok(()));
    assert_eq!(
        unseal(MAX_LEN + 1),
        Err(MalformedError::Limit("sealed part"))
    );
}

#[test]
fn an_open_at_every_limit_is_within_a_message_and_keeps_the_pin() {
    let open = |pin: usize, notes: usize| {
        let request = Request::Open(Open {
            module: "/".repeat(4096),
            token: "t".repeat(2048),
            sessions: 64,
            pin: Some(Secret::new(vec![b'9'; pin])),
            pin_generation: u32::MAX,
            latched: (0..notes)
                .map(|_| LatchNote {
                    serial: "s".repeat(MAX_NAME_LEN),
                    generation: 1,
                })
                .collect(),
        });
        let bytes = request.encode(1);
        assert!(bytes.len() <= MAX_MESSAGE_LEN);
        Request::decode(&bytes).map(|(_, read)| read == request)
    };
    assert_eq!(open(MAX_PIN_LEN, 64), Ok(true));
    assert_eq!(open(MAX_PIN_LEN + 1, 0), Err(MalformedError::Limit("PIN")));
}

#[test]
fn a_pin_marker_that_does_not_exist_is_refused() {
    let (id, request) = sample("open-without-pin");
    let bytes = request.encode(id);
    // The marker is in front of the count of latch notes, the last two bytes.
    let error = request_with("open-without-pin", bytes.len() - 3, 2);
    assert_eq!(error, MalformedError::Value("PIN marker"));
}

#[test]
fn more_latch_notes_than_there_may_be_are_refused_before_they_are_read() {
    let (id, request) = sample("open-without-pin");
    let mut bytes = request.encode(id).to_vec();
    let count = bytes.len() - 2;
    bytes[count..].copy_from_slice(&65u16.to_be_bytes());
    assert_eq!(
        Request::decode(&bytes),
        Err(MalformedError::Limit("latch notes"))
    );
}

fn key_info(id: usize, label: usize, reason: usize) -> KeyInfo {
    KeyInfo {
        key: KeyRef {
            id: vec![7; id],
            label: "k".repeat(label),
            fingerprint: Fingerprint([8; 32]),
        },
        class: KeyClass::Secret,
        bits: 256,
        sensitive: true,
        extractable: false,
        never_extractable: true,
        wrap: Err("r".repeat(reason)),
        passed_over: Vec::new(),
    }
}

fn described(keys: Vec<KeyInfo>, omitted: u16) -> Description {
    let token = TokenInfo {
        label: "t".repeat(MAX_NAME_LEN),
        serial: "s".repeat(MAX_NAME_LEN),
        manufacturer: "f".repeat(MAX_NAME_LEN),
        model: "m".repeat(MAX_NAME_LEN),
    };
    let response = Response {
        id: 1,
        recovery: Recovery::default(),
        outcome: Ok(Answer::Described(Description {
            token,
            keys,
            omitted,
        })),
    };
    let bytes = response.encode();
    assert!(bytes.len() <= MAX_MESSAGE_LEN, "{} bytes", bytes.len());
    let read = Response::decode(&bytes).expect("whatever a token holds can be described");
    match read.outcome {
        Ok(Answer::Described(description)) => description,
        other => panic!("{other:?}"),
    }
}

#[test]
fn keys_over_the_number_that_can_be_listed_are_counted() {
    let keys = (0..MAX_KEYS + 5).map(|_| key_info(2, 15, 20)).collect();
    let read = described(keys, 3);
    assert_eq!((read.keys.len(), read.omitted), (MAX_KEYS, 8));
}

#[test]
fn keys_whose_names_would_fill_more_than_a_message_are_counted() {
    let keys = (0..MAX_KEYS)
        .map(|_| key_info(MAX_NAME_LEN, MAX_NAME_LEN, MAX_NAME_LEN))
        .collect();
    let read = described(keys, 0);
    assert_eq!(read.keys.len() + usize::from(read.omitted), MAX_KEYS);
    assert!(read.keys.len() > 70, "{} keys", read.keys.len());
}

#[test]
fn wraps_passed_over_and_their_reasons_are_cut_to_their_limits_and_the_message_to_its_own() {
    let better = PassedOver {
        wrap: Wrap::AES_GCM_RETURNED,
        reason: "€".repeat(MAX_REASON_LEN),
    };
    let key = KeyInfo {
        passed_over: vec![better; MAX_PASSED_OVER + 1],
        ..key_info(MAX_NAME_LEN, MAX_NAME_LEN, MAX_NAME_LEN)
    };
    let read = described(vec![key; MAX_KEYS], 0);
    assert_eq!(read.keys.len() + usize::from(read.omitted), MAX_KEYS);
    assert!(read.keys.len() > 40, "{} keys", read.keys.len());
    let passed_over = &read.keys[0].passed_over;
    assert_eq!(passed_over.len(), MAX_PASSED_OVER);
    assert_eq!(passed_over[0].reason, "€".repeat(MAX_REASON_LEN / 3));
}

#[test]
fn a_key_whose_name_is_over_its_limit_is_counted_and_the_others_are_listed() {
    let keys = vec![
        key_info(MAX_NAME_LEN + 1, 1, 1),
        key_info(1, 70_000, 1),
        key_info(1, 1, 70_000),
    ];
    let read = described(keys, u16::MAX - 1);
    assert_eq!(
        read.omitted,
        u16::MAX,
        "the count stays at its highest value"
    );
    assert_eq!(read.keys, [key_info(1, 1, MAX_NAME_LEN)]);
}

#[test]
fn key_flags_and_wrap_markers_that_do_not_exist_are_refused() {
    let response = Response {
        id: 1,
        recovery: Recovery::default(),
        outcome: Ok(Answer::Described(Description {
            keys: vec![KeyInfo {
                wrap: Ok(Wrap::AES_GCM),
                ..key_info(0, 0, 0)
            }],
            ..Description::default()
        })),
    };
    let bytes = response.encode();
    let with = |from_end: usize, value: u8| {
        let mut bytes = bytes.to_vec();
        let offset = bytes.len() - from_end;
        bytes[offset] = value;
        Response::decode(&bytes)
    };
    assert_eq!(with(5, 16), Err(MalformedError::Value("key flags")));
    assert_eq!(with(4, 2), Err(MalformedError::Value("wrap marker")));
    assert_eq!(with(3, 9), Err(MalformedError::Value("mechanism")));
    assert_eq!(with(1, 6), Err(MalformedError::Limit("wraps passed over")));
}

#[test]
fn more_keys_than_there_may_be_are_refused_before_they_are_read() {
    let response = Response {
        id: 1,
        recovery: Recovery::default(),
        outcome: Ok(Answer::Described(Description::default())),
    };
    let mut bytes = response.encode().to_vec();
    let count = bytes.len() - 2;
    bytes[count..].copy_from_slice(&(MAX_KEYS as u16 + 1).to_be_bytes());
    assert_eq!(Response::decode(&bytes), Err(MalformedError::Limit("keys")));
}

#[test]
fn a_fault_of_any_length_arrives_cut_between_characters() {
    let fault = Fault {
        kind: FaultKind::Device,
        ckr: u64::MAX,
        function: "f".repeat(70_000),
        // 511 is no boundary of a three-byte character: 510 bytes are kept.
        detail: format!("x{}", "€".repeat(300)),
        serial: "s".repeat(300),
    };
    let response = Response {
        id: 1,
        recovery: Recovery::default(),
        outcome: Err(fault),
    };
    let bytes = response.encode();
    let read = Response::decode(&bytes).expect("whatever went wrong can be said");
    let fault = read.outcome.expect_err("it is a fault");
    assert_eq!(fault.function.len(), MAX_DETAIL_LEN);
    assert_eq!(fault.detail, format!("x{}", "€".repeat(170)));
    assert_eq!(fault.serial.len(), MAX_NAME_LEN);
}

#[test]
fn every_fault_kind_has_its_number_and_at_most_one_meaning() {
    let kinds: Vec<FaultKind> = (0..=u8::MAX).filter_map(FaultKind::from_u8).collect();
    assert_eq!(kinds.len(), 19);
    for (number, kind) in (1..).zip(kinds) {
        assert_eq!(kind as u8, number);
        assert!(!(kind.is_latched() && kind.is_token_lost()), "{kind:?}");
    }
}

#[test]
fn a_fault_is_said_with_function_and_code_where_they_are_known() {
    let mut fault = Fault::new(FaultKind::Device, "the token is gone");
    assert_eq!(fault.to_string(), "the token is gone");
    fault.function = "C_Encrypt".to_owned();
    assert_eq!(fault.to_string(), "the token is gone (C_Encrypt)");
    fault.ckr = 0x32;
    assert_eq!(
        fault.to_string(),
        "the token is gone (C_Encrypt: CKR_DEVICE_REMOVED)"
    );
    fault.ckr = 0x8000_0001;
    assert_eq!(
        fault.to_string(),
        "the token is gone (C_Encrypt: CKR 0x80000001)"
    );
    assert_eq!(fault.on_token("77").serial, "77");
    assert_eq!(ckr_name(0), "CKR_OK");
}

#[test]
fn neither_pin_nor_plaintext_is_shown_by_debug() {
    for (name, _, request) in samples::requests() {
        let shown = format!("{request:?}");
        // PIN and plaintext of the samples, as text and as a list of bytes.
        for secret in ["1234", "[49, 50, 51, 52]", "[128, 129, 130"] {
            assert!(!shown.contains(secret), "{name}: {shown}");
        }
    }
    let unsealed = Answer::Unsealed(Secret::copy_of(b"canary"));
    assert_eq!(format!("{unsealed:?}"), "Unsealed(Secret(6 bytes))");
}

fn bytes(limit: usize) -> impl Strategy<Value = Vec<u8>> {
    // The limits are cases of their own: random lengths hardly ever meet them.
    prop_oneof![4 => vec(any::<u8>(), 0..=limit.min(80)), 1 => vec(any::<u8>(), limit)]
}

fn name() -> impl Strategy<Value = String> {
    "\\PC{0,20}".prop_map(|text| text.chars().take(60).collect())
}

fn wrap() -> impl Strategy<Value = Wrap> {
    (1..=4u8, 0..=3u8).prop_map(|(mechanism, iv_mode)| {
        Wrap::from_bytes([mechanism, iv_mode]).expect("every one of these exists")
    })
}

fn secret(limit: usize) -> impl Strategy<Value = Secret> {
    bytes(limit).prop_map(Secret::new)
}

prop_compose! {
    fn key()(id in bytes(MAX_NAME_LEN), label in name(), fingerprint in any::<[u8; 32]>()) -> KeyRef {
        KeyRef { id, label, fingerprint: Fingerprint(fingerprint) }
    }
}

prop_compose! {
    fn token()(label in name(), serial in name(), manufacturer in name(), model in name()) -> TokenInfo {
        TokenInfo { label, serial, manufacturer, model }
    }
}

prop_compose! {
    fn open()(
        module in name(),
        token in name(),
        sessions in any::<u16>(),
        pin in option::of(vec(any::<u8>(), 0..=MAX_PIN_LEN)),
        pin_generation in any::<u32>(),
        latched in vec((name(), any::<u32>()), 0..=64),
    ) -> Open {
        let latched = latched
            .into_iter()
            .map(|(serial, generation)| LatchNote { serial, generation })
            .collect();
        Open { module, token, sessions, pin: pin.map(Secret::new), pin_generation, latched }
    }
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        open().prop_map(Request::Open),
        Just(()).prop_map(|()| Request::Describe),
        (key(), wrap(), bytes(MAX_AAD_LEN), secret(MAX_PLAINTEXT_LEN)).prop_map(
            |(key, wrap, aad, plaintext)| Request::Seal {
                key,
                wrap,
                aad,
                plaintext
            }
        ),
        (
            key(),
            wrap(),
            bytes(MAX_AAD_LEN),
            bytes(MAX_LEN),
            any::<u32>()
        )
            .prop_map(|(key, wrap, aad, sealed, plaintext_len)| {
                Request::Unseal {
                    key,
                    wrap,
                    aad,
                    sealed,
                    plaintext_len,
                }
            }),
        (key(), wrap()).prop_map(|(key, wrap)| Request::Probe { key, wrap }),
    ]
}

prop_compose! {
    fn info()(
        key in key(),
        bits in any::<u16>(),
        flags in any::<[bool; 4]>(),
        wrap in prop_oneof![wrap().prop_map(Ok), name().prop_map(Err)],
        better in vec((wrap(), "[a-zé ]{0,60}"), 0..=MAX_PASSED_OVER),
    ) -> KeyInfo {
        let [sensitive, extractable, never_extractable, private] = flags;
        let class = if private { KeyClass::Private } else { KeyClass::Secret };
        let passed_over = better.into_iter().map(|(wrap, reason)| PassedOver { wrap, reason }).collect();
        KeyInfo { key, class, bits, sensitive, extractable, never_extractable, wrap, passed_over }
    }
}

prop_compose! {
    fn description()(token in token(), keys in vec(info(), 0..6), omitted in any::<u16>()) -> Description {
        Description { token, keys, omitted }
    }
}

prop_compose! {
    fn fault()(
        kind in (1..=19u8).prop_filter_map("a kind", FaultKind::from_u8),
        ckr in any::<u64>(),
        function in name(),
        detail in name(),
        serial in name(),
    ) -> Fault {
        Fault { kind, ckr, function, detail, serial }
    }
}

prop_compose! {
    fn response()(
        id in any::<u64>(),
        steps in any::<[bool; 3]>(),
        outcome in prop_oneof![
            token().prop_map(|token| Ok(Answer::Opened(token))),
            description().prop_map(|description| Ok(Answer::Described(description))),
            bytes(MAX_LEN).prop_map(|sealed| Ok(Answer::Sealed(sealed))),
            secret(MAX_PLAINTEXT_LEN).prop_map(|plaintext| Ok(Answer::Unsealed(plaintext))),
            Just(()).prop_map(|()| Ok(Answer::Probed)),
            fault().prop_map(Err),
        ],
    ) -> Response {
        let [retried, relogin, reinit] = steps;
        Response { id, recovery: Recovery { retried, relogin, reinit }, outcome }
    }
}

/// Bytes with a head that is right, so that the bodies are reached.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    (0..=6u8, any::<bool>(), vec(any::<u8>(), 0..200)).prop_map(|(kind, response, body)| {
        let mut packet = vec![1, kind | u8::from(response) << 7, 0, 0];
        packet.extend(1u64.to_be_bytes());
        packet.extend(body);
        packet
    })
}

proptest! {
    #[test]
    fn a_request_is_received_as_it_was_sent(id in any::<u64>(), request in request()) {
        let bytes = request.encode(id);
        prop_assert!(bytes.len() <= MAX_MESSAGE_LEN);
        prop_assert_eq!(Request::decode(&bytes), Ok((id, request)));
    }

    #[test]
    fn a_response_is_received_as_it_was_sent(response in response()) {
        let bytes = response.encode();
        prop_assert!(bytes.len() <= MAX_MESSAGE_LEN);
        prop_assert_eq!(Response::decode(&bytes), Ok(response));
    }

    #[test]
    fn what_decodes_at_all_is_the_one_encoding_of_its_meaning(packet in packet()) {
        if let Ok((id, request)) = Request::decode(&packet) {
            prop_assert_eq!(&request.encode(id)[..], &packet[..]);
        }
        if let Ok(response) = Response::decode(&packet) {
            prop_assert_eq!(&response.encode()[..], &packet[..]);
        }
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(packet in vec(any::<u8>(), 0..300)) {
        let _ = Request::decode(&packet);
        let _ = Response::decode(&packet);
    }

    #[test]
    fn one_changed_byte_is_an_error_or_another_meaning(
        (id, request) in (any::<u64>(), request()),
        at in any::<proptest::sample::Index>(),
        bit in 0..8u32,
    ) {
        let mut bytes = request.encode(id).to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert_ne!(Request::decode(&bytes), Ok((id, request)));
    }
}
