//! What differs between two configurations, in words. Pure; says nothing about whether it may.

use hsm_config::{Config, KeyRule, KeyState, Token};
use serde::Serialize;

/// Everything that differs.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Changes {
    /// Every key of either configuration, in the new one's order; those that stay as they are, too.
    pub(crate) keys: Vec<KeyChange>,
    /// Names.
    pub(crate) clusters: Vec<Change>,
    /// Tokens that are added, removed or changed.
    pub(crate) tokens: Vec<Change>,
    /// Fields that have nothing to do with keys.
    pub(crate) also: Vec<&'static str>,
    /// Seals under another key, epoch or name, and so reports another `key_id`.
    pub(crate) key_id_changes: bool,
}

/// One thing and what becomes of it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Change {
    pub(crate) name: String,
    pub(crate) words: String,
}

/// What becomes of a key.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct KeyChange {
    pub(crate) uri: String,
    /// For sentences: the label in backquotes where it tells the key from the others, else the URI.
    #[serde(skip)]
    pub(crate) name: String,
    pub(crate) change: &'static str,
    pub(crate) before: Option<Standing>,
    pub(crate) after: Option<Standing>,
    pub(crate) words: &'static str,
}

/// Where a key stands in one configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Standing {
    #[serde(serialize_with = "by_name")]
    pub(crate) state: KeyState,
    pub(crate) epoch: u64,
    pub(crate) backup_acknowledged: bool,
}

fn by_name<S: serde::Serializer>(state: &KeyState, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(state.name())
}

impl Changes {
    /// From one to the other.
    pub(crate) fn between(old: &Config, new: &Config) -> Self {
        let active = |config: &Config| {
            let active = active(config)?;
            Some((
                active.uri.clone(),
                active.epoch,
                config.clusters.own.clone(),
            ))
        };
        Self {
            keys: keys(&old.kms.keys, &new.kms.keys),
            clusters: clusters(old, new),
            tokens: tokens(&old.tokens, &new.tokens),
            also: also(old, new),
            key_id_changes: active(old) != active(new),
        }
    }

    /// Do both say the same?
    pub(crate) fn is_empty(&self) -> bool {
        let still = self.keys.iter().all(|key| key.before == key.after);
        still && self.clusters.is_empty() && self.tokens.is_empty() && self.also.is_empty()
    }

    /// The names of keys that changed so.
    pub(crate) fn which<'a>(&'a self, change: &'a str) -> impl Iterator<Item = &'a str> {
        let keys = self.keys.iter().filter(move |key| key.change == change);
        keys.map(|key| key.name.as_str())
    }

    /// The name of the key with this URI.
    pub(crate) fn name<'a>(&'a self, uri: &'a str) -> &'a str {
        let found = self.keys.iter().find(|key| key.uri == uri);
        found.map_or(uri, |key| key.name.as_str())
    }
}

/// The rule that seals. The reader lets no configuration pass without one.
pub(crate) fn active(config: &Config) -> Option<&KeyRule> {
    let mut rules = config.kms.keys.iter();
    rules.find(|rule| rule.state == KeyState::Active)
}

fn keys(old: &[KeyRule], new: &[KeyRule]) -> Vec<KeyChange> {
    let standing = |rule: &KeyRule| Standing {
        state: rule.state,
        epoch: rule.epoch,
        backup_acknowledged: rule.backup_acknowledged,
    };
    let gone = old
        .iter()
        .filter(|rule| new.iter().all(|other| other.uri != rule.uri));
    let rules: Vec<&KeyRule> = new.iter().chain(gone).collect();
    let labels = |label: &String| {
        let labels = rules.iter().filter_map(|rule| rule.uri.object.as_ref());
        labels.filter(|other| *other == label).count()
    };
    rules
        .iter()
        .map(|rule| {
            let in_one = |rules: &[KeyRule]| {
                let found = rules.iter().find(|other| other.uri == rule.uri);
                found.map(standing)
            };
            let (before, after) = (in_one(old), in_one(new));
            let (change, words) = words(before, after);
            KeyChange {
                uri: rule.uri.to_string(),
                name: match &rule.uri.object {
                    Some(label) if labels(label) == 1 => format!("`{label}`"),
                    _ => rule.uri.to_string(),
                },
                change,
                before,
                after,
                words,
            }
        })
        .collect()
}

