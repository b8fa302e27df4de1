//! Open, Describe, Seal, Unseal and Probe on a SoftHSM token, as the daemon asks for them.

mod support;

use std::collections::HashSet;
use std::time::Duration;

use hsm_wire::envelope::{IvMode, Mechanism, Wrap};
use hsm_wire::fault::FaultKind;
use hsm_wire::host::{Answer, KeyRef, MAX_MESSAGE_LEN, Open, Recovery, Request};
use hsm_wire::identity::{FINGERPRINT_BLOCK, Fingerprint, FingerprintMethod};
use hsm_wire::secret::Secret;
use support::{Host, KEY_LABEL, LABEL, PATIENCE, SOFTHSM, SoftHsm, Start, open, seal, unseal};

fn host(token: &SoftHsm) -> Host {
    Host::open(&Start::for_token(token), open())
}

/// The fault that Open ends in; the host is gone after it.
fn refused(token: &SoftHsm, open: Open) -> hsm_wire::fault::Fault {
    let mut host = Host::start(&Start::for_token(token));
    let fault = host
        .ask(&Request::Open(open))
        .outcome
        .expect_err("Open must fail");
    assert!(host.receive(PATIENCE).is_none());
    assert_eq!(host.wait(PATIENCE).code(), Some(1));
    fault
}

#[test]
fn a_sealed_seed_opens_again_and_every_length_does() {
    let token = SoftHsm::new();
    let mut host = host(&token);
    let key = host.key();
    for len in [1, 15, 16, 17, 31, 32, 33, 48, 64, 100, 511, 512] {
        let plaintext: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let sealed = host.seal(&key, b"header", &plaintext).expect("seal");
        assert_eq!(sealed.len(), 12 + len + 16);
        let back = host.unseal(&key, b"header", &sealed, len).expect("unseal");
        assert_eq!(back, plaintext);
    }
    host.probe(&key).expect("probe");
}

#[test]
fn the_token_describes_its_keys_and_how_they_wrap() {
    let token = SoftHsm::new();
    token.add_key("another", "0203");
    token.run(
        "pkcs11-tool",
        &[
            "--module",
            SOFTHSM,
            "--token-label",
            LABEL,
            "--login",
            "--pin",
            support::PIN,
            "--keygen",
            "--key-type",
            "GENERIC:32",
            "--label",
            "no-aes",
        ],
    );
    token.give_away();
    let mut host = host(&token);
    let description = host.describe();
    assert_eq!(description.token.label, LABEL);
    assert_eq!(description.token.serial, token.serial());
    assert_eq!(description.omitted, 1, "the generic secret");
    let [another, kek] = &description.keys[..] else {
        panic!("{description:?}");
    };
    assert_eq!(another.key.label, "another");
    assert_eq!(another.key.id, [2, 3]);
    assert_eq!(kek.key.label, KEY_LABEL);
    assert_eq!(kek.key.id, [1]);
    assert_ne!(kek.key.fingerprint, another.key.fingerprint);
    for key in [another, kek] {
        assert_eq!(key.bits, 256);
        assert!(key.sensitive && !key.extractable && key.never_extractable);
        assert_eq!(key.wrap, Ok(Wrap::AES_GCM));
    }
    assert_eq!(host.describe(), description, "and again the same");
}

