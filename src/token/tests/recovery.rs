//! The recovery ladder inside the host: which failure climbs how far, and what the daemon is told.

mod support;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{Answer, KeyRef, Recovery, Request, Response};
use support::hostile::Hostile;
use support::{Host, PATIENCE, SoftHsm, Start, open, unseal};

const NEW_SESSION: Recovery = Recovery {
    retried: true,
    relogin: false,
    reinit: false,
};
/// A second passes between two re-initialisations, the one of Open included.
const REST: Duration = Duration::from_millis(1100);

/// A host with one session thread, its key, and something sealed.
struct Fixture {
    hostile: Hostile,
    host: Host,
    key: KeyRef,
    sealed: Vec<u8>,
}

impl Fixture {
    fn new() -> Self {
        let hostile = Hostile::new();
        let mut host = hostile.host_with_one_session();
        let key = host.key();
        let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
        Self {
            hostile,
            host,
            key,
            sealed,
        }
    }

    fn unseal(&mut self) -> Response {
        let request = unseal(&self.key, b"header", &self.sealed, 32);
        self.host.ask(&request)
    }

    /// Unseals under `rules`, which must work, and returns the steps that it took.
    fn recovers(&mut self, rules: &str) -> Recovery {
        self.hostile.rules(rules);
        let response = self.unseal();
        match response.outcome {
            Ok(Answer::Unsealed(plaintext)) => assert_eq!(plaintext.expose(), [7; 32]),
            other => panic!("{other:?} under {rules}\n{}", self.host.output()),
        }
        response.recovery
    }

    fn fails(&mut self, rules: &str) -> (Fault, Recovery) {
        self.hostile.rules(rules);
        let response = self.unseal();
        (response.outcome.expect_err("fails"), response.recovery)
    }
}

#[test]
fn a_dead_session_is_replaced() {
    let mut fixture = Fixture::new();
    for code in ["0xb3", "0xb0", "0x90", "0x30", "0x80001234"] {
        let steps = fixture.recovers(&format!("C_DecryptInit fail {code} 1\n"));
        assert_eq!(steps, NEW_SESSION, "{code}");
    }
    assert_eq!(fixture.hostile.calls("C_Login"), 1);
    assert_eq!(fixture.hostile.calls("C_Finalize"), 0);
}

#[test]
fn a_void_handle_is_searched_again_on_the_same_session() {
    let mut fixture = Fixture::new();
    let before = fixture.hostile.calls("C_FindObjectsInit");
    let steps = fixture.recovers("C_DecryptInit fail 0x60 1\n");
    assert_eq!(steps, Recovery::default());
    assert_eq!(fixture.hostile.calls("C_FindObjectsInit"), before + 1);
    assert_eq!(fixture.hostile.calls("C_CloseSession"), 0);
}

#[test]
fn a_lost_login_is_renewed_once() {
    let mut fixture = Fixture::new();
    thread::sleep(REST);
    let steps = fixture.recovers("C_DecryptInit fail 0x101 1\nC_Login refuse 0x100 1\n");
    assert!(steps.retried && steps.relogin && !steps.reinit, "{steps:?}");
    assert_eq!(fixture.hostile.calls("C_Login"), 2);
}

#[test]
fn a_login_that_fails_without_fault_of_the_pin_takes_a_new_start_of_the_module() {
    let mut fixture = Fixture::new();
    thread::sleep(REST);
    let steps = fixture.recovers("C_DecryptInit fail 0x101 1\nC_Login fail 0x30 1\n");
    assert!(steps.retried && steps.reinit, "{steps:?}");
    assert_eq!(fixture.hostile.calls("C_Login"), 3);
}

#[test]
fn what_a_new_session_does_not_cure_takes_a_new_start_of_the_module() {
    let mut fixture = Fixture::new();
    thread::sleep(REST);
    let steps = fixture.recovers("C_DecryptInit fail 0x30 2\n");
    assert!(steps.retried && steps.reinit, "{steps:?}");
    assert_eq!(fixture.hostile.calls("C_Finalize"), 1);
    assert_eq!(fixture.hostile.calls("C_Login"), 2);
}

