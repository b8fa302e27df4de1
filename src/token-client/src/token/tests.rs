//! The token's behaviour over a fake: queue, deadlines, recovery, latch, on a clock that jumps.

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::Recovery;
use tokio::time::{sleep, timeout};

use super::*;
use crate::config::{Launch, PinSource};
use crate::fake::{Fake, FakeKey, SERIAL};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

fn key() -> FakeKey {
    FakeKey::new("kek", 7)
}

fn fake() -> Fake {
    Fake::new([key()])
}

struct Pin(Mutex<Result<&'static str, &'static str>>);

impl PinSource for Pin {
    fn read(&self) -> Result<Secret, String> {
        let pin = *self.0.lock().unwrap();
        pin.map(|pin| Secret::copy_of(pin.as_bytes()))
            .map_err(str::to_owned)
    }
}

fn config(state_dir: &Path, generation: u32) -> Config {
    Config {
        name: "main".into(),
        uri: "pkcs11:token=main".into(),
        module: "/fake".into(),
        sessions: 4,
        call_timeout: 2 * SECOND,
        pin: Some(Arc::new(Pin(Mutex::new(Ok("1234"))))),
        pin_generation: generation,
        state_dirs: vec![state_dir.to_owned()],
        launch: Launch::default(),
    }
}

async fn seal(token: &Token, within: Duration) -> Result<Vec<u8>, TokenError> {
    let plaintext = Secret::copy_of(&[5; 32]);
    let deadline = Instant::now() + within;
    token
        .seal(
            &key().reference(),
            Wrap::AES_GCM,
            b"aad".to_vec(),
            plaintext,
            deadline,
        )
        .await
}

async fn unseal(token: &Token, aad: &[u8], sealed: Vec<u8>) -> Result<Secret, TokenError> {
    let deadline = Instant::now() + SECOND;
    token
        .unseal(
            &key().reference(),
            Wrap::AES_GCM,
            aad.to_vec(),
            sealed,
            32,
            deadline,
        )
        .await
}

async fn wait_for(token: &Token, within: Duration, wanted: impl Fn(&State) -> bool) -> State {
    let mut state = token.state();
    let found = timeout(within, state.wait_for(|s| wanted(s))).await;
    match found {
        Ok(found) => found.unwrap().clone(),
        Err(_) => panic!(
            "after {within:?} the token is {:?}",
            *token.state().borrow()
        ),
    }
}

fn is_up(state: &State) -> bool {
    matches!(state, State::Up { .. })
}

fn is_down(state: &State) -> bool {
    matches!(state, State::Down { .. })
}

fn is_latched(state: &State) -> bool {
    matches!(state, State::Latched { .. })
}

