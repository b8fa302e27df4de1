//! Each rule by example, then all of them over random chains of configurations.

use std::collections::{BTreeMap, BTreeSet};

use hsm_wire::uri::Uri;
use proptest::prelude::*;

use super::*;
use KeyState::{Active, Pending, Retired};

fn rule(key: &str, epoch: u64, state: KeyState) -> KeyRule {
    KeyRule {
        uri: Uri {
            object: Some(key.to_owned()),
            ..Uri::default()
        },
        epoch,
        state,
        backup_acknowledged: true,
        allow_rsa_oaep: false,
    }
}

fn rules(list: &[(&str, u64, KeyState)]) -> Vec<KeyRule> {
    list.iter()
        .map(|(key, epoch, state)| rule(key, *epoch, *state))
        .collect()
}

fn check(old: &[(&str, u64, KeyState)], new: &[(&str, u64, KeyState)]) -> Result<(), Illegal> {
    check_keys(&rules(old), &rules(new))
}

fn names(own: &str, accepted: &[&str]) -> ClusterNames {
    ClusterNames {
        own: own.to_owned(),
        accepted: accepted.iter().map(|&name| name.to_owned()).collect(),
    }
}

#[test]
fn a_whole_rotation_is_legal_step_by_step() {
    let steps: [&[(&str, u64, KeyState)]; 5] = [
        &[("a", 1, Active)],
        &[("a", 1, Active), ("b", 2, Pending)],
        &[("a", 1, Retired), ("b", 2, Active)],
        &[("b", 2, Active)],
        // The same key under a new key_id: the API server rewrites, nothing else changes.
        &[("b", 3, Active)],
    ];
    for pair in steps.windows(2) {
        assert_eq!(check(pair[0], pair[1]), Ok(()));
        assert_eq!(check(pair[0], pair[0]), Ok(()), "no change is legal");
    }
}

#[test]
fn a_key_that_no_node_knows_cannot_seal() {
    let refused = check(&[("a", 1, Active)], &[("a", 1, Retired), ("b", 2, Active)]);
    assert!(matches!(refused, Err(Illegal::NotAnnounced { .. })));
}

#[test]
fn an_epoch_stays_with_its_key() {
    let old = [("a", 1, Active), ("b", 2, Pending)];
    let refused = check(&old, &[("a", 1, Active), ("c", 2, Pending)]);
    assert!(matches!(
        refused,
        Err(Illegal::EpochReused { epoch: 2, .. })
    ));
    // Not even when its key takes a higher one.
    let refused = check(
        &old,
        &[("a", 3, Active), ("c", 1, Retired), ("b", 4, Pending)],
    );
    assert!(matches!(
        refused,
        Err(Illegal::EpochReused { epoch: 1, .. })
    ));
}

#[test]
fn a_pending_key_cannot_retire_but_can_be_dropped() {
    let old = [("a", 3, Active), ("b", 4, Pending)];
    let refused = check(&old, &[("a", 5, Active), ("b", 4, Retired)]);
    assert!(matches!(refused, Err(Illegal::PendingToRetired { .. })));
    assert_eq!(check(&old, &[("a", 3, Active)]), Ok(()));
}

#[test]
fn the_active_key_neither_vanishes_nor_becomes_pending() {
    let old = [("a", 1, Active), ("b", 2, Pending)];
    let refused = check(&old, &[("b", 2, Active)]);
    assert!(matches!(refused, Err(Illegal::ActiveRemoved { .. })));
    let refused = check(&old, &[("a", 3, Pending), ("b", 2, Active)]);
    assert!(matches!(refused, Err(Illegal::ActiveToPending { .. })));
}

#[test]
fn a_former_key_returns_only_under_an_epoch_above_every_other() {
    let old = [("a", 1, Retired), ("b", 2, Active), ("c", 3, Pending)];
    for epoch in [1, 2, 3] {
        let refused = check(&old, &[("a", epoch, Active), ("b", 2, Retired)]);
        let used = matches!(refused, Err(Illegal::EpochReused { .. }));
        let low = matches!(refused, Err(Illegal::NotRaised { highest: 3, .. }));
        assert!(used || low, "epoch {epoch}: {refused:?}");
    }
    assert_eq!(check(&old, &[("a", 4, Active), ("b", 2, Retired)]), Ok(()));
    // By way of pending it is no different.
    let refused = check(
        &old,
        &[("b", 2, Active), ("a", 1, Pending), ("c", 3, Pending)],
    );
    assert!(matches!(refused, Err(Illegal::NotRaised { .. })));
}

