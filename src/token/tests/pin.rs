//! The PIN latch: one wrong try, from one place, and never again by itself.

mod support;

use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{LatchNote, Open, Request};
use hsm_wire::secret::Secret;
use support::hostile::Hostile;
use support::{Host, PATIENCE, note};

/// `CKF_USER_PIN_COUNT_LOW`, `_FINAL_TRY`, `_LOCKED`.
const FLAGS: [(&str, FaultKind); 3] = [
    ("0x10000", FaultKind::PinCountLow),
    ("0x20000", FaultKind::PinFinalTry),
    ("0x40000", FaultKind::PinLocked),
];

fn fault(hostile: &Hostile, pin: &str, generation: u32, latched: Vec<LatchNote>) -> Fault {
    let mut host = Host::start(&hostile.start());
    let open = Open {
        pin: Some(Secret::copy_of(pin.as_bytes())),
        pin_generation: generation,
        latched,
        ..hostile.open_request()
    };
    let fault = host
        .ask(&Request::Open(open))
        .outcome
        .expect_err("no login");
    host.wait(PATIENCE);
    fault
}

#[test]
fn a_wrong_pin_reaches_the_token_once_and_names_the_serial_to_note() {
    let hostile = Hostile::new();
    let serial = hostile.token.serial();
    let fault = fault(&hostile, "000000", 3, Vec::new());
    assert_eq!(fault.kind, FaultKind::PinIncorrect);
    assert_eq!(fault.serial, serial);
    assert_eq!(fault.function, "C_Login");
    assert!(!fault.to_string().contains("000000"), "{fault}");
    assert_eq!(hostile.calls("C_Login"), 1);
}

#[test]
fn a_noted_generation_is_not_tried_and_a_raised_one_is() {
    let hostile = Hostile::new();
    let serial = hostile.token.serial();
    assert_eq!(
        fault(&hostile, "000000", 1, Vec::new()).kind,
        FaultKind::PinIncorrect
    );
    for generation in [0, 1] {
        let latched = fault(&hostile, support::PIN, generation, vec![note(&serial, 1)]);
        assert_eq!(latched.kind, FaultKind::PinLatched);
        assert_eq!(latched.serial, serial);
    }
    assert_eq!(hostile.calls("C_Login"), 1, "only the first");
    // SoftHSM now sets CKF_USER_PIN_COUNT_LOW. Another node, which has noted nothing, keeps away.
    let other_node = fault(&hostile, support::PIN, 1, Vec::new());
    assert_eq!(other_node.kind, FaultKind::PinCountLow);
    assert_eq!(hostile.calls("C_Login"), 1, "still");
    let mut host = Host::open(
        &hostile.start(),
        Open {
            pin_generation: 2,
            latched: vec![note(&serial, 1)],
            ..hostile.open_request()
        },
    );
    let key = host.key();
    host.probe(&key).expect("logged in");
    assert_eq!(hostile.calls("C_Login"), 2);
}

#[test]
fn a_token_that_warns_of_its_pin_is_not_logged_in_to() {
    let hostile = Hostile::new();
    for (flag, kind) in FLAGS {
        hostile.rules(&format!("C_GetTokenInfo flags {flag}\n"));
        assert_eq!(fault(&hostile, support::PIN, 1, Vec::new()).kind, kind);
    }
    assert_eq!(hostile.calls("C_Login"), 0);
}

#[test]
fn a_pin_refused_at_the_second_login_latches_this_process_as_well() {
    let hostile = Hostile::new();
    let mut host = hostile.host_with_one_session();
    let key = host.key();
    // The token forgets the login, and the PIN has been changed meanwhile.
    hostile.rules("C_GenerateRandom fail 0x101\nC_Login fail 0xa0\n");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let kinds: Vec<FaultKind> = (0..5)
        .map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(300));
            host.probe(&key).expect_err("no login").kind
        })
        .collect();
    assert_eq!(kinds[0], FaultKind::PinIncorrect);
    assert!(
        kinds[1..]
            .iter()
            .all(|kind| kind.is_latched() || *kind == FaultKind::Device),
        "{kinds:?}"
    );
    assert_eq!(hostile.calls("C_Login"), 2, "at Open, and once more");
}

#[test]
fn a_login_that_fails_for_another_reason_is_no_pin_fault() {
    let hostile = Hostile::new();
    hostile.rules("C_Login fail 0x30\n");
    let fault = fault(&hostile, support::PIN, 1, Vec::new());
    assert_eq!(fault.kind, FaultKind::Login);
    assert!(!fault.kind.is_latched());
}

#[test]
fn being_logged_in_already_is_no_error() {
    let hostile = Hostile::new();
    hostile.rules("C_Login refuse 0x100\n");
    let mut host = hostile.host();
    let key = host.key();
    host.probe(&key).expect("logged in");
}