#[test]
fn a_removed_token_goes_straight_to_a_new_start_of_the_module() {
    let mut fixture = Fixture::new();
    for (n, code) in ["0x32", "0xe0", "0x190", "0x3"].iter().enumerate() {
        thread::sleep(REST);
        let steps = fixture.recovers(&format!("C_DecryptInit fail {code} 1\n"));
        assert!(steps.reinit && !steps.retried, "{code}: {steps:?}");
        assert_eq!(fixture.hostile.calls("C_Finalize"), n + 1);
    }
}

#[test]
fn the_module_is_not_started_anew_twice_within_a_second() {
    let mut fixture = Fixture::new();
    thread::sleep(REST);
    let (fault, steps) = fixture.fails("C_DecryptInit fail 0x30\n");
    assert_eq!(fault.kind, FaultKind::Device);
    assert_eq!(fault.function, "C_DecryptInit");
    assert_eq!(fault.ckr, 0x30);
    assert!(steps.retried && steps.reinit);
    let begin = Instant::now();
    for _ in 0..20 {
        let response = fixture.unseal();
        assert_eq!(
            response.outcome.expect_err("device").kind,
            FaultKind::Device
        );
    }
    assert!(
        begin.elapsed() < Duration::from_millis(900),
        "answers come at once"
    );
    assert_eq!(fixture.hostile.calls("C_Finalize"), 1);
}

#[test]
fn a_mechanism_that_is_refused_is_not_tried_again() {
    let mut fixture = Fixture::new();
    let before = fixture.hostile.calls("C_DecryptInit");
    for code in ["0x68", "0x70", "0x63"] {
        let (fault, steps) = fixture.fails(&format!("C_DecryptInit fail {code}\n"));
        assert_eq!(fault.kind, FaultKind::Refused);
        assert_eq!(steps, Recovery::default());
    }
    assert_eq!(fixture.hostile.calls("C_DecryptInit"), before + 3);
}

#[test]
fn a_failed_decryption_is_the_datas_fault_only_if_a_control_works() {
    let mut fixture = Fixture::new();
    // The first C_Decrypt fails, the control's works.
    for code in ["0x5", "0x40", "0x42", "0x6"] {
        let (fault, steps) = fixture.fails(&format!("C_Decrypt refuse {code} 1\n"));
        assert_eq!(fault.kind, FaultKind::Tampered, "{code}");
        assert_eq!(steps, Recovery::default());
    }
    // The control fails as well: it was the device, and the next session cures it.
    let steps = fixture.recovers("C_Decrypt refuse 0x5 2\n");
    assert_eq!(steps, NEW_SESSION);
}

#[test]
fn a_library_that_leaves_the_failed_decryption_active_hides_no_tampering() {
    let mut fixture = Fixture::new();
    // As if the session were still busy with it: nothing works but on another session.
    let (fault, _) = fixture.fails("C_Decrypt refuse 0x5 1\nC_EncryptInit fail 0x90 1\n");
    assert_eq!(fault.kind, FaultKind::Tampered);
}

#[test]
fn a_token_that_grants_no_session_more_serves_all_threads_in_turn() {
    let hostile = Hostile::new();
    // The first session is the keeper.
    hostile.rules("C_OpenSession print 0 1\nC_OpenSession fail 0xb1\n");
    let mut host = hostile.host();
    let key = host.key();
    let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
    for _ in 0..50 {
        host.send(&unseal(&key, b"header", &sealed, 32));
    }
    for _ in 0..50 {
        let response = host.receive(PATIENCE).expect("response");
        assert!(response.outcome.is_ok(), "{response:?}");
    }
}

#[test]
fn threads_that_fail_together_start_the_module_anew_once() {
    let hostile = Hostile::new();
    let mut host = hostile.host();
    let key = host.key();
    let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
    thread::sleep(REST);
    hostile.rules("C_DecryptInit lost 0x32\n");
    for _ in 0..40 {
        host.send(&unseal(&key, b"header", &sealed, 32));
    }
    let responses: Vec<Response> = (0..40)
        .map(|_| host.receive(PATIENCE).expect("response"))
        .collect();
    let reinit = responses.iter().filter(|r| r.recovery.reinit).count();
    assert_eq!(hostile.calls("C_Finalize"), reinit);
    assert_eq!(reinit, 1, "{}", host.output());
    let failed = responses.iter().filter(|r| r.outcome.is_err()).count();
    assert_eq!(failed, 0, "{responses:?}");
}

