//! What a file becomes, and what of it is refused. How refusals look is in
//! `hsmd check`'s transcripts, src/agent/tests/cmd/check.

use std::sync::Arc;
use std::time::Duration;

use hsm_token_client as client;
use hsm_wire::secret::Secret;
use proptest::prelude::*;

use super::*;

const EVERYTHING: &str = include_str!("../../agent/tests/cmd/check/everything-set.yaml");
const RSA: &str = include_str!("../../agent/tests/cmd/check/rsa-key-allowed.yaml");
const DEFAULTS: &str = include_str!("../../agent/tests/cmd/check/defaults.yaml");

struct NoPin;

impl client::PinSource for NoPin {
    fn read(&self) -> Result<Secret, String> {
        Err("nobody may read it here".to_owned())
    }
}

fn paths(list: &[&str]) -> Vec<PathBuf> {
    list.iter().map(PathBuf::from).collect()
}

#[test]
fn every_field_arrives_where_it_belongs() {
    let config = parse(EVERYTHING, "f").unwrap();
    assert_eq!(config.clusters.own, "rciis-production");
    assert_eq!(config.clusters.accepted, ["rciis-staging"]);
    assert_eq!(config.state_dirs, paths(&["/run/hsm"]));
    assert_eq!(
        config.health_listen.unwrap().to_string(),
        "unix:///run/hsm/health.sock"
    );

    let [main, second] = config.tokens.as_slice() else {
        panic!("two tokens")
    };
    assert_eq!(main.name, "main");
    assert_eq!(main.uri.token.as_deref(), Some("rciis-production"));
    assert_eq!(main.sessions, 8);
    assert_eq!(main.call_timeout, Duration::from_millis(500));
    assert_eq!(main.pin.generation, 2);
    let file = pin::PinFile {
        path: "/etc/hsm/pin".into(),
        allow_world_readable: false,
    };
    assert_eq!(main.pin.source, pin::Source::File(file));
    let launch = client::Launch {
        program: "/opt/hsm/hsm-token".into(),
        loader: Some(client::Loader {
            ld_so: "/opt/vendor/ld-linux-x86-64.so.2".into(),
            library_path: paths(&["/opt/vendor"]),
        }),
        isolation: Some(client::Isolation {
            uid: 64501,
            gid: 64502,
            read_only: paths(&["/etc/hsm/softhsm2.conf"]),
            read_write: paths(&["/var/lib/hsm-softhsm"]),
        }),
        env: vec![("SOFTHSM2_CONF".into(), "/etc/hsm/softhsm2.conf".into())],
    };
    assert_eq!(main.launch, launch);
    assert_eq!(second.uri.serial.as_deref(), Some("00ff"));

    let kms = &config.kms;
    assert_eq!(kms.when_lost, WhenLost::Coast);
    let path = Endpoint::path("/run/hsm/kms.sock", 0o660, 65534, 64000).unwrap();
    let listen = [path, Endpoint::Abstract("hsm-kms".into())];
    assert_eq!(kms.listen.as_deref(), Some(listen.as_slice()));
    assert_eq!(kms.peers.host_proc, PathBuf::from("/host/proc"));
    let states: Vec<_> = kms.keys.iter().map(|key| (key.epoch, key.state)).collect();
    assert_eq!(
        states,
        [
            (1, KeyState::Retired),
            (2, KeyState::Active),
            (3, KeyState::Pending)
        ]
    );
    assert!(kms.keys[1].backup_acknowledged && !kms.keys[0].backup_acknowledged);
    assert_eq!(kms.keys[2].uri.id.as_deref(), Some(&[1, 2][..]));
}

#[test]
fn what_is_left_out_has_its_default() {
    let config = parse(DEFAULTS, "f").unwrap();
    assert_eq!(config.state_dirs, paths(&["/run/hsm", "/var/lib/hsm"]));
    assert_eq!(config.health_listen, None);
    assert_eq!(config.kms.listen, None);
    assert_eq!(config.kms.when_lost, WhenLost::FailClosed);
    assert_eq!(config.kms.peers, Rules::default());
    let token = &config.tokens[0];
    assert_eq!(
        (token.sessions, token.call_timeout),
        (4, Duration::from_secs(2))
    );
    assert_eq!(token.pin.generation, 1);
    assert_eq!(token.launch.program.file_name().unwrap(), "hsm-token");
    assert!(token.launch.program.is_absolute());
    let isolation = token.launch.isolation.as_ref().unwrap();
    assert_eq!((isolation.uid, isolation.gid), (64500, 64500));
}

#[test]
fn an_rsa_key_is_a_key_only_with_its_permission() {
    let config = parse(RSA, "f").unwrap();
    assert!(config.kms.keys[0].allow_rsa_oaep);
    let config = parse(EVERYTHING, "f").unwrap();
    assert!(config.kms.keys.iter().all(|key| !key.allow_rsa_oaep));
    for (text, with) in [
        ("      allow_rsa_oaep: true\n", ""),
        ("allow_rsa_oaep: true", "allow_rsa_oaep: false"),
        (";type=private", ""),
    ] {
        assert!(parse(&RSA.replace(text, with), "f").is_err(), "{with}");
    }
}

