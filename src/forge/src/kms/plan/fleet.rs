//! What a change means for a fleet whose nodes learn it at different times: what must be true before
//! the first node takes it, how long to wait after the last, and what kube-apiserver would show if it
//! were not so.
//!
//! The waiting rule is Kubernetes' own (KEP-3299, key rotation): 3 minutes until a seed under the old
//! key_id may no longer be written with, N until every plugin reports the new one, and a margin M.

use hsm_config::Config;
use hsm_config::plan::Illegal;
use hsm_wire::identity::ClusterTag;
use serde::Serialize;

use super::changes::{Changes, active};

/// kube-apiserver goes on writing under a seed for at most this long after its last good Status.
const SEED_MINUTES: u32 = 3;

/// Minutes that the operator knows better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pace {
    /// N: from the last node's new file to its new `key_id` at its kube-apiserver.
    pub(crate) pick_up: u32,
    /// M.
    pub(crate) margin: u32,
}

impl Pace {
    /// 3 + N + M.
    pub(crate) fn wait(self) -> u32 {
        SEED_MINUTES + self.pick_up + self.margin
    }
}

/// What to do, and what goes wrong otherwise.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Guidance {
    /// In this order.
    pub(crate) steps: Vec<String>,
    /// After the last node has it, until nothing is written under the old `key_id`.
    pub(crate) wait_minutes: Option<u32>,
    /// The errors of a node that is not ready for this.
    pub(crate) foretold: Vec<Foretold>,
}

/// An error that has not happened yet.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Foretold {
    /// When it would.
    pub(crate) when: String,
    /// Of the daemon's answer to Decrypt.
    pub(crate) code: &'static str,
    /// Of the daemon's answer to Decrypt.
    pub(crate) message: String,
    /// What kube-apiserver's log and its answer to the client contain, seen of 1.34 and 1.37. What
    /// stands before it depends on version and request.
    pub(crate) kube_apiserver: String,
}

