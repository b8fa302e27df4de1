//! The token's behaviour over a fake, on a clock that jumps: operations, queue, deadlines.

mod pin;
mod recovery;

use std::time::Duration;

use hsm_wire::fault::FaultKind;
use hsm_wire::host::Recovery;
use tokio::time::{sleep, timeout};

use super::*;
use crate::fake::{Fake, FakeKey};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

fn key() -> FakeKey {
    FakeKey::new("kek", 7)
}

fn fake() -> Fake {
    Fake::new([key()])
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
