//! A module that misbehaves: what it does stays in the host, and the daemon learns of it.

mod support;

use std::thread;
use std::time::Duration;

use hsm_wire::fault::FaultKind;
use hsm_wire::host::{Open, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::hostile::Hostile;
use support::{Host, PATIENCE, seal, unseal};

#[test]
fn a_hanging_call_keeps_one_thread_and_no_other_waiting() {
    let hostile = Hostile::new();
    let mut host = hostile.host();
    let key = host.key();
    let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
    hostile.rules("C_Encrypt hang 0 1\n");
    let stuck = host.send(&seal(&key, b"header", &[8; 32]));
    thread::sleep(Duration::from_millis(100));
    for _ in 0..100 {
        let response = host.ask(&unseal(&key, b"header", &sealed, 32));
        assert_ne!(response.id, stuck);
        assert!(response.outcome.is_ok());
    }
    assert!(host.is_silent_for(Duration::from_millis(100)));
}

#[test]
fn a_host_with_every_thread_stuck_ends_with_the_daemon() {
    let hostile = Hostile::new();
    let mut host = hostile.host();
    let key = host.key();
    hostile.rules("C_Encrypt hang\nC_Finalize hang\n");
    for _ in 0..4 {
        host.send(&seal(&key, b"header", &[8; 32]));
    }
    assert!(host.is_silent_for(Duration::from_millis(200)));
    host.hang_up();
    host.wait(Duration::from_secs(3));
}

#[test]
fn killing_the_process_the_daemon_knows_ends_the_one_with_the_module() {
    let hostile = Hostile::new();
    let mut host = hostile.host();
    let key = host.key();
    hostile.rules("C_Encrypt hang\n");
    host.send(&seal(&key, b"header", &[8; 32]));
    thread::sleep(Duration::from_millis(100));
    let outer = Pid::from_raw(host.child.id().try_into().expect("pid"));
    kill(outer, Signal::SIGKILL).expect("kill");
    // The inner process holds the other end: it is gone when this reads the end.
    assert!(host.receive(Duration::from_secs(2)).is_none());
}

#[test]
fn the_end_of_the_module_is_the_end_of_the_host_and_shows_in_its_status() {
    for (rule, expected) in [
        ("C_Encrypt exit 7", Some(7)),
        ("C_Encrypt exit 0", Some(0)),
        ("C_Encrypt crash", Some(128 + 11)),
        // Pid 1 of a namespace ignores the signal that abort sends; the C library then traps.
        ("C_Encrypt abort", None),
    ] {
        let hostile = Hostile::new();
        let mut host = hostile.host();
        let key = host.key();
        hostile.rules(rule);
        host.send(&seal(&key, b"header", &[8; 32]));
        assert!(host.receive(PATIENCE).is_none(), "{rule}");
        let status = host.wait(PATIENCE);
        match expected {
            Some(code) => assert_eq!(status.code(), Some(code), "{rule}"),
            None => assert!(!status.success(), "{rule}: {status}"),
        }
    }
}

#[test]
fn a_module_that_exits_or_hangs_while_it_is_loaded_gives_no_answer() {
    let hostile = Hostile::new();
    hostile.rules("load exit 3\n");
    let mut host = Host::start(&hostile.start());
    host.send(&Request::Open(hostile.open_request()));
    assert!(host.receive(PATIENCE).is_none());
    assert_eq!(host.wait(PATIENCE).code(), Some(3));

    hostile.rules("load hang\n");
    let mut host = Host::start(&hostile.start());
    host.send(&Request::Open(hostile.open_request()));
    assert!(host.is_silent_for(Duration::from_millis(300)));
    host.hang_up();
    assert_eq!(host.wait(Duration::from_secs(2)).code(), Some(0));
}

#[test]
fn a_child_that_the_module_leaves_behind_dies_with_the_host() {
    let hostile = Hostile::new();
    hostile.rules("load fork\n");
    let mut host = hostile.host();
    host.describe();
    let outer = Pid::from_raw(host.child.id().try_into().expect("pid"));
    kill(outer, Signal::SIGKILL).expect("kill");
    // The child has a copy of the socket: the end is read only when it is gone as well.
    assert!(host.receive(Duration::from_secs(2)).is_none());
}

#[test]
fn what_the_module_prints_goes_to_the_daemons_pipe_and_nowhere_else() {
    let hostile = Hostile::new();
    let mut host = hostile.host();
    let key = host.key();
    hostile.rules("C_Encrypt print\n");
    host.seal(&key, b"header", &[7; 32]).expect("seal");
    let deadline = std::time::Instant::now() + PATIENCE;
    while !host
        .output()
        .contains("out: the module says hello from C_Encrypt")
    {
        assert!(std::time::Instant::now() < deadline, "{}", host.output());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn lengths_that_cannot_be_are_not_believed() {
    for (rule, request) in [
        ("C_Encrypt lie 0xffffffffffffffff", "seal"),
        ("C_Encrypt lie 1000000", "seal"),
        ("C_Encrypt lie 47", "seal"),
        ("C_Encrypt lie 0", "seal"),
        ("C_Decrypt lie 0xffffffffffffffff", "unseal"),
        ("C_Decrypt lie 4096", "unseal"),
        ("C_Decrypt lie 31", "unseal"),
        ("C_Decrypt lie 0", "unseal"),
        ("C_FindObjects lie 65", "describe"),
        ("C_FindObjects lie 0x7fffffffffffffff", "describe"),
        ("C_GetAttributeValue lie 0x10000", "describe"),
        ("C_Sign lie 0x10000", "describe"),
        ("C_Sign lie 15", "describe"),
    ] {
        let hostile = Hostile::new();
        let mut host = hostile.host();
        let key = host.key();
        let sealed = host.seal(&key, b"header", &[7; 32]).expect("seal");
        hostile.rules(rule);
        let response = host.ask(&match request {
            "seal" => seal(&key, b"header", &[7; 32]),
            "unseal" => unseal(&key, b"header", &sealed, 32),
            _ => Request::Describe,
        });
        let fault = response.outcome.expect_err(rule);
        assert_eq!(fault.kind, FaultKind::Device, "{rule}: {fault}");
        assert!(fault.detail.contains("broke PKCS#11"), "{rule}: {fault}");
        assert!(!response.recovery.retried, "{rule}");
    }
}

#[test]
fn a_slot_list_that_cannot_be_is_not_believed() {
    for rule in [
        "C_GetSlotList lie 0xffffffffffffffff",
        "C_GetSlotList lie 100000",
    ] {
        let hostile = Hostile::new();
        hostile.rules(rule);
        let mut host = Host::start(&hostile.start());
        let fault = host
            .ask(&Request::Open(hostile.open_request()))
            .outcome
            .expect_err(rule);
        assert_eq!(fault.kind, FaultKind::TokenNotFound, "{fault}");
        assert!(fault.detail.contains("broke PKCS#11"), "{fault}");
    }
}

#[test]
fn random_bytes_that_repeat_are_not_sealed_with() {
    let hostile = Hostile::new();
    let mut host = hostile.host_with_one_session();
    let key = host.key();
    hostile.rules("C_GenerateRandom same\n");
    host.seal(&key, b"header", &[7; 32]).expect("the first");
    let fault = host
        .seal(&key, b"header", &[7; 32])
        .expect_err("the same IV");
    assert_eq!(fault.kind, FaultKind::Device);
    assert_eq!(fault.function, "C_GenerateRandom");
}

#[test]
fn a_token_that_chooses_its_own_iv_is_found_out_and_refused() {
    for rule in ["C_EncryptInit own-iv", "C_Encrypt append-iv"] {
        let hostile = Hostile::new();
        hostile.rules(rule);
        let mut host = hostile.host();
        let description = host.describe();
        let reason = description.keys[0].wrap.clone().expect_err(rule);
        assert!(reason.contains("chooses its own"), "{rule}: {reason}");
        let key = description.keys[0].key.clone();
        let fault = host.seal(&key, b"header", &[7; 32]).expect_err(rule);
        assert_eq!(fault.kind, FaultKind::Refused, "{rule}");
    }
}

#[test]
fn a_module_that_cannot_lock_is_called_by_one_thread() {
    let hostile = Hostile::new();
    hostile.rules("C_Initialize fail 0x0a 1\n");
    let mut host = Host::start(&hostile.start());
    let open = Open {
        sessions: 8,
        ..hostile.open_request()
    };
    host.ask(&Request::Open(open)).outcome.expect("open");
    let key = host.key();
    for _ in 0..20 {
        host.send(&seal(&key, b"header", &[7; 32]));
    }
    for _ in 0..20 {
        assert!(host.receive(PATIENCE).expect("response").outcome.is_ok());
    }
    // The keeper's, and one session thread's.
    assert_eq!(hostile.calls("C_OpenSession"), 2);
}