#[test]
fn a_token_hands_its_values_to_the_client_with_its_pin_unread() {
    let config = parse(EVERYTHING, "f").unwrap();
    let client = config.tokens[0].to_client(&config.state_dirs, Arc::new(NoPin));
    assert_eq!(client.uri, "pkcs11:token=rciis-production");
    assert_eq!(client.pin_generation, 2);
    assert_eq!(client.state_dirs, config.state_dirs);
    let error = client.pin.unwrap().read().unwrap_err();
    assert_eq!(error, "nobody may read it here");
}

#[test]
fn equal_texts_are_equal_configurations_and_a_changed_token_is_seen() {
    let one = parse(EVERYTHING, "f").unwrap();
    assert_eq!(one, parse(EVERYTHING, "g").unwrap());
    let two = parse(&EVERYTHING.replace("generation: 2", "generation: 3"), "f").unwrap();
    assert_ne!(one.tokens[0], two.tokens[0]);
    assert_eq!(one.tokens[1], two.tokens[1]);
}

#[test]
fn independent_errors_are_all_reported_in_the_order_of_the_file() {
    let text = DEFAULTS
        .replace("cluster: rciis-production", "cluster: \"-\"")
        .replace("module: /usr", "module: usr")
        .replace("epoch: 1", "epoch: -1");
    let errors = parse(&text, "f").unwrap_err();
    let report = errors.report();
    let lines: Vec<&str> = report
        .lines()
        .filter_map(|line| line.strip_prefix("error: f:"))
        .filter_map(|line| line.split(':').next())
        .collect();
    assert_eq!(lines, ["1", "5", "10"]);
    assert!(report.ends_with("f: 3 errors\n"));
    // One line for the log.
    let line = errors.to_string();
    assert!(
        line.starts_with("f:1:10: cluster: ") && line.ends_with("(and 2 more errors)"),
        "{line}"
    );
}

#[test]
fn a_plan_compares_whole_configurations() {
    let old = parse(DEFAULTS, "f").unwrap();
    let renamed = DEFAULTS.replace("cluster: rciis-production", "cluster: other");
    let new = parse(&renamed, "f").unwrap();
    assert!(matches!(
        plan::check(&old, &new),
        Err(plan::Illegal::ClusterForgotten { .. })
    ));
    let remembered = parse(
        &format!("{renamed}accept_clusters: [rciis-production]\n"),
        "f",
    );
    let remembered = remembered.unwrap();
    assert!(matches!(
        plan::check(&old, &remembered),
        Err(plan::Illegal::ClusterNotAnnounced { .. })
    ));
    let announced = parse(&format!("{DEFAULTS}accept_clusters: [other]\n"), "f").unwrap();
    assert_eq!(plan::check(&old, &announced), Ok(()));
    assert_eq!(plan::check(&announced, &remembered), Ok(()));
    let key = DEFAULTS.replace("k8s-secrets-kek", "another");
    assert!(matches!(
        plan::check(&old, &parse(&key, "f").unwrap()),
        Err(plan::Illegal::EpochReused { .. })
    ));
}

#[test]
fn a_file_cut_anywhere_is_either_an_error_or_a_whole_configuration() {
    let whole = parse(EVERYTHING, "f").unwrap();
    let mut valid = 0;
    for end in 0..EVERYTHING.len() {
        if let Ok(config) = parse(&EVERYTHING[..end], "f") {
            valid += 1;
            // What a cut file may lose is optional; that it can be valid at all is why the watcher
            // waits for the writer.
            assert_eq!(config.clusters.own, whole.clusters.own);
        }
    }
    assert!(valid > 0, "the premise of the watcher's care");
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[a-z0-9:\\-\\[\\]{}\"'&*!#| \n.]{0,200}") {
        let _ = parse(&text, "f");
    }

    #[test]
    fn a_file_with_one_byte_changed_gives_a_result_without_the_pin(
        at in 0..DEFAULTS.len(), byte in proptest::char::range(' ', '~')
    ) {
        let text = DEFAULTS.replace("{file: /etc/hsm/pin}", "hunter2");
        let mut bytes = text.into_bytes();
        let at = at.min(bytes.len() - 1);
        let inside_the_pin = bytes[at.saturating_sub(6)..].starts_with(b"pin:")
            || at + 20 > DEFAULTS.find("{file").unwrap() && at < DEFAULTS.find("{file").unwrap() + 10;
        if !inside_the_pin {
            bytes[at] = byte as u8;
        }
        let report = parse(&String::from_utf8(bytes).unwrap(), "f").unwrap_err().report();
        prop_assert!(!report.contains("hunter2"), "{report}");
    }

    #[test]
    fn every_report_names_a_place_that_is_in_the_file(
        from in 0..EVERYTHING.len(), cut in 1_usize..60
    ) {
        let to = (from + cut).min(EVERYTHING.len());
        let text = format!("{}{}", &EVERYTHING[..from], &EVERYTHING[to..]);
        if let Err(errors) = parse(&text, "f") {
            let lines = text.lines().count() + 1;
            for line in errors.report().lines().filter_map(|line| line.strip_prefix("error: f:")) {
                if let Ok(number) = line.split(':').next().unwrap_or_default().parse::<usize>() {
                    prop_assert!((1..=lines).contains(&number), "{line}");
                }
            }
        }
    }
}