#[test]
fn the_fingerprint_is_that_of_the_keys_cmac() {
    use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
    use cryptoki::object::{Attribute, ObjectClass};

    let token = SoftHsm::new();
    let found = host(&token).key().fingerprint;
    // SAFETY: no other test of this program reads the environment of this process: hosts get theirs
    // explicitly, and SoftHSM is loaded here only.
    unsafe { std::env::set_var("SOFTHSM2_CONF", token.conf()) };
    let module = Pkcs11::new(SOFTHSM).expect("module");
    module
        .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
        .expect("initialize");
    let slot = module.get_slots_with_initialized_token().expect("slots")[0];
    let session = module.open_ro_session(slot).expect("session");
    session
        .login(
            cryptoki::session::UserType::User,
            Some(&cryptoki::types::AuthPin::new(support::PIN.into())),
        )
        .expect("login");
    let key = session
        .find_objects(&[Attribute::Class(ObjectClass::SECRET_KEY)])
        .expect("find")[0];
    // CMAC of one block (SP 800-38B) is AES of the block xor the first subkey, which is AES of zero
    // doubled: so ECB alone gives it, by a way that is not the host's.
    let ecb = |block: &[u8]| {
        session
            .encrypt(&cryptoki::mechanism::Mechanism::AesEcb, key, block)
            .expect("encrypt")
    };
    let zero = u128::from_be_bytes(ecb(&[0; 16]).try_into().expect("block"));
    let subkey = (zero << 1) ^ if zero >> 127 == 1 { 0x87 } else { 0 };
    let block = u128::from_be_bytes(FINGERPRINT_BLOCK) ^ subkey;
    let image = ecb(&block.to_be_bytes()).try_into().expect("block");
    assert_eq!(
        found,
        Fingerprint::of_block_image(FingerprintMethod::Cmac, &image)
    );
}

#[test]
fn every_change_of_what_was_sealed_is_tampered_and_costs_no_recovery() {
    let token = SoftHsm::new();
    token.add_key("another", "02");
    let mut host = host(&token);
    let keys = host.describe().keys;
    let (another, key) = (&keys[0].key, &keys[1].key);
    let sealed = host.seal(key, b"header", &[7; 32]).expect("seal");
    let flip = |at: usize| {
        let mut changed = sealed.clone();
        changed[at] ^= 0x80;
        changed
    };
    let attempts = [
        ("IV", unseal(key, b"header", &flip(0), 32)),
        ("ciphertext", unseal(key, b"header", &flip(12), 32)),
        ("tag", unseal(key, b"header", &flip(59), 32)),
        ("AAD", unseal(key, b"Header", &sealed, 32)),
        ("key", unseal(another, b"header", &sealed, 32)),
        ("cut", unseal(key, b"header", &sealed[..59], 32)),
        ("cut and length", unseal(key, b"header", &sealed[..59], 31)),
        ("empty", unseal(key, b"header", &[], 0)),
        ("length", unseal(key, b"header", &sealed, 33)),
        (
            "huge length",
            unseal(key, b"header", &sealed, u32::MAX as usize),
        ),
    ];
    for (what, request) in attempts {
        let response = host.ask(&request);
        let fault = response.outcome.expect_err(what);
        assert_eq!(fault.kind, FaultKind::Tampered, "{what}: {fault}");
        assert_eq!(response.recovery, Recovery::default(), "{what}");
    }
    assert_eq!(host.unseal(key, b"header", &sealed, 32), Ok(vec![7; 32]));
}

#[test]
fn no_iv_is_used_twice() {
    let token = SoftHsm::new();
    let mut host = host(&token);
    let key = host.key();
    let ivs: HashSet<Vec<u8>> = (0..500)
        .map(|_| host.seal(&key, b"", &[0; 32]).expect("seal")[..12].to_vec())
        .collect();
    assert_eq!(ivs.len(), 500);
}

#[test]
fn a_key_is_found_by_its_names_and_known_by_its_fingerprint() {
    let token = SoftHsm::new();
    let mut host = host(&token);
    let key = host.key();
    let kind = |host: &mut Host, key: KeyRef| host.probe(&key).expect_err("no such key").kind;
    let unknown = KeyRef {
        label: "unknown".to_owned(),
        ..key.clone()
    };
    assert_eq!(kind(&mut host, unknown), FaultKind::KeyNotFound);
    let longer = KeyRef {
        id: vec![1, 0],
        ..key.clone()
    };
    assert_eq!(kind(&mut host, longer), FaultKind::KeyNotFound);
    let nameless = KeyRef {
        label: String::new(),
        id: Vec::new(),
        ..key.clone()
    };
    assert_eq!(kind(&mut host, nameless), FaultKind::KeyNotFound);
    let other = KeyRef {
        fingerprint: Fingerprint([9; 32]),
        ..key.clone()
    };
    assert_eq!(kind(&mut host, other), FaultKind::KeyChanged);
    token.add_key(KEY_LABEL, "01");
    drop(host);
    let mut host = self::host(&token);
    assert_eq!(kind(&mut host, key), FaultKind::KeyAmbiguous);
}