fn reason(state: &State) -> &str {
    match state {
        State::Down { reason, .. } | State::Latched { reason, .. } => reason,
        State::Starting | State::Up { .. } => "",
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_sealed_is_unsealed_and_the_token_is_described() {
    let token = Token::start_with_fake("main", &fake());
    let sealed = seal(&token, SECOND).await.unwrap();
    assert_eq!(
        unseal(&token, b"aad", sealed.clone()).await,
        Ok(Secret::copy_of(&[5; 32]))
    );
    let error = unseal(&token, b"other", sealed).await.unwrap_err();
    let TokenError::Fault { fault, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(fault.kind, FaultKind::Tampered);
    let deadline = Instant::now() + SECOND;
    token
        .probe(&key().reference(), Wrap::AES_GCM, deadline)
        .await
        .unwrap();
    let State::Up {
        description,
        host_pid,
    } = wait_for(&token, SECOND, is_up).await
    else {
        unreachable!()
    };
    assert_eq!(description.keys, [key().info()]);
    assert_eq!(host_pid, None);
    assert_eq!(token.stats(), Stats::default());
}

#[tokio::test(start_paused = true)]
async fn operations_are_futures_that_may_change_threads() {
    fn check(_: &(impl Future + Send)) {}
    let token = Token::start_with_fake("main", &fake());
    check(&seal(&token, SECOND));
    check(&unseal(&token, b"", Vec::new()));
    check(&token.stop());
}

#[tokio::test(start_paused = true)]
async fn a_host_that_dies_is_replaced_and_what_it_had_is_done_by_the_next() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.hold();
    let die = async {
        sleep(SECOND / 10).await;
        fake.die();
        sleep(SECOND / 10).await;
        assert!(is_up(&token.state().borrow()), "it is replaced at once");
        fake.release();
    };
    let (sealed, ()) = tokio::join!(seal(&token, SECOND), die);
    sealed.unwrap();
    assert_eq!(fake.counts().seals, 2);
    assert_eq!(
        token.stats(),
        Stats {
            respawned: 1,
            crashed: 1,
            ..Stats::default()
        }
    );
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_costs_two_hosts_fails() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.hold();
    let die = async {
        for _ in 0..2 {
            sleep(SECOND / 10).await;
            fake.die();
        }
    };
    let (sealed, ()) = tokio::join!(seal(&token, SECOND), die);
    let error = sealed.unwrap_err();
    assert_eq!(
        error.to_string(),
        "token main is down: two module hosts were lost over this operation: the module host was \
         killed by SIGSEGV while it served"
    );
    assert_eq!(fake.counts().seals, 2);
}

#[tokio::test(start_paused = true)]
async fn a_crash_loop_ends_in_down_and_pauses_that_grow() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    let mut downs = 0;
    let started = Instant::now();
    while started.elapsed() < 60 * SECOND {
        wait_for(&token, 11 * SECOND, is_up).await;
        let before = token.stats().down;
        fake.die();
        wait_for(&token, SECOND, |s| !is_up(s)).await;
        sleep(SECOND / 100).await;
        if token.stats().down > before {
            downs += 1;
            let refused = Instant::now();
            let error = seal(&token, HOUR).await.unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("killed by SIGSEGV while it served"),
                "{error}"
            );
            assert_eq!(refused.elapsed(), Duration::ZERO);
        }
    }
    // Three at once, then 1, 2, 4, 8, 10, 10 … seconds apart, and after 30 s three more at once.
    assert!((6..=11).contains(&downs), "{downs}");
    assert!(
        (10..=18).contains(&fake.counts().hosts),
        "{:?}",
        fake.counts()
    );
}

#[tokio::test(start_paused = true)]
async fn a_host_that_hangs_is_killed_and_its_operations_are_done_by_the_next() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.hang(true);
    let started = Instant::now();
    let cure = async {
        sleep(SECOND).await;
        fake.hang(false);
    };
    let (a, b, ()) = tokio::join!(seal(&token, HOUR), seal(&token, HOUR), cure);
    a.unwrap();
    b.unwrap();
    let took = started.elapsed();
    assert!(took >= 2 * SECOND && took < 3 * SECOND, "{took:?}");
    assert_eq!(
        token.stats(),
        Stats {
            respawned: 1,
            stuck: 2,
            ..Stats::default()
        }
    );
}

