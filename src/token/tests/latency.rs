//! What the hop through the host costs: one Unseal over the socketpair beside the same two calls in
//! this process. A measurement, not a check: run it with
//! `cargo test --release -p hsm-token --test latency -- --ignored --nocapture`.

mod support;

use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, ObjectClass};
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;
use support::{Host, PATIENCE, PIN, SOFTHSM, SoftHsm, Start, open, unseal};

const ROUNDS: usize = 20_000;

#[test]
#[ignore = "a measurement, run by hand in release mode"]
fn unseal_through_the_socketpair_beside_raw_calls() {
    let token = SoftHsm::new();
    for isolated in [false, true] {
        for sessions in [1, 4] {
            let start = if isolated {
                Start::for_token(&token)
            } else {
                Start::plain(token.env())
            };
            let mut request = open();
            request.sessions = sessions;
            let mut host = Host::open(&start, request);
            let key = host.key();
            let aad = [7; 60];
            let sealed = host.seal(&key, &aad, &[9; 32]).expect("seal");
            let packet = unseal(&key, &aad, &sealed, 32);
            let times = (0..ROUNDS)
                .map(|_| {
                    let packet = packet.encode(1);
                    let start = Instant::now();
                    host.send_raw(&packet);
                    host.receive(PATIENCE).expect("response");
                    start.elapsed()
                })
                .collect();
            report(
                &format!("host, isolated {isolated}, {sessions} sessions"),
                times,
            );
        }
    }
    // SAFETY: no other thread of this process reads the environment now.
    unsafe { std::env::set_var("SOFTHSM2_CONF", token.conf()) };
    let module = Pkcs11::new(SOFTHSM).expect("module");
    module
        .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
        .expect("initialize");
    let slot = module.get_slots_with_initialized_token().expect("slots")[0];
    let session = module.open_ro_session(slot).expect("session");
    session
        .login(UserType::User, Some(&AuthPin::new(PIN.into())))
        .expect("login");
    let key = session
        .find_objects(&[Attribute::Class(ObjectClass::SECRET_KEY)])
        .expect("find")[0];
    let mut iv = [3; 12];
    let params = GcmParams::new(&mut iv, &[7; 60], 128.into()).expect("parameters");
    let mechanism = Mechanism::AesGcm(params);
    let sealed = session.encrypt(&mechanism, key, &[9; 32]).expect("encrypt");
    let times = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            session.decrypt(&mechanism, key, &sealed).expect("decrypt");
            start.elapsed()
        })
        .collect();
    report("raw, in process", times);
}

#[test]
#[ignore = "a measurement, run by hand in release mode"]
fn from_exec_to_an_open_token() {
    let token = SoftHsm::new();
    for (name, start) in [
        ("plain", Start::plain(token.env())),
        ("isolated", Start::for_token(&token)),
    ] {
        let times = (0..100)
            .map(|_| {
                let start_time = Instant::now();
                let _host = Host::open(&start, open());
                start_time.elapsed()
            })
            .collect();
        report(&format!("exec to Opened, {name}"), times);
    }
}

fn report(name: &str, mut times: Vec<Duration>) {
    times.sort();
    println!(
        "{name}: p50 {:.1} us, p99 {:.1} us",
        times[times.len() / 2].as_nanos() as f64 / 1000.0,
        times[times.len() * 99 / 100].as_nanos() as f64 / 1000.0
    );
}
