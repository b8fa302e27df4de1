//! Tokens over real processes: hosts that are killed, stopped, crash, hang, cannot be started, or
//! have lost their token. Each test is about how long that takes and what callers see meanwhile.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant as Clock};

use hsm_token_client::{Isolation, Loader, Stats, Token, TokenError, owns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{
    Bench, CountedPin, PIN, SECOND, SoftHsm, describe, give_away, is_down, is_latched, is_up,
    reason, script, wait_for,
};
use tokio::time::sleep;

/// The host was waited for. While another test starts one, any process counts as ours.
async fn given_back(host: Pid) {
    let started = Clock::now();
    while owns(host.as_raw().unsigned_abs()) {
        assert!(started.elapsed() < SECOND, "{host} is still ours");
        sleep(SECOND / 100).await;
    }
    assert!(!PathBuf::from(format!("/proc/{host}")).exists());
}

#[tokio::test]
async fn a_killed_host_is_replaced_and_the_next_unseal_works() {
    let hsm = SoftHsm::new();
    let bench = Bench::new(hsm.config()).await;
    let first = bench.host();
    bench.signal(Signal::SIGKILL);
    let started = Clock::now();
    bench.unseal(2 * SECOND).await.expect("unseal");
    assert!(started.elapsed() < 2 * SECOND, "{:?}", started.elapsed());
    let second = bench.other_host(first).await;
    given_back(first).await;
    assert!(owns(second.as_raw().unsigned_abs()));
    let stats = bench.token.stats();
    assert_eq!(
        stats,
        Stats {
            respawned: 1,
            crashed: 1,
            ..Stats::default()
        }
    );
}

#[tokio::test]
async fn operations_in_flight_survive_the_death_of_their_host() {
    let hsm = SoftHsm::new();
    let bench = Arc::new(Bench::new(hsm.config()).await);
    for _ in 0..3 {
        let callers: Vec<_> = (0..200)
            .map(|_| {
                let bench = Arc::clone(&bench);
                tokio::spawn(async move { bench.unseal(10 * SECOND).await })
            })
            .collect();
        tokio::task::yield_now().await;
        let host = bench.host();
        bench.signal(Signal::SIGKILL);
        for caller in callers {
            caller.await.expect("no panic").expect("unseal");
        }
        bench.other_host(host).await;
    }
    assert_eq!(bench.token.stats().respawned, 3);
}

#[tokio::test]
async fn a_stopped_host_is_found_stuck_killed_and_replaced() {
    let hsm = SoftHsm::new();
    let mut config = hsm.config();
    config.call_timeout = SECOND / 2;
    let bench = Bench::new(config).await;
    let first = bench.host();
    bench.stop_host().await;
    let started = Clock::now();
    let (a, b) = tokio::join!(bench.unseal(10 * SECOND), bench.unseal(10 * SECOND));
    a.expect("unseal");
    b.expect("unseal");
    assert!(started.elapsed() < 3 * SECOND, "{:?}", started.elapsed());
    assert_ne!(first, bench.host());
    given_back(first).await;
    let stats = bench.token.stats();
    assert_eq!(
        stats,
        Stats {
            respawned: 1,
            stuck: 2,
            ..Stats::default()
        }
    );
}

#[tokio::test]
async fn callers_of_a_stopped_host_are_answered_by_their_deadlines() {
    let hsm = SoftHsm::new();
    let bench = Bench::new(hsm.config()).await;
    bench.stop_host().await;
    let started = Clock::now();
    let error = bench.unseal(SECOND / 2).await.expect_err("it is stopped");
    assert!(matches!(error, TokenError::Deadline { .. }), "{error}");
    let took = started.elapsed();
    assert!(took >= SECOND / 2 && took < SECOND, "{took:?}");
}

#[tokio::test]
async fn a_token_whose_folder_goes_away_is_down_and_comes_back_with_it() {
    let hsm = SoftHsm::new();
    let bench = Bench::new(hsm.config()).await;
    let away = hsm.folder.path().join("away");
    fs::rename(hsm.tokens(), &away).expect("rename");
    // SoftHSM still has the key in memory; a probe is what notices.
    let started = Clock::now();
    while !is_down(&bench.token.state().borrow()) {
        let deadline = tokio::time::Instant::now() + 2 * SECOND;
        let wrap = hsm_wire::envelope::Wrap::AES_GCM;
        let _ = bench.token.probe(&bench.key, wrap, deadline).await;
        assert!(started.elapsed() < 30 * SECOND, "it is never down");
        sleep(SECOND / 5).await;
    }
    let refused = Clock::now();
    let error = bench.unseal(10 * SECOND).await.expect_err("it is away");
    assert!(matches!(error, TokenError::Down { .. }), "{error}");
    assert!(refused.elapsed() < SECOND / 10, "{:?}", refused.elapsed());

    sleep(3 * SECOND).await;
    fs::rename(&away, hsm.tokens()).expect("rename");
    let (_, took) = wait_for(&bench.token, is_up).await;
    assert!(took < 15 * SECOND, "{took:?}");
    bench.unseal(2 * SECOND).await.expect("unseal");
    assert_eq!(bench.token.stats().down, 1);
}

#[tokio::test]
async fn a_host_that_always_ends_is_tried_with_pauses_and_refused_meanwhile() {
    let hsm = SoftHsm::new();
    let tries = hsm.folder.path().join("tries");
    let text = format!("echo x >> {}\nexit 7", tries.display());
    let token = Token::start(script(&hsm, &text));
    let (state, _) = wait_for(&token, is_down).await;
    assert_eq!(
        reason(&state),
        "the module host ended with exit code 7 before it had opened the token"
    );
    sleep(4 * SECOND).await;
    let tries = fs::read_to_string(tries).expect("tries").lines().count();
    assert!((2..=4).contains(&tries), "{tries}");
    assert_eq!(token.stats().down, 1);
    assert!(is_down(&token.state().borrow()));
}

#[tokio::test]
async fn a_host_that_cannot_be_started_is_a_token_that_is_down_and_says_why() {
    let hsm = SoftHsm::new();
    let mut config = hsm.config();
    config.launch.program = "/nonexistent/hsm-token".into();
    let token = Token::start(config);
    let (state, _) = wait_for(&token, is_down).await;
    assert_eq!(
        reason(&state),
        "the module host cannot be started: /nonexistent/hsm-token: No such file or directory (os error 2)"
    );
}

#[tokio::test]
async fn a_host_that_speaks_nonsense_is_killed() {
    let hsm = SoftHsm::new();
    let token = Token::start(script(&hsm, "printf 'GET / HTTP/1.1' >&3\nsleep 1000"));
    let (state, _) = wait_for(&token, is_down).await;
    assert!(
        reason(&state).contains("sent a malformed message"),
        "{state:?}"
    );
    assert_eq!(token.stats().crashed, 1);
}

#[tokio::test]
async fn a_host_that_does_not_open_its_token_is_given_up() {
    let hsm = SoftHsm::new();
    let token = Token::start(script(&hsm, "sleep 1000"));
    let (state, took) = wait_for(&token, is_down).await;
    assert_eq!(
        reason(&state),
        "the module did not open the token within 10 s"
    );
    assert!(took < 12 * SECOND, "{took:?}");
}

#[tokio::test]
async fn what_a_host_has_started_ends_with_it() {
    let hsm = SoftHsm::new();
    let pid_file = hsm.folder.path().join("pid");
    let text = format!("sleep 1000 & echo $! > {}\nexit 1", pid_file.display());
    let token = Token::start(script(&hsm, &text));
    wait_for(&token, is_down).await;
    let pid = fs::read_to_string(pid_file).expect("pid");
    let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
    let started = Clock::now();
    // An orphan that was killed stays a zombie until whoever inherits it looks.
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(started.elapsed() < 5 * SECOND, "it lives on");
        sleep(SECOND / 20).await;
    }
}