#[tokio::test(start_paused = true)]
async fn a_host_that_answers_nothing_is_found_with_a_single_caller() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.hang(true);
    let started = Instant::now();
    let cure = async {
        sleep(SECOND).await;
        fake.hang(false);
    };
    let (sealed, ()) = tokio::join!(seal(&token, HOUR), cure);
    sealed.unwrap();
    assert!(started.elapsed() < 5 * SECOND, "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_caller_gets_its_answer_by_its_deadline_whatever_the_host_does() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.hang(true);
    let started = Instant::now();
    let error = seal(&token, SECOND / 2).await.unwrap_err();
    assert!(matches!(error, TokenError::Deadline { .. }), "{error}");
    let took = started.elapsed();
    assert!(took >= SECOND / 2 && took < SECOND * 6 / 10, "{took:?}");
    let error = seal(&token, Duration::ZERO).await.unwrap_err();
    assert!(matches!(error, TokenError::Deadline { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_caller_frees_its_place_and_disturbs_nobody() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.hold();
    // Eight fill the host (two packets for each of four sessions), the ninth and tenth wait.
    let callers: Vec<_> = (0..10)
        .map(|_| {
            let token = token.clone();
            tokio::spawn(async move { seal(&token, SECOND).await })
        })
        .collect();
    sleep(SECOND / 10).await;
    callers[0].abort();
    callers[8].abort();
    sleep(SECOND / 10).await;
    fake.release();
    for (n, caller) in callers.into_iter().enumerate() {
        match caller.await {
            Ok(sealed) => drop(sealed.unwrap()),
            Err(e) => assert!(e.is_cancelled() && (n == 0 || n == 8)),
        }
    }
    assert_eq!(
        fake.counts().seals,
        9,
        "the one that waited never reached the host"
    );
}

#[tokio::test(start_paused = true)]
async fn what_cannot_finish_in_time_is_refused_at_once_and_the_rest_is_answered() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    fake.delay(SECOND / 10);
    seal(&token, SECOND).await.unwrap();
    let started = Instant::now();
    let callers: Vec<_> = (0..100)
        .map(|_| {
            let token = token.clone();
            tokio::spawn(async move { (seal(&token, SECOND * 21 / 20).await, Instant::now()) })
        })
        .collect();
    let (mut sealed, mut refused) = (0, 0);
    for caller in callers {
        match caller.await.unwrap() {
            (Ok(_), _) => sealed += 1,
            (Err(TokenError::Overloaded { .. }), at) => {
                assert_eq!(at - started, Duration::ZERO);
                refused += 1;
            }
            (Err(e), _) => panic!("{e}"),
        }
    }
    // Four at a time, ten times before the deadline.
    assert!((36..=40).contains(&sealed), "{sealed}");
    assert_eq!(sealed + refused, 100);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_away_is_down_at_once_and_up_soon_after_its_return() {
    let fake = fake();
    fake.fail_open(Some(Fault::new(
        FaultKind::TokenNotFound,
        "no token matches",
    )));
    let token = Token::start_with_fake("main", &fake);
    let state = wait_for(&token, SECOND, is_down).await;
    assert_eq!(reason(&state), "no token matches");
    let mut changes = token.state();
    changes.mark_unchanged();
    sleep(HOUR).await;
    assert!(
        !changes.has_changed().unwrap(),
        "one change, not one for each try"
    );
    assert_eq!(token.stats().down, 1);
    let hosts = fake.counts().hosts;
    assert!((360..=460).contains(&hosts), "{hosts}");
    let error = seal(&token, HOUR).await.unwrap_err();
    assert_eq!(error.to_string(), "token main is down: no token matches");

    fake.fail_open(None);
    wait_for(&token, 10 * SECOND, is_up).await;
    seal(&token, SECOND).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn callers_wait_for_the_first_host_and_learn_at_once_that_there_is_none() {
    let fake = fake();
    fake.fail_start(Some("no such file"));
    let token = Token::start_with_fake("main", &fake);
    let error = seal(&token, HOUR).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "token main is down: the module host cannot be started: no such file"
    );
    let token = Token::start_with_fake("main", &self::fake());
    seal(&token, SECOND).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lost_token_costs_the_host_and_the_next_one_does_the_operation() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.fail_operations(Some(Fault::new(FaultKind::Device, "the device is gone")));
    fake.hold();
    let cure = async {
        sleep(SECOND / 10).await;
        fake.release();
        wait_for(&token, SECOND, |s| !is_up(s)).await;
        fake.fail_operations(None);
    };
    let (sealed, ()) = tokio::join!(seal(&token, SECOND), cure);
    sealed.unwrap();
    assert_eq!(
        token.stats(),
        Stats {
            respawned: 1,
            ..Stats::default()
        }
    );
}

#[tokio::test(start_paused = true)]
async fn a_fault_that_stays_reaches_the_caller_after_two_hosts() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    fake.fail_operations(Some(Fault::new(FaultKind::Device, "the device is gone")));
    let error = seal(&token, SECOND).await.unwrap_err();
    assert!(matches!(error, TokenError::Fault { .. }), "{error}");
    assert_eq!(fake.counts().seals, 2);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_was_there_and_is_gone_is_a_lost_token() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.set_keys([]);
    let error = seal(&token, SECOND).await.unwrap_err();
    let TokenError::Fault { fault, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(fault.kind, FaultKind::KeyNotFound);
    assert_eq!(fake.counts().hosts, 2);
    let State::Up { description, .. } = wait_for(&token, SECOND, is_up).await else {
        unreachable!()
    };
    assert!(description.keys.is_empty(), "the next host looked anew");

    let error = seal(&token, SECOND).await.unwrap_err();
    assert!(matches!(error, TokenError::Fault { .. }), "{error}");
    assert_eq!(
        fake.counts().hosts,
        2,
        "a key that was not there costs no host"
    );
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_new_is_seen_after_a_refresh() {
    let fake = Fake::new([]);
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.set_keys([key()]);
    token.refresh(Instant::now() + SECOND).await.unwrap();
    let State::Up { description, .. } = wait_for(&token, SECOND, is_up).await else {
        unreachable!()
    };
    assert_eq!(description.keys, [key().info()]);
    assert_eq!(fake.counts().hosts, 1);
}

#[tokio::test(start_paused = true)]
async fn what_the_host_did_to_recover_is_counted() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.recover(Recovery {
        retried: true,
        relogin: true,
        reinit: false,
    });
    seal(&token, SECOND).await.unwrap();
    assert_eq!(
        token.stats(),
        Stats {
            retried: 1,
            relogin: 1,
            ..Stats::default()
        }
    );
}

fn refused() -> Fault {
    Fault::new(FaultKind::PinIncorrect, "the token refused the PIN").on_token(SERIAL)
}

#[tokio::test(start_paused = true)]
async fn a_refused_pin_is_tried_once_whatever_is_restarted_until_its_generation_is_raised() {
    let folder = tempfile::tempdir().unwrap();
    let fake = fake();
    fake.fail_open(Some(refused()));
    for _ in 0..3 {
        let token = Token::start_fake_as(config(folder.path(), 2), &fake);
        let state = wait_for(&token, SECOND, is_latched).await;
        assert!(
            reason(&state).contains("until pin.generation is above 2"),
            "{state:?}"
        );
        sleep(HOUR).await;
        let error = seal(&token, HOUR).await.unwrap_err();
        assert!(matches!(error, TokenError::Down { .. }), "{error}");
        token.stop().await;
    }
    assert_eq!(fake.counts().logins, 1);

    fake.fail_open(None);
    let token = Token::start_fake_as(config(folder.path(), 1), &fake);
    wait_for(&token, SECOND, is_latched).await;
    let token = Token::start_fake_as(config(folder.path(), 3), &fake);
    wait_for(&token, SECOND, is_up).await;
    assert_eq!(fake.counts().logins, 2);
}

#[tokio::test(start_paused = true)]
async fn a_pin_refused_by_an_unknown_token_is_noted_under_its_uri() {
    let folder = tempfile::tempdir().unwrap();
    let fake = fake();
    fake.fail_open(Some(Fault::new(FaultKind::PinLocked, "the PIN is locked")));
    let token = Token::start_fake_as(config(folder.path(), 1), &fake);
    wait_for(&token, SECOND, is_latched).await;
    fake.fail_open(None);
    let token = Token::start_fake_as(config(folder.path(), 1), &fake);
    let state = wait_for(&token, SECOND, is_latched).await;
    assert!(
        reason(&state).contains("refused before: the PIN is locked"),
        "{state:?}"
    );
    assert_eq!(
        fake.counts().hosts,
        1,
        "no host is started with a PIN that was refused"
    );
}

#[tokio::test(start_paused = true)]
async fn a_pin_refused_while_the_token_serves_latches_too() {
    let folder = tempfile::tempdir().unwrap();
    let fake = fake();
    let token = Token::start_fake_as(config(folder.path(), 1), &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.fail_operations(Some(refused()));
    let error = seal(&token, SECOND).await.unwrap_err();
    assert!(matches!(error, TokenError::Fault { .. }), "{error}");
    wait_for(&token, SECOND, is_latched).await;
    sleep(HOUR).await;
    assert_eq!(fake.counts().logins, 1);
    assert_eq!(fake.counts().hosts, 1);
}

#[tokio::test(start_paused = true)]
async fn a_pin_that_cannot_be_read_is_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let pin = Arc::new(Pin(Mutex::new(Err("no such file: /etc/hsm/pin"))));
    let mut config = config(folder.path(), 1);
    config.pin = Some(Arc::clone(&pin) as Arc<dyn PinSource>);
    let fake = fake();
    let token = Token::start_fake_as(config, &fake);
    let state = wait_for(&token, SECOND, is_down).await;
    assert_eq!(
        reason(&state),
        "the PIN cannot be read: no such file: /etc/hsm/pin"
    );
    sleep(HOUR).await;
    assert_eq!(fake.counts().hosts, 0);
    *pin.0.lock().unwrap() = Ok("1234");
    wait_for(&token, 10 * SECOND, is_up).await;
}

#[tokio::test(start_paused = true)]
async fn a_token_that_wants_a_pin_that_is_not_configured_is_tried_again() {
    let fake = fake();
    fake.fail_open(Some(Fault::new(
        FaultKind::PinMissing,
        "the token wants a PIN",
    )));
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_down).await;
    fake.fail_open(None);
    wait_for(&token, 10 * SECOND, is_up).await;
}

#[tokio::test(start_paused = true)]
async fn no_login_is_tried_while_a_note_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let notes = folder.path().join("pin-latch");
    std::fs::create_dir(&notes).unwrap();
    let note = notes.join("note");
    std::fs::write(&note, "talos-hsm PIN latch 1\ntok").unwrap();
    let fake = fake();
    let token = Token::start_fake_as(config(folder.path(), 1), &fake);
    let state = wait_for(&token, SECOND, is_down).await;
    assert!(reason(&state).contains(note.to_str().unwrap()), "{state:?}");
    sleep(HOUR).await;
    assert_eq!(fake.counts().hosts, 0);
    std::fs::remove_file(&note).unwrap();
    wait_for(&token, 10 * SECOND, is_up).await;
}

#[tokio::test(start_paused = true)]
async fn a_stopped_token_refuses_and_its_host_is_gone() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    wait_for(&token, SECOND, is_up).await;
    fake.hold();
    let stop = async {
        sleep(SECOND / 10).await;
        token.stop().await;
        token.stop().await;
    };
    let (sealed, ()) = tokio::join!(seal(&token, SECOND), stop);
    assert_eq!(
        sealed.unwrap_err().to_string(),
        "token main is down: it was stopped"
    );
    let error = seal(&token, SECOND).await.unwrap_err();
    assert_eq!(error.to_string(), "token main is down: it was stopped");
    sleep(HOUR).await;
    assert_eq!(fake.counts().hosts, 1);
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_that_goes_stops_the_token() {
    let fake = fake();
    let token = Token::start_with_fake("main", &fake);
    let mut state = token.state();
    wait_for(&token, SECOND, is_up).await;
    drop(token.clone());
    sleep(SECOND).await;
    assert!(is_up(&state.borrow()));
    drop(token);
    let last = state.wait_for(is_down).await.unwrap().clone();
    assert_eq!(reason(&last), "it was stopped");
}