/// A name for programs, and a sentence for people.
fn words(before: Option<Standing>, after: Option<Standing>) -> (&'static str, &'static str) {
    use KeyState::{Active, Pending, Retired};
    let same_epoch = before.map(|key| key.epoch) == after.map(|key| key.epoch);
    let same_backup =
        before.map(|key| key.backup_acknowledged) == after.map(|key| key.backup_acknowledged);
    match (before.map(|key| key.state), after.map(|key| key.state)) {
        (None, Some(Pending)) => ("announced", "opens from now on, does not seal yet"),
        (None, Some(Active)) => ("activated", "seals at once, without having been announced"),
        (None, Some(Retired)) => ("added", "opens what it sealed before, here or elsewhere"),
        (Some(Pending), Some(Active)) => ("activated", "begins to seal"),
        (Some(Retired), Some(Active)) => ("activated", "seals again, under a new epoch"),
        (Some(Active), Some(Retired)) => {
            ("retired", "stops sealing, goes on opening what it sealed")
        }
        (Some(Pending), Some(Retired)) => ("retired", "retires without having sealed anything"),
        (Some(Retired), Some(Pending)) => ("returned", "is announced anew, to seal again later"),
        (Some(Active), Some(Pending)) => ("suspended", "stops sealing, as if it had never begun"),
        (Some(Pending), None) => ("withdrawn", "has sealed nothing here"),
        (Some(Retired), None) => (
            "forgotten",
            "still opens while a token holds it, and is counted as unlisted",
        ),
        (Some(Active), None) => ("removed", "would be forgotten while it seals"),
        (Some(Active), Some(Active)) if !same_epoch => (
            "renewed",
            "goes on sealing, under a new key_id: kube-apiserver takes a new seed and rewrites what it writes",
        ),
        (Some(Pending), Some(Pending)) if !same_epoch => (
            "renumbered",
            "will seal under another epoch than was announced",
        ),
        (Some(Retired), Some(Retired)) if !same_epoch => (
            "renumbered",
            "has another epoch, which means nothing for a key that does not seal",
        ),
        (Some(_), Some(_)) if !same_backup => {
            ("unchanged", "unchanged, but for what is said of its backup")
        }
        (Some(Active), Some(Active)) => ("unchanged", "unchanged: seals and opens"),
        (Some(Pending), Some(Pending)) => ("unchanged", "unchanged: opens, does not seal yet"),
        (Some(Retired), Some(Retired)) => ("unchanged", "unchanged: opens what it sealed before"),
        // A key is here because one of the two lists it.
        (None, None) => ("unchanged", "unchanged"),
    }
}

fn clusters(old: &Config, new: &Config) -> Vec<Change> {
    let (before, after) = (&old.clusters, &new.clusters);
    let mut changes = Vec::new();
    let mut change = |name: &str, words: &str| {
        changes.push(Change {
            name: name.to_owned(),
            words: words.to_owned(),
        });
    };
    let opens_after = |name: &String| *name == after.own || after.accepted.contains(name);
    let opened_before = |name: &String| *name == before.own || before.accepted.contains(name);
    if before.own != after.own {
        change(
            &after.own,
            "is the cluster's name from now on: new Secrets are sealed under it",
        );
    }
    for name in [&before.own].into_iter().chain(&before.accepted) {
        if !opens_after(name) {
            change(
                name,
                "is no longer accepted: what was sealed under this name no longer opens",
            );
        } else if *name == before.own && before.own != after.own {
            change(
                name,
                "is a former name from now on: what was sealed under it still opens",
            );
        }
    }
    for name in &after.accepted {
        if !opened_before(name) {
            change(
                name,
                "is accepted from now on: what was sealed under this name opens",
            );
        }
    }
    changes
}

fn tokens(old: &[Token], new: &[Token]) -> Vec<Change> {
    let find = |tokens: &[Token], name: &str| tokens.iter().position(|token| token.name == name);
    let mut changes = Vec::new();
    let mut change = |name: &str, words: String| {
        changes.push(Change {
            name: name.to_owned(),
            words,
        });
    };
    for token in new {
        match find(old, &token.name).map(|index| &old[index]) {
            None => change(&token.name, "is added".to_owned()),
            Some(before) if before != token => change(
                &token.name,
                format!(
                    "changes ({}): its module host starts anew",
                    fields(before, token)
                ),
            ),
            Some(_) => {}
        }
    }
    for token in old {
        if find(new, &token.name).is_none() {
            change(
                &token.name,
                "is removed: what only this token's keys open no longer opens here".to_owned(),
            );
        }
    }
    let order = |tokens: &[Token], others: &[Token]| -> Vec<String> {
        let both = tokens
            .iter()
            .filter(|token| find(others, &token.name).is_some());
        both.map(|token| token.name.clone()).collect()
    };
    if order(old, new) != order(new, old) {
        let names: Vec<&str> = new.iter().map(|token| token.name.as_str()).collect();
        change(
            "order",
            format!("keys are looked for on {}", names.join(", then ")),
        );
    }
    changes
}

/// Names only: a value may be a secret's place.
fn fields(before: &Token, after: &Token) -> String {
    let fields = [
        ("uri", before.uri != after.uri),
        ("module", before.module != after.module),
        ("pin", before.pin.source != after.pin.source),
        (
            "pin.generation",
            before.pin.generation != after.pin.generation,
        ),
        ("sessions", before.sessions != after.sessions),
        ("call_timeout", before.call_timeout != after.call_timeout),
        ("host", before.launch != after.launch),
    ];
    let changed = fields.iter().filter(|(_, changed)| *changed);
    let names: Vec<&str> = changed.map(|(name, _)| *name).collect();
    names.join(", ")
}

fn also(old: &Config, new: &Config) -> Vec<&'static str> {
    [
        ("kms.listen", old.kms.listen != new.kms.listen),
        (
            "kms.when_hsm_is_lost",
            old.kms.when_lost != new.kms.when_lost,
        ),
        ("kms.peers", old.kms.peers != new.kms.peers),
        ("state_dirs", old.state_dirs != new.state_dirs),
        ("health", old.health_listen != new.health_listen),
    ]
    .into_iter()
    .filter_map(|(name, changed)| changed.then_some(name))
    .collect()
}
