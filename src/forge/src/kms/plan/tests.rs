//! What the transcripts do not show: that the words follow the rules, and that what is foretold is what
//! the daemon says.

use std::fs;
use std::path::Path;

use hsm_config::parse;

use super::*;

const PACE: Pace = Pace {
    pick_up: 1,
    margin: 5,
};

fn config(cluster: &str, accepted: &[&str], keys: &[(&str, u64, &str)]) -> Config {
    let mut text = format!(
        "cluster: {cluster}\naccept_clusters: [{}]\ntokens:\n  - {{name: main, uri: 'pkcs11:token=t', module: /m.so, pin: {{file: /pin}}}}\nkms:\n  keys:\n",
        accepted.join(", ")
    );
    for (key, epoch, state) in keys {
        text += &format!(
            "    - {{uri: 'pkcs11:token=t;object={key}', epoch: {epoch}, state: {state}, backup: acknowledged}}\n"
        );
    }
    parse(&text, "f").unwrap_or_else(|errors| panic!("{}", errors.report()))
}

/// Every configuration of two keys, three epochs and two names that one file may hold.
fn configurations() -> Vec<Config> {
    let mut all = Vec::new();
    for (cluster, accepted) in [("x", &[][..]), ("x", &["y"]), ("y", &["x"])] {
        for keys in [
            &[("a", 1, "active")][..],
            &[("a", 2, "active")],
            &[("a", 1, "active"), ("b", 2, "pending")],
            &[("a", 1, "active"), ("b", 3, "pending")],
            &[("a", 1, "retired"), ("b", 2, "active")],
            &[("b", 2, "active")],
            &[("a", 3, "pending"), ("b", 2, "active")],
            &[("a", 3, "active"), ("b", 2, "retired")],
            &[("b", 2, "retired"), ("a", 3, "active"), ("c", 4, "pending")],
        ] {
            all.push(config(cluster, accepted, keys));
        }
    }
    all
}

fn each_pair(mut look: impl FnMut(&Config, &Config, &Plan)) {
    let all = configurations();
    for old in &all {
        for new in &all {
            look(old, new, &Plan::of(old, new, PACE));
        }
    }
}

#[test]
fn it_refuses_what_the_daemon_refuses_and_says_so_in_the_same_words() {
    let (mut legal, mut refused) = (0, 0);
    each_pair(
        |old, new, plan| match (plan::check(old, new), &plan.verdict) {
            (Ok(()), Ok(_)) => legal += 1,
            (Err(illegal), Err((found, _))) => {
                assert_eq!(illegal, *found);
                refused += 1;
            }
            (check, _) => panic!("{check:?}, but {}", plan.json()),
        },
    );
    assert!(legal > 50 && refused > 50, "{legal} {refused}");
}

#[test]
fn a_legal_step_that_changes_the_key_id_says_how_long_to_wait_and_no_other_does() {
    each_pair(|_, _, plan| {
        if let Ok(guidance) = &plan.verdict {
            assert_eq!(guidance.wait_minutes.is_some(), plan.changes.key_id_changes);
            let waits = guidance.steps.iter().any(|step| step.contains("3 + N + M"));
            assert_eq!(waits, plan.changes.key_id_changes);
        }
    });
}

#[test]
fn a_key_that_begins_to_seal_has_its_error_foretold_whether_legal_or_not() {
    each_pair(|_, _, plan| {
        let begins = plan.changes.which("activated").next().is_some();
        let (text, foretold) = match &plan.verdict {
            Ok(guidance) => (plan.text("o".as_ref(), "n".as_ref()), &guidance.foretold),
            Err((Illegal::NotAnnounced { .. }, foretold)) => {
                (plan.text("o".as_ref(), "n".as_ref()), foretold)
            }
            Err(_) => return,
        };
        if begins {
            assert!(
                foretold.iter().any(|error| error.code == "NOT_FOUND"),
                "{text}"
            );
        }
    });
}

#[test]
fn only_equal_configurations_are_unchanged() {
    each_pair(|old, new, plan| assert_eq!(plan.changes.is_empty(), old == new));
}

#[test]
fn keys_of_one_label_are_told_apart_by_their_uri() {
    let text = |id: &str, rest: &str| {
        format!(
            "    - {{uri: 'pkcs11:token=t;object=kek;id=%0{id}', {rest}, backup: acknowledged}}\n"
        )
    };
    let head = "cluster: x\ntokens:\n  - {name: main, uri: 'pkcs11:token=t', module: /m.so, pin: {file: /pin}}\nkms:\n  keys:\n";
    let file = |one: &str, two: &str| {
        parse(&format!("{head}{}{}", text("1", one), text("2", two)), "f").unwrap()
    };
    let old = file("epoch: 1, state: active", "epoch: 2, state: pending");
    let new = file("epoch: 1, state: retired", "epoch: 2, state: active");
    let plan = Plan::of(&old, &new, PACE);
    let steps = plan.verdict.unwrap().steps.join("\n");
    assert!(
        steps.contains("list pkcs11:token=t;object=kek;id=%02"),
        "{steps}"
    );
    assert!(!steps.contains("`kek`"), "{steps}");
}

/// The daemon's texts are in another program; this compares them with what is foretold.
#[test]
fn what_is_foretold_is_what_the_daemon_says() {
    let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/src");
    let read = |file: &str| fs::read_to_string(agent.join(file)).unwrap();
    let (keyring, service) = (read("keyring/mod.rs"), read("kms/service.rs"));
    let mut seen = 0;
    each_pair(|_, _, plan| {
        let foretold = match &plan.verdict {
            Ok(guidance) => &guidance.foretold,
            Err((_, foretold)) => foretold,
        };
        for error in foretold {
            let (variant, code) = match error.code {
                "NOT_FOUND" => ("UnknownKey", "Code::NotFound"),
                _ => ("OtherCluster", "Code::FailedPrecondition"),
            };
            let answered = service
                .lines()
                .any(|line| line.contains(variant) && line.contains(code));
            assert!(answered, "{variant} is no longer answered with {code}");
            // What stands between the values, which are a fingerprint, a tag and a name.
            let constant = |part: &str| keyring.contains(part);
            let parts = error
                .message
                .split(['…', '`'])
                .flat_map(|part| part.split(" (tag "));
            for part in parts.filter(|part| part.len() > 10 && !part.contains(')')) {
                assert!(constant(part.trim()), "the daemon no longer says {part:?}");
                seen += 1;
            }
        }
    });
    assert!(seen > 20, "{seen}");
}