#[test]
fn a_thread_stuck_in_the_module_does_not_hold_up_the_others_answers() {
    let hostile = Hostile::new();
    let mut host = hostile.host();
    let key = host.key();
    let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
    thread::sleep(REST);
    hostile.rules("C_DecryptInit hang 0 1\nC_DecryptInit fail 0x32\n");
    let stuck = host.send(&unseal(&key, b"header", &sealed, 32));
    thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    let response = host.ask(&unseal(&key, b"header", &sealed, 32));
    assert_ne!(response.id, stuck);
    assert_eq!(
        response.outcome.expect_err("device").kind,
        FaultKind::Device
    );
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(hostile.calls("C_Finalize"), 0);
}

#[test]
fn a_key_that_was_there_and_is_gone_is_a_lost_token_not_an_absent_key() {
    let token = SoftHsm::new();
    let mut host = Host::open(&Start::for_token(&token), open());
    let key = host.key();
    host.probe(&key).expect("probe");
    thread::sleep(REST);
    token.run(
        "pkcs11-tool",
        &[
            "--module",
            support::SOFTHSM,
            "--token-label",
            support::LABEL,
            "--login",
            "--pin",
            support::PIN,
            "--delete-object",
            "--type",
            "secrkey",
            "--id",
            "01",
        ],
    );
    let fault = host.probe(&key).expect_err("gone");
    assert_eq!(fault.kind, FaultKind::Device, "{fault}");
    assert!(
        fault.detail.contains("has lost the key `k8s-secrets-kek`"),
        "{fault}"
    );
    drop(host);
    // A host that has never seen it knows only that it is not there.
    let mut fresh = Host::open(&Start::for_token(&token), open());
    let fault = fresh.probe(&key).expect_err("absent");
    assert_eq!(fault.kind, FaultKind::KeyNotFound, "{fault}");
}

#[test]
fn a_token_whose_folder_is_gone_is_lost_and_a_fresh_host_finds_it_again() {
    let token = SoftHsm::new();
    let mut host = Host::open(&Start::for_token(&token), open());
    let key = host.key();
    let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
    thread::sleep(REST);
    // What is in the folder, not the folder: a bind mount would hold on to that.
    let aside = token.folder.path().join("aside");
    fs::create_dir(&aside).expect("folder");
    move_all(&token.tokens(), &aside);
    let begin = Instant::now();
    let fault = loop {
        match host.ask(&unseal(&key, b"header", &sealed, 32)).outcome {
            Err(fault) => break fault,
            // SoftHSM works from memory for a while.
            Ok(_) => assert!(begin.elapsed() < PATIENCE, "it never notices"),
        }
    };
    assert_eq!(fault.kind, FaultKind::Device, "{fault}");
    let fault = host.probe(&key).expect_err("still gone");
    assert_eq!(fault.kind, FaultKind::Device, "{fault}");
    drop(host);
    let mut fresh = Host::start(&Start::for_token(&token));
    let fault = fresh
        .ask(&Request::Open(open()))
        .outcome
        .expect_err("no token");
    assert_eq!(fault.kind, FaultKind::TokenNotFound, "{fault}");
    move_all(&aside, &token.tokens());
    let mut fresh = Host::open(&Start::for_token(&token), open());
    assert_eq!(fresh.unseal(&key, b"header", &sealed, 32), Ok(vec![7; 32]));
}

#[test]
fn a_token_that_comes_back_serves_the_same_host_again() {
    let token = SoftHsm::new();
    let mut host = Host::open(&Start::for_token(&token), open());
    let key = host.key();
    let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
    let aside = token.folder.path().join("aside");
    fs::create_dir(&aside).expect("folder");
    move_all(&token.tokens(), &aside);
    thread::sleep(REST);
    host.probe(&key).expect_err("gone");
    move_all(&aside, &token.tokens());
    thread::sleep(REST);
    let response = host.ask(&unseal(&key, b"header", &sealed, 32));
    assert!(response.outcome.is_ok(), "{response:?}\n{}", host.output());
    assert!(response.recovery.reinit);
}

fn move_all(from: &std::path::Path, to: &std::path::Path) {
    for entry in fs::read_dir(from).expect("folder") {
        let entry = entry.expect("entry");
        fs::rename(entry.path(), to.join(entry.file_name())).expect("move");
    }
}