#[test]
fn an_epoch_never_falls() {
    let refused = check(&[("a", 5, Active)], &[("a", 4, Active)]);
    assert!(matches!(
        refused,
        Err(Illegal::EpochLowered { old: 5, new: 4, .. })
    ));
}

#[test]
fn a_pending_key_below_what_was_active_cannot_be_activated() {
    // No single file says so (the reader refuses it); two readers of different versions might.
    let old = [("b", 2, Pending), ("a", 3, Active)];
    let refused = check(&old, &[("b", 2, Active), ("a", 3, Retired)]);
    assert!(matches!(
        refused,
        Err(Illegal::EpochPassed { highest: 3, .. })
    ));
}

#[test]
fn a_cluster_may_be_renamed_only_while_it_remembers_its_name() {
    let old = names("a", &["b"]);
    assert!(check_clusters(&old, &names("b", &[])).is_err());
    assert!(check_clusters(&old, &names("b", &["z"])).is_err());
    assert!(check_clusters(&old, &names("b", &["z", "a"])).is_ok());
    assert!(check_clusters(&old, &names("a", &["z"])).is_ok());
}

#[test]
fn a_cluster_may_be_renamed_only_to_a_name_that_is_accepted_already() {
    let renamed = names("b", &["a"]);
    assert_eq!(
        check_clusters(&names("a", &["z"]), &renamed),
        Err(Illegal::ClusterNotAnnounced { new: "b".into() })
    );
    assert_eq!(check_clusters(&names("a", &["z", "b"]), &renamed), Ok(()));
}

#[test]
fn every_refusal_has_a_hint_and_names_the_key() {
    let refusals = [
        check(&[("kek", 1, Active)], &[("new", 2, Active)]),
        check(
            &[("a", 1, Active)],
            &[("a", 1, Active), ("kek", 1, Pending)],
        ),
        check(&[("kek", 2, Active)], &[("kek", 1, Active)]),
        check(
            &[("kek", 1, Active)],
            &[("kek", 1, Active), ("a", 1, Retired)],
        ),
    ];
    for refusal in refusals {
        let illegal = refusal.expect_err("illegal");
        assert!(illegal.to_string().contains("object=kek"), "{illegal}");
        assert!(!illegal.hint().is_empty());
    }
}

/// A random configuration that one file may hold: retired below active below pending.
fn any_rules() -> impl Strategy<Value = Vec<KeyRule>> {
    let order = Just(vec!["a", "b", "c", "d"]).prop_shuffle();
    let epochs = proptest::collection::btree_set(1_u64..12, 4);
    (order, epochs, 1_usize..=4, 0_usize..4).prop_map(|(order, epochs, count, active)| {
        let active = active.min(count - 1);
        let epochs: Vec<u64> = epochs.into_iter().collect();
        (0..count)
            .map(|index| {
                let state = match index.cmp(&active) {
                    std::cmp::Ordering::Less => Retired,
                    std::cmp::Ordering::Equal => Active,
                    std::cmp::Ordering::Greater => Pending,
                };
                rule(order[index], epochs[index], state)
            })
            .collect()
    })
}

