//! PINs that are refused, cannot be read, or are not known to be right.

use std::path::Path;
use std::sync::Mutex;

use hsm_wire::fault::Fault;

use super::*;
use crate::config::{Launch, PinSource};
use crate::fake::SERIAL;

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
