//! What the keyring does when tokens come, go and hold what they should not.

use std::sync::Arc;
use std::time::Duration;

use hsm_token_client::fake::{Fake, FakeKey};
use hsm_token_client::{State, Token};
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::secret::Secret;
use hsm_wire::uri::Uri;
use tokio::time::{Instant, sleep};

use super::*;

const SEED: [u8; 32] = [7; 32];

fn clusters(own: &str, accepted: &[&str]) -> ClusterNames {
    ClusterNames {
        own: own.to_owned(),
        accepted: accepted.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn rule(object: &str, epoch: u64, state: KeyState) -> KeyRule {
    let uri = format!("pkcs11:object={object};type=secret-key");
    KeyRule {
        uri: Uri::parse(&uri).unwrap(),
        epoch,
        state,
        backup_acknowledged: true,
        allow_rsa_oaep: false,
    }
}

async fn token(name: &str, fake: &Fake) -> NamedToken {
    let token = Token::start_with_fake(name, fake);
    let mut state = token.state();
    state
        .wait_for(|state| !matches!(state, State::Starting))
        .await
        .unwrap();
    NamedToken {
        name: name.to_owned(),
        uri: Uri::parse("pkcs11:serial=fake0000").unwrap(),
        token,
    }
}

async fn lose(named: &NamedToken, fake: &Fake) {
    fake.fail_open(Some(Fault::new(FaultKind::TokenNotFound, "taken away")));
    fake.die();
    settle(named, |state| matches!(state, State::Down { .. })).await;
}

async fn restore(named: &NamedToken, fake: &Fake) {
    fake.fail_open(None);
    settle(named, |state| matches!(state, State::Up { .. })).await;
}

async fn settle(named: &NamedToken, wanted: impl FnMut(&State) -> bool) {
    named.token.state().wait_for(wanted).await.unwrap();
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(3)
}

async fn seal(keyring: &Keyring) -> (Vec<u8>, String) {
    let sealed = keyring.seal(Secret::copy_of(&SEED), soon()).await;
    sealed.expect("it seals")
}

async fn opens(keyring: &Keyring, (envelope, key_id): &(Vec<u8>, String)) -> bool {
    let opened = keyring
        .open(envelope, key_id, soon())
        .await
        .expect("it opens");
    assert_eq!(opened.plaintext.expose(), SEED);
    opened.listed
}

#[tokio::test(start_paused = true)]
async fn the_next_token_serves_while_the_first_is_away_and_the_key_id_stays() {
    let (a, b) = (
        Fake::new([FakeKey::new("kek", 1)]),
        Fake::new([FakeKey::new("kek", 1)]),
    );
    let tokens = vec![token("a", &a).await, token("b", &b).await];
    let rules = vec![rule("kek", 1, KeyState::Active)];
    let keyring = Keyring::new(clusters("c", &[]), rules, tokens.clone(), None);
    let before = seal(&keyring).await;
    assert_eq!((a.counts().seals, b.counts().seals), (1, 0));

    lose(&tokens[0], &a).await;
    // Also before anybody looked: the call itself finds the next token.
    assert!(opens(&keyring, &before).await);
    keyring.refresh();
    let during = seal(&keyring).await;
    assert_eq!(during.1, before.1);
    assert_eq!((a.counts().seals, b.counts().seals), (1, 1));

    // Back, but not yet trusted: no flapping.
    restore(&tokens[0], &a).await;
    keyring.refresh();
    seal(&keyring).await;
    assert_eq!((a.counts().seals, b.counts().seals), (1, 2));
    sleep(Duration::from_secs(31)).await;
    keyring.refresh();
    assert!(opens(&keyring, &seal(&keyring).await).await);
    assert_eq!((a.counts().seals, b.counts().seals), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn another_key_under_the_same_label_is_refused_by_its_fingerprint() {
    let (a, b) = (
        Fake::new([FakeKey::new("kek", 1)]),
        Fake::new([FakeKey::new("kek", 2)]),
    );
    let tokens = vec![token("a", &a).await, token("b", &b).await];
    let rules = vec![rule("kek", 1, KeyState::Active)];
    let keyring = Keyring::new(clusters("c", &[]), rules.clone(), tokens.clone(), None);
    let sealed = seal(&keyring).await;
    let problem = keyring.reports()[0]
        .problem
        .clone()
        .expect("it is reported");
    assert!(problem.contains("token `b` holds another key"), "{problem}");

    lose(&tokens[0], &a).await;
    keyring.refresh();
    let refused = keyring
        .seal(Secret::copy_of(&SEED), soon())
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("holds another key"),
        "{refused}"
    );
    assert_eq!(b.counts().seals, 0);

    // A new configuration does not make the daemon forget which key was meant.
    let keyring = Keyring::new(clusters("c", &[]), rules, tokens.clone(), Some(&keyring));
    assert!(keyring.active().is_err());
    restore(&tokens[0], &a).await;
    keyring.refresh();
    assert!(opens(&keyring, &sealed).await);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_no_rule_names_still_opens_what_it_sealed() {
    let fake = Fake::new([FakeKey::new("old", 1), FakeKey::new("new", 2)]);
    let tokens = vec![token("a", &fake).await];
    let old = Keyring::new(
        clusters("c", &[]),
        vec![rule("old", 1, KeyState::Active)],
        tokens.clone(),
        None,
    );
    let sealed = seal(&old).await;
    // Written anew by hand, without the old key and with an epoch of its own.
    let rules = vec![rule("new", 9, KeyState::Active)];
    let new = Keyring::new(clusters("c", &[]), rules, tokens, None);
    assert!(!opens(&new, &sealed).await, "the key is listed");
}

#[tokio::test(start_paused = true)]
async fn a_former_cluster_name_opens_only_while_it_is_accepted() {
    let fake = Fake::new([FakeKey::new("kek", 1)]);
    let tokens = vec![token("a", &fake).await];
    let rules = vec![rule("kek", 1, KeyState::Active)];
    let ring = |names| Keyring::new(names, rules.clone(), tokens.clone(), None);
    let (envelope, key_id) = seal(&ring(clusters("before", &[]))).await;

    let moved = ring(clusters("after", &[]));
    let refused = moved.open(&envelope, &key_id, soon()).await.err().unwrap();
    let text = refused.to_string();
    assert!(text.contains("accept_clusters"), "{text}");
    assert!(opens(&ring(clusters("after", &["before"])), &(envelope, key_id)).await);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_key_is_an_outage_while_a_token_that_may_hold_it_is_away() {
    let (a, b) = (
        Fake::new([FakeKey::new("kek", 1)]),
        Fake::new([FakeKey::new("other", 2)]),
    );
    let tokens = vec![token("a", &a).await, token("b", &b).await];
    let rules = vec![rule("kek", 1, KeyState::Active)];
    let keyring = Keyring::new(clusters("c", &[]), rules, tokens.clone(), None);
    let (envelope, key_id) = seal(&keyring).await;
    lose(&tokens[0], &a).await;
    keyring.refresh();
    let error = keyring
        .open(&envelope, &key_id, soon())
        .await
        .err()
        .unwrap();
    assert!(matches!(error, KeyringError::Unready(_)), "{error:?}");

    let without = Keyring::new(
        clusters("c", &[]),
        Vec::new(),
        vec![tokens[1].clone()],
        None,
    );
    let error = without
        .open(&envelope, &key_id, soon())
        .await
        .err()
        .unwrap();
    assert!(matches!(error, KeyringError::UnknownKey(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn two_keys_under_one_rule_are_an_error_that_says_how_to_tell_them_apart() {
    let fake = Fake::new([FakeKey::new("kek", 1), FakeKey::new("kek", 2)]);
    let tokens = vec![token("a", &fake).await];
    let rules = vec![rule("kek", 1, KeyState::Active)];
    let keyring: Arc<Keyring> = Keyring::new(clusters("c", &[]), rules, tokens, None);
    let error = keyring.active().err().unwrap().to_string();
    assert!(
        error.contains("matches 2 keys") && error.contains("id="),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_key_made_since_opens_what_another_node_sealed_and_made_up_keys_cost_one_look() {
    let here = Fake::new([FakeKey::new("kek", 1)]);
    let there = Fake::new([FakeKey::new("kek", 1), FakeKey::new("next", 2)]);
    let tokens = vec![token("a", &here).await];
    let rules = vec![rule("kek", 1, KeyState::Active)];
    let keyring = Keyring::new(clusters("c", &[]), rules, tokens, None);
    let other = Keyring::new(
        clusters("c", &[]),
        vec![rule("next", 2, KeyState::Active)],
        vec![token("b", &there).await],
        None,
    );
    let (envelope, key_id) = seal(&other).await;
    let looks = here.counts().describes;
    for _ in 0..10 {
        let error = keyring
            .open(&envelope, &key_id, soon())
            .await
            .err()
            .unwrap();
        assert!(matches!(error, KeyringError::UnknownKey(_)), "{error:?}");
    }
    assert_eq!(here.counts().describes, looks + 1);

    here.set_keys([FakeKey::new("kek", 1), FakeKey::new("next", 2)]);
    sleep(Duration::from_secs(6)).await;
    opens(&keyring, &(envelope, key_id)).await;
}