/// What an operator does to one key between two configurations.
#[derive(Debug, Clone)]
enum Edit {
    Set(&'static str, u64, KeyState),
    Remove(&'static str),
    /// Activates a key and retires the one that was active.
    Switch(&'static str, u64),
}

fn any_edit() -> impl Strategy<Value = Edit> {
    let key = prop::sample::select(vec!["a", "b", "c", "d"]);
    let state = prop::sample::select(vec![Pending, Active, Retired]);
    prop_oneof![
        (key.clone(), 1_u64..40, state)
            .prop_map(|(key, epoch, state)| Edit::Set(key, epoch, state)),
        key.clone().prop_map(Edit::Remove),
        (key, 1_u64..40).prop_map(|(key, epoch)| Edit::Switch(key, epoch)),
    ]
}

/// The running rules after the edits, if one file may hold them.
fn edited(running: &[KeyRule], edits: &[Edit]) -> Option<Vec<KeyRule>> {
    let mut rules = running.to_vec();
    for edit in edits {
        let (Edit::Set(key, ..) | Edit::Remove(key) | Edit::Switch(key, _)) = edit;
        rules.retain(|rule| rule.uri.object.as_deref() != Some(key));
        match edit {
            Edit::Set(key, epoch, state) => rules.push(rule(key, *epoch, *state)),
            Edit::Remove(_) => {}
            Edit::Switch(key, epoch) => {
                for other in rules.iter_mut().filter(|other| other.state == Active) {
                    other.state = Retired;
                }
                rules.push(rule(key, *epoch, Active));
            }
        }
    }
    rules.sort_by_key(|rule| rule.epoch);
    let distinct = rules.windows(2).all(|pair| pair[0].epoch != pair[1].epoch);
    let rank = |state| match state {
        Retired => 0,
        Active => 1,
        Pending => 2,
    };
    let ordered = rules
        .windows(2)
        .all(|pair| rank(pair[0].state) <= rank(pair[1].state));
    let one_active = rules.iter().filter(|rule| rule.state == Active).count() == 1;
    (distinct && ordered && one_active).then_some(rules)
}

fn active(rules: &[KeyRule]) -> (&Uri, u64) {
    let rule = rules.iter().find(|rule| rule.state == Active);
    let rule = rule.expect("one is active");
    (&rule.uri, rule.epoch)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_chain_of_legal_steps_breaks_an_invariant(
        first in any_rules(),
        steps in proptest::collection::vec(proptest::collection::vec(any_edit(), 1..3), 1..120)
    ) {
        let mut running = first;
        // Every (key, epoch) that sealed, in order; and whose each epoch of an active key was.
        let mut sealed_as = vec![active(&running).1];
        let mut owner: BTreeMap<u64, String> = BTreeMap::new();
        owner.insert(active(&running).1, active(&running).0.to_string());
        for edits in steps {
            let Some(new) = edited(&running, &edits) else {
                continue;
            };
            if check_keys(&running, &new).is_err() {
                continue;
            }
            let (old_uri, old_epoch) = active(&running);
            let (new_uri, new_epoch) = active(&new);
            // 1. A key_id never comes back: each change of the active pair takes a higher epoch.
            if (old_uri, old_epoch) != (new_uri, new_epoch) {
                prop_assert!(sealed_as.iter().all(|epoch| *epoch < new_epoch));
                sealed_as.push(new_epoch);
            }
            // 2. An epoch belongs to one key, over the whole chain for those that sealed.
            let owner = owner.entry(new_epoch).or_insert_with(|| new_uri.to_string());
            prop_assert_eq!(&*owner, &new_uri.to_string());
            for rule in &running {
                let taken = new.iter().any(|new| new.epoch == rule.epoch && new.uri != rule.uri);
                prop_assert!(!taken);
            }
            // 3. What sealed stays listed and opens.
            let kept = new.iter().find(|rule| &rule.uri == old_uri);
            prop_assert!(kept.is_some_and(|rule| rule.state != Pending));
            // 4. What seals was listed.
            prop_assert!(running.iter().any(|rule| &rule.uri == new_uri));
            running = new;
        }
    }

    #[test]
    fn every_configuration_may_follow_itself(rules in any_rules()) {
        prop_assert_eq!(check_keys(&rules, &rules), Ok(()));
    }

    #[test]
    fn no_chain_of_renamings_forgets_a_name_at_once(
        steps in proptest::collection::vec((0_usize..3, any::<[bool; 3]>()), 2..40)
    ) {
        const NAMES: [&str; 3] = ["a", "b", "c"];
        let mut running: Option<ClusterNames> = None;
        for (own, accepted) in steps {
            let accepted: Vec<&str> = (0..3).filter(|i| *i != own && accepted[*i]).map(|i| NAMES[i]).collect();
            let new = names(NAMES[own], &accepted);
            match &running {
                Some(old) if check_clusters(old, &new).is_err() => continue,
                Some(old) => {
                    let opens: BTreeSet<&String> = new.accepted.iter().chain([&new.own]).collect();
                    prop_assert!(opens.contains(&old.own));
                    // A node that still runs the old one opens what this one seals.
                    prop_assert!(old.own == new.own || old.accepted.contains(&new.own));
                }
                None => {}
            }
            running = Some(new);
        }
    }
}