#[tokio::test]
async fn the_host_gets_the_environment_and_descriptors_it_is_meant_to_get_and_no_others() {
    let hsm = SoftHsm::new();
    let seen = hsm.folder.path().join("seen");
    let text = format!(
        "{{ /usr/bin/env; ls -l /proc/$$/fd; pwd; echo \"$@\"; }} > {} 2>&1\nexit 1",
        seen.display()
    );
    let mut config = script(&hsm, &text);
    config.launch.env = vec![("ONLY".into(), "this".into())];
    let token = Token::start(config);
    wait_for(&token, is_down).await;
    let seen = fs::read_to_string(seen).expect("seen");
    let shells = ["PWD=", "_=", "SHLVL=", "OLDPWD="];
    let env: Vec<&str> = seen
        .lines()
        .filter(|line| line.contains('=') && !shells.iter().any(|name| line.starts_with(name)))
        .collect();
    assert_eq!(env, ["ONLY=this"]);
    let target = |fd: &str| {
        let line = seen
            .lines()
            .find_map(|line| line.split_once(&format!(" {fd} -> ")));
        line.map(|(_, target)| target)
    };
    assert_eq!(target("0"), Some("/dev/null"));
    assert!(
        target("3").is_some_and(|t| t.starts_with("socket:")),
        "{seen}"
    );
    // Who runs the test may leave pipes open; the daemon's own descriptors are sockets, files and
    // the like, and of sockets there is the one.
    let sockets = seen
        .lines()
        .filter(|line| line.contains("-> socket:"))
        .count();
    assert_eq!(sockets, 1, "{seen}");
    assert!(!seen.contains("anon_inode"), "{seen}");
    assert!(seen.lines().any(|line| line == "/"), "{seen}");
    assert!(seen.contains("--session-socket 3 --no-isolation"), "{seen}");
}

