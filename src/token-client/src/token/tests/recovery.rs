//! Hosts that die, hang or lose their token, and what the callers see of it.

use hsm_wire::fault::Fault;

use super::*;

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
