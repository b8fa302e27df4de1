//! The parts of the daemon's `/status` that are about keys.
//!
//! Daemon and tool may be of different versions, so what is missing has a default and what is new is
//! kept for `-o json`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The page.
#[derive(Debug, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    #[serde(default)]
    pub(crate) configuration: Configuration,
    pub(crate) kms: Kms,
    #[serde(default)]
    pub(crate) keys: Vec<Key>,
    #[serde(default)]
    pub(crate) tokens: Vec<Token>,
}

/// How its configuration stands.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Configuration {
    #[serde(default)]
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) file: String,
    pub(crate) rejected: Option<String>,
}

/// How the face stands.
#[derive(Debug, Deserialize)]
pub(crate) struct Kms {
    pub(crate) ready: bool,
    pub(crate) reason: Option<String>,
    pub(crate) key_id: Option<String>,
}

/// A token.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Token {
    pub(crate) name: String,
    pub(crate) state: String,
    pub(crate) reason: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A key that a rule names or a token holds.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Key {
    pub(crate) uri: Option<String>,
    #[serde(default)]
    pub(crate) label: String,
    pub(crate) fingerprint: Option<String>,
    pub(crate) state: String,
    pub(crate) epoch: Option<u64>,
    pub(crate) key_id: Option<String>,
    #[serde(default)]
    pub(crate) backup: String,
    pub(crate) token: Option<String>,
    pub(crate) mechanism: Option<String>,
    #[serde(default)]
    pub(crate) passed_over: Vec<PassedOver>,
    pub(crate) problem: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A better mechanism, and why the token does not use it.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct PassedOver {
    pub(crate) mechanism: String,
    pub(crate) reason: String,
}

impl Status {
    /// The page's text. By way of an object: a derived reader would take a list for one, too.
    pub(crate) fn read(page: &[u8]) -> serde_json::Result<Self> {
        let fields: Map<String, Value> = serde_json::from_slice(page)?;
        serde_json::from_value(Value::Object(fields))
    }
}

impl Key {
    /// What its state lets it do.
    pub(crate) fn meaning(&self) -> &'static str {
        match self.state.as_str() {
            "active" => "seals and opens",
            "pending" => "opens, does not seal yet",
            "retired" => "opens what it sealed before",
            "unlisted" => "on the token, and no rule names it: opens, and is counted",
            _ => "of a state that this hsmctl does not know",
        }
    }

    /// Which envelopes need it, by what `hsmctl kms inspect` shows of them.
    pub(crate) fn needed_by(&self) -> Option<String> {
        let fingerprint = self.fingerprint.as_deref()?;
        let key_id = self.key_id.as_deref();
        Some(match (self.state.as_str(), key_id) {
            ("active", Some(key_id)) => format!(
                "envelopes with fingerprint {fingerprint}; objects that are written now show key_id {key_id}"
            ),
            ("pending", _) => format!(
                "envelopes with fingerprint {fingerprint}: none before a node has it active"
            ),
            ("retired", Some(key_id)) => format!(
                "envelopes with fingerprint {fingerprint}; the last objects written under it show key_id {key_id}"
            ),
            _ => format!("envelopes with fingerprint {fingerprint}"),
        })
    }
}