impl Foretold {
    /// `name` is the code as Go prints it.
    fn new(when: String, (code, name): (&'static str, &str), message: String) -> Self {
        let kube_apiserver =
            format!("failed to decrypt DEK, error: rpc error: code = {name} desc = {message}");
        Self {
            when,
            code,
            message,
            kube_apiserver,
        }
    }

    fn unknown_key(key: &str) -> Self {
        Self::new(
            format!("a node whose token does not hold {key} reads what another sealed under it"),
            ("NOT_FOUND", "NotFound"),
            "no token holds the key with fingerprint …".to_owned(),
        )
    }

    fn other_cluster(when: String, sealed_under: &str, own: &str) -> Self {
        let tag = ClusterTag::of(sealed_under);
        Self::new(
            when,
            ("FAILED_PRECONDITION", "FailedPrecondition"),
            format!(
                "the envelope was sealed for another cluster (tag {tag}), this one is `{own}`; if it is a former name of this cluster, add it to accept_clusters"
            ),
        )
    }
}

/// For a legal step.
pub(crate) fn guide(old: &Config, new: &Config, changes: &Changes, pace: Pace) -> Guidance {
    let mut steps = Vec::new();
    let mut foretold = Vec::new();
    let renamed = old.clusters.own != new.clusters.own;
    let activated: Vec<&str> = changes.which("activated").collect();
    let announced: Vec<&str> = changes
        .which("announced")
        .chain(changes.which("returned"))
        .collect();

    for key in &activated {
        steps.push(format!(
            "Before the first node takes it, every node has to list {key} (the old configuration does) and every node's token has to hold it: on each, `hsmctl kms keys` shows it without a problem, and on all of them with the same fingerprint."
        ));
        foretold.push(Foretold::unknown_key(key));
    }
    if renamed {
        let name = &new.clusters.own;
        steps.push(format!(
            "Before the first node takes it, every node has to accept `{name}` (the old configuration does)."
        ));
        foretold.push(Foretold::other_cluster(
            format!("a node that does not accept `{name}` reads what another sealed under it"),
            name,
            &old.clusters.own,
        ));
    }
    if changes.key_id_changes {
        steps.push(
            "Give it to one node after another, in any order. Old and new may run side by side for as long as it takes: each opens what the other seals, and they show different key_ids.".to_owned(),
        );
        steps.push(wait(pace));
        steps.push(
            "Rewrite every Secret by storage migration (a StorageVersionMigration for each encrypted resource, or `kubectl get secrets -A -o json | kubectl replace -f -`).".to_owned(),
        );
        steps.push(keep(old, new, changes, renamed));
    }
    for key in &announced {
        if !changes.key_id_changes {
            steps.push(
                "Any node may take it at any time: nothing is sealed under a pending key."
                    .to_owned(),
            );
        }
        steps.push(format!(
            "Before {key} can be activated, every node's token has to hold it: one key, generated once and cloned. `hsmctl kms keys` then shows it on every node, without a problem and with the same fingerprint."
        ));
    }
    for key in changes.which("forgotten") {
        steps.push(format!(
            "The rule for {key} may go at any time; the key itself has to stay in the HSM as long as any Secret, or any etcd snapshot that may be restored, was sealed under it. `hsmctl kms inspect` says so of a stored Secret, by fingerprint."
        ));
        foretold.push(Foretold::new(
            format!("{key} is deleted from the HSM too soon and what it sealed is read"),
            ("NOT_FOUND", "NotFound"),
            "no token holds the key with fingerprint …".to_owned(),
        ));
    }
    for name in new_names(old, new) {
        steps.push(format!(
            "Any node may take it at any time. Should `{name}` become the cluster's own name, every node has to accept it first."
        ));
    }
    for name in dropped_names(old, new) {
        steps.push(format!(
            "Before the first node takes it, every Secret that was sealed under `{name}` has to be rewritten, and no node may still seal under that name."
        ));
        foretold.push(Foretold::other_cluster(
            format!("something sealed under `{name}` is read after that"),
            name,
            &new.clusters.own,
        ));
    }
    Guidance {
        steps,
        wait_minutes: changes.key_id_changes.then(|| pace.wait()),
        foretold,
    }
}

/// What would come of a step that is refused, where that can be told.
pub(crate) fn foretell(
    old: &Config,
    new: &Config,
    changes: &Changes,
    illegal: &Illegal,
) -> Vec<Foretold> {
    match illegal {
        Illegal::NotAnnounced { key } => vec![Foretold::unknown_key(changes.name(key))],
        Illegal::ClusterForgotten { old: name, .. } => vec![Foretold::other_cluster(
            format!("a node that has taken it reads what was sealed under `{name}`"),
            name,
            &new.clusters.own,
        )],
        Illegal::ClusterNotAnnounced { new: name } => vec![Foretold::other_cluster(
            format!("a node that has not taken it yet reads what another sealed under `{name}`"),
            name,
            &old.clusters.own,
        )],
        _ => Vec::new(),
    }
}

fn wait(pace: Pace) -> String {
    let Pace { pick_up, margin } = pace;
    format!(
        "When the last node has taken it, wait 3 + N + M = {} minutes: 3 in which kube-apiserver may still write under a seed of the old key_id, N = {pick_up} until it asks the daemon again, M = {margin} to be safe. Every kube-apiserver's apiserver_envelope_encryption_key_id_hash_status_last_timestamp_seconds then shows the new key_id alone.",
        pace.wait()
    )
}

fn keep(old: &Config, new: &Config, changes: &Changes, renamed: bool) -> String {
    let old_key = active(old).map(|rule| &rule.uri);
    let new_key = active(new).map(|rule| &rule.uri);
    let mut kept = Vec::new();
    if let Some(key) = old_key
        && old_key != new_key
    {
        let name = changes.name(&key.to_string()).to_owned();
        kept.push(format!("{name} retired and in the HSM"));
    }
    if renamed {
        kept.push(format!("`{}` in accept_clusters", old.clusters.own));
    }
    if kept.is_empty() {
        return "The key stays the same, so whatever was not rewritten opens all the same."
            .to_owned();
    }
    format!(
        "Keep {} until that is proven, and as long as an etcd snapshot from before may be restored.",
        kept.join(", and ")
    )
}

fn new_names<'a>(old: &'a Config, new: &'a Config) -> impl Iterator<Item = &'a String> {
    let names = new.clusters.accepted.iter();
    names.filter(|name| **name != old.clusters.own && !old.clusters.accepted.contains(name))
}

fn dropped_names<'a>(old: &'a Config, new: &'a Config) -> impl Iterator<Item = &'a String> {
    let names = old.clusters.accepted.iter();
    names.filter(|name| **name != new.clusters.own && !new.clusters.accepted.contains(name))
}