#[test]
fn wraps_that_nothing_writes_are_refused_by_name() {
    let token = SoftHsm::new();
    let mut host = host(&token);
    let key = host.key();
    for (wrap, name) in [
        (
            Wrap {
                mechanism: Mechanism::AesGcm,
                iv_mode: IvMode::None,
            },
            "AesGcm with IV mode None",
        ),
        (
            Wrap {
                mechanism: Mechanism::AesKwp,
                iv_mode: IvMode::Appended,
            },
            "AesKwp with IV mode Appended",
        ),
    ] {
        let request = Request::Seal {
            key: key.clone(),
            wrap,
            aad: Vec::new(),
            plaintext: Secret::copy_of(&[1; 32]),
        };
        let fault = host.ask(&request).outcome.expect_err("refused");
        assert_eq!(fault.kind, FaultKind::Refused);
        assert!(fault.detail.contains(name), "{fault}");
    }
}

#[test]
fn nothing_is_not_sealed() {
    let token = SoftHsm::new();
    let mut host = host(&token);
    let key = host.key();
    let fault = host.seal(&key, b"header", &[]).expect_err("empty");
    assert_eq!(fault.kind, FaultKind::BadRequest);
}

#[test]
fn many_requests_in_flight_are_each_answered_once() {
    let token = SoftHsm::new();
    let mut host = host(&token);
    let key = host.key();
    let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
    let mut waiting: HashSet<u64> = (0..200)
        .map(|n| match n % 3 {
            0 => host.send(&unseal(&key, b"header", &sealed, 32)),
            1 => host.send(&seal(&key, b"header", &[8; 32])),
            _ => host.send(&Request::Describe),
        })
        .collect();
    while !waiting.is_empty() {
        let response = host.receive(PATIENCE).expect("response");
        assert!(waiting.remove(&response.id), "{} twice", response.id);
        assert!(response.outcome.is_ok(), "{response:?}");
    }
}

#[test]
fn one_token_must_match_the_uri_and_the_fault_names_those_there_are() {
    let token = SoftHsm::new();
    let wrong = Open {
        token: "pkcs11:token=rciis-staging".to_owned(),
        ..open()
    };
    let fault = refused(&token, wrong);
    assert_eq!(fault.kind, FaultKind::TokenNotFound);
    assert!(fault.detail.contains("`rciis-production`"), "{fault}");

    token.run(
        "softhsm2-util",
        &[
            "--init-token",
            "--free",
            "--label",
            LABEL,
            "--pin",
            "1111",
            "--so-pin",
            "87654321",
        ],
    );
    token.give_away();
    let fault = refused(&token, open());
    assert_eq!(fault.kind, FaultKind::TokenAmbiguous);
    assert!(fault.detail.contains(&token.serial()), "{fault}");
}

#[test]
fn a_slot_that_cannot_be_read_is_named_when_no_other_matches() {
    let hostile = support::hostile::Hostile::new();
    hostile.rules("C_GetTokenInfo fail 0x30\n");
    let mut host = Host::start(&hostile.start());
    let fault = host
        .ask(&Request::Open(hostile.open_request()))
        .outcome
        .expect_err("unreadable");
    assert_eq!(fault.kind, FaultKind::TokenNotFound);
    assert!(fault.detail.contains("with CKR_DEVICE_ERROR"), "{fault}");
}