#[tokio::test]
async fn a_host_is_started_through_the_loader_that_is_named() {
    let hsm = SoftHsm::new();
    let mut config = hsm.config();
    let ld_so = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.exists())
        .expect("the loader of glibc");
    config.launch.loader = Some(Loader {
        ld_so,
        library_path: vec!["/nowhere".into(), "/usr/lib".into()],
    });
    let bench = Bench::new(config).await;
    bench.unseal(2 * SECOND).await.expect("unseal");
    let line = fs::read(format!("/proc/{}/cmdline", bench.host())).expect("cmdline");
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    assert!(line.contains("--library-path /nowhere:/usr/lib "), "{line}");
    assert!(!line.contains(PIN));
}

#[tokio::test]
async fn an_isolated_host_serves_and_is_replaced_with_all_it_has_started() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: the host makes namespaces and changes its user"
    );
    let hsm = SoftHsm::new();
    let mut config = hsm.config();
    give_away(&hsm.tokens(), 64500);
    fs::set_permissions(hsm.folder.path(), fs::Permissions::from_mode(0o755)).expect("mode");
    config.launch.isolation = Some(Isolation {
        uid: 64500,
        gid: 64500,
        read_only: vec![hsm.conf()],
        read_write: vec![hsm.tokens()],
    });
    let bench = Bench::new(config).await;
    let inner = children(bench.host());
    assert_eq!(
        inner.len(),
        1,
        "the process that starts and the one that holds the module"
    );
    for whom in [
        |bench: &Bench| bench.host(),
        |bench: &Bench| children(bench.host())[0],
    ] {
        let before = bench.host();
        kill(whom(&bench), Signal::SIGKILL).expect("kill");
        let started = Clock::now();
        bench.unseal(2 * SECOND).await.expect("unseal");
        bench.other_host(before).await;
        assert!(started.elapsed() < 2 * SECOND, "{:?}", started.elapsed());
    }
    assert_eq!(bench.token.stats().crashed, 2);
    let (outer, inner) = (bench.host(), children(bench.host()));
    bench.token.stop().await;
    for process in [outer, inner[0]] {
        assert!(!PathBuf::from(format!("/proc/{process}")).exists());
    }
}

fn children(pid: Pid) -> Vec<Pid> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(path).expect("children");
    let pids = text.split_whitespace().map(|pid| pid.parse().expect("pid"));
    pids.map(Pid::from_raw).collect()
}

#[tokio::test]
async fn a_wrong_pin_latches_over_restarts_until_its_generation_is_raised() {
    let hsm = SoftHsm::new();
    let pin = Arc::new(CountedPin::new("000000"));
    let mut config = hsm.config();
    config.pin = Some(Arc::clone(&pin) as _);
    let token = Token::start(config.clone());
    let (state, _) = wait_for(&token, is_latched).await;
    assert!(reason(&state).contains("CKR_PIN_INCORRECT"), "{state:?}");
    sleep(2 * SECOND).await;
    assert_eq!(pin.reads.load(Ordering::Relaxed), 1, "one host, one login");
    token.stop().await;
    for dir in ["run", "var"] {
        let notes = fs::read_dir(hsm.folder.path().join(dir).join("pin-latch")).expect("notes");
        assert_eq!(notes.count(), 1);
    }

    // A reboot clears /run.
    fs::remove_dir_all(hsm.folder.path().join("run")).expect("remove");
    let token = Token::start(config.clone());
    let (state, _) = wait_for(&token, is_latched).await;
    assert!(
        !reason(&state).contains("CKR_PIN_INCORRECT"),
        "no login was tried: {state:?}"
    );
    token.stop().await;

    config.pin = Some(Arc::new(CountedPin::new(PIN)));
    config.pin_generation = 2;
    Bench::new(config)
        .await
        .unseal(2 * SECOND)
        .await
        .expect("unseal");
}

#[tokio::test]
async fn a_key_made_later_is_seen_after_a_refresh() {
    let hsm = SoftHsm::new();
    let token = Token::start(hsm.config());
    assert_eq!(describe(&token).await.keys.len(), 1);
    hsm.add_key("another", "02");
    token
        .refresh(tokio::time::Instant::now() + 10 * SECOND)
        .await
        .expect("refresh");
    assert_eq!(describe(&token).await.keys.len(), 2);
}

#[tokio::test]
async fn a_stopped_token_leaves_no_process() {
    let hsm = SoftHsm::new();
    let bench = Bench::new(hsm.config()).await;
    let host = bench.host();
    let started = Clock::now();
    bench.token.stop().await;
    assert!(started.elapsed() < 2 * SECOND, "{:?}", started.elapsed());
    given_back(host).await;
    assert!(!PathBuf::from(format!("/proc/{host}")).exists());
}

#[tokio::test]
async fn two_tokens_do_not_disturb_each_other() {
    let (one, two) = (SoftHsm::new(), SoftHsm::new());
    let (one, two) = tokio::join!(Bench::new(one.config()), Bench::new(two.config()));
    one.stop_host().await;
    for _ in 0..100 {
        let started = Clock::now();
        two.unseal(SECOND).await.expect("unseal");
        assert!(started.elapsed() < Duration::from_millis(500));
    }
}