#[test]
fn a_uri_of_an_object_is_no_token() {
    let token = SoftHsm::new();
    let object = Open {
        token: format!("pkcs11:token={LABEL};object={KEY_LABEL}"),
        ..open()
    };
    assert_eq!(refused(&token, object).kind, FaultKind::BadRequest);
}

#[test]
fn a_module_that_is_absent_or_none_is_told_by_name() {
    let token = SoftHsm::without_key();
    for (module, said) in [
        ("/usr/lib/softhsm/absent.so", "absent.so"),
        ("/etc/passwd", "/etc/passwd"),
        ("/lib64/ld-linux-x86-64.so.2", "C_GetFunctionList"),
    ] {
        let fault = refused(&token, support::open_module(module));
        assert_eq!(fault.kind, FaultKind::ModuleLoad, "{fault}");
        assert!(fault.detail.contains(said), "{fault}");
    }
}

#[test]
fn a_token_that_wants_a_login_says_so_when_there_is_no_pin() {
    let token = SoftHsm::new();
    let without = Open {
        pin: None,
        ..open()
    };
    let fault = refused(&token, without);
    assert_eq!(fault.kind, FaultKind::PinMissing);
    assert_eq!(fault.serial, token.serial());
}

#[test]
fn the_token_is_opened_first_and_once() {
    let token = SoftHsm::new();
    let mut host = Host::start(&Start::for_token(&token));
    let fault = host.ask(&Request::Describe).outcome.expect_err("not open");
    assert_eq!(fault.kind, FaultKind::BadRequest);
    assert_eq!(host.wait(PATIENCE).code(), Some(1));

    let mut host = self::host(&token);
    let fault = host
        .ask(&Request::Open(open()))
        .outcome
        .expect_err("open already");
    assert_eq!(fault.kind, FaultKind::BadRequest);
    host.describe();
}

#[test]
fn a_daemon_that_speaks_otherwise_is_left() {
    let token = SoftHsm::new();
    let long = vec![1; MAX_MESSAGE_LEN + 1];
    for packet in [&b"GET / HTTP/1.1"[..], &long] {
        let mut host = host(&token);
        host.send_raw(packet);
        assert!(host.receive(PATIENCE).is_none());
        assert_eq!(host.wait(PATIENCE).code(), Some(1));
    }
}

#[test]
fn the_host_ends_when_the_daemon_hangs_up() {
    let token = SoftHsm::new();
    for start in [Start::for_token(&token), Start::plain(token.env())] {
        let mut host = Host::open(&start, open());
        host.hang_up();
        assert_eq!(host.wait(Duration::from_secs(2)).code(), Some(0));
    }
}

#[test]
fn started_by_hand_it_says_who_starts_it() {
    let run = |args: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_hsm-token"))
            .args(args)
            .output()
            .expect("run");
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), text)
    };
    let (code, text) = run(&["--version"]);
    assert_eq!(code, Some(0));
    assert_eq!(text, format!("hsm-token {}\n", env!("CARGO_PKG_VERSION")));
    let (code, text) = run(&[]);
    assert_eq!(code, Some(2));
    assert!(
        text.starts_with("error: `--session-socket` is missing\n"),
        "{text}"
    );
    let (code, text) = run(&["--session-socket", "3", "--no-isolation"]);
    assert_eq!(code, Some(2));
    assert!(
        text.contains("hint: hsm-token is not started by hand"),
        "{text}"
    );
}

#[test]
fn the_answer_to_open_names_the_token() {
    let token = SoftHsm::new();
    let mut host = Host::start(&Start::for_token(&token));
    match host.ask(&Request::Open(open())).outcome {
        Ok(Answer::Opened(info)) => {
            assert_eq!(info.label, LABEL);
            assert_eq!(info.serial, token.serial());
            assert_eq!(info.manufacturer, "SoftHSM project");
            assert_eq!(info.model, "SoftHSM v2");
        }
        other => panic!("{other:?}"),
    }
}
