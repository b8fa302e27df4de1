//! The keyring: which key on which token seals, which ones still open, and why not.
//!
//! It joins two things that change at different times: the **rules** of the configuration and what
//! the **tokens** were last seen to hold. Faces ask it; it asks `hsm-token-client`. It knows no
//! protocol and no configuration file.
//!
//! **Invariant:** Encrypt and Status use one [`Active`] value from one view, so the `key_id` they
//! report can never differ.
//! **Invariant:** opening needs no rule: a key is found by the fingerprint in the envelope, so a lost
//! or rewritten configuration strands nothing while a token holds the key.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

pub(crate) use hsm_config::{ClusterNames, KeyRule, KeyState};
use hsm_token_client::{State, Token, TokenError};
use hsm_wire::envelope::{self, EnvelopeError, Header, Wrap};
use hsm_wire::host::{KeyInfo, KeyRef};
use hsm_wire::identity::{self, ClusterTag, FingerprintPrefix};
use hsm_wire::secret::Secret;
use hsm_wire::uri::Uri;
use tokio::time::Instant;

/// A configured token, running.
#[derive(Clone)]
pub(crate) struct NamedToken {
    /// Name in the configuration.
    pub(crate) name: String,
    /// Its URI.
    pub(crate) uri: Uri,
    /// The handle.
    pub(crate) token: Token,
}

/// The key that seals now.
#[derive(Clone)]
pub(crate) struct Active {
    token: Token,
    key: KeyRef,
    wrap: Wrap,
    /// What Status and Encrypt report.
    pub(crate) key_id: String,
}

/// A key that rule or token shows, for health and status.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct KeyReport {
    pub(crate) uri: Option<String>,
    pub(crate) label: String,
    pub(crate) fingerprint: Option<String>,
    pub(crate) state: &'static str,
    pub(crate) epoch: Option<u64>,
    pub(crate) key_id: Option<String>,
    pub(crate) backup: &'static str,
    pub(crate) token: Option<String>,
    pub(crate) mechanism: Option<&'static str>,
    pub(crate) problem: Option<String>,
}

/// Why the keyring did not do it.
#[derive(Debug, thiserror::Error, Clone)]
pub(crate) enum KeyringError {
    /// Nothing can seal (or nothing is known) at the moment.
    #[error("{0}")]
    Unready(String),
    /// The bytes are no envelope of ours.
    #[error("the ciphertext is no envelope of this plugin")]
    Malformed(#[source] EnvelopeError),
    /// The envelope belongs to another cluster.
    #[error(
        "the envelope was sealed for another cluster (tag {tag}), this one is `{own}`; if it is a former name of this cluster, add it to accept_clusters"
    )]
    OtherCluster {
        /// From the header.
        tag: ClusterTag,
        /// Our name.
        own: String,
    },
    /// No token holds the key.
    #[error("no token holds the key with fingerprint {0}")]
    UnknownKey(FingerprintPrefix),
    /// The token or its host.
    #[error(transparent)]
    Token(#[from] Arc<TokenError>),
}

impl From<EnvelopeError> for KeyringError {
    fn from(error: EnvelopeError) -> Self {
        Self::Malformed(error)
    }
}

impl From<TokenError> for KeyringError {
    fn from(error: TokenError) -> Self {
        Self::Token(Arc::new(error))
    }
}

/// A plaintext, and whether a rule lists the key that opened it.
pub(crate) struct Opened {
    pub(crate) plaintext: Secret,
    pub(crate) listed: bool,
}

struct Holder {
    token: Token,
    key: KeyRef,
    listed: bool,
}

/// What can be done at this moment. Replaced as a whole when a token changes.
struct View {
    active: Result<Active, String>,
    holders: HashMap<FingerprintPrefix, Vec<Holder>>,
    /// Reasons why tokens that may hold further keys are not up.
    down: Vec<String>,
    reports: Vec<KeyReport>,
}

/// Rules and tokens, joined.
pub(crate) struct Keyring {
    clusters: ClusterNames,
    cluster_tags: HashSet<ClusterTag>,
    rules: Vec<KeyRule>,
    tokens: Vec<NamedToken>,
    view: RwLock<Arc<View>>,
    /// The last active `key_id` that a token confirmed; what `coast` goes on reporting.
    last_key_id: Mutex<Option<String>>,
}

impl Keyring {
    /// Joins checked rules with running tokens. Call [`Self::refresh`] whenever a token changes.
    pub(crate) fn new(
        clusters: ClusterNames,
        rules: Vec<KeyRule>,
        tokens: Vec<NamedToken>,
    ) -> Arc<Self> {
        let cluster_tags = std::iter::once(&clusters.own)
            .chain(&clusters.accepted)
            .map(|name| ClusterTag::of(name))
            .collect();
        let view = RwLock::new(Arc::new(View {
            active: Err("the tokens have not been looked at yet".to_owned()),
            holders: HashMap::new(),
            down: Vec::new(),
            reports: Vec::new(),
        }));
        let keyring = Arc::new(Self {
            clusters,
            cluster_tags,
            rules,
            tokens,
            view,
            last_key_id: Mutex::new(None),
        });
        keyring.refresh();
        keyring
    }

    /// The tokens, in the configured order.
    pub(crate) fn tokens(&self) -> &[NamedToken] {
        &self.tokens
    }

    /// Looks at the tokens' present state. Cheap: no token is asked anything.
    pub(crate) fn refresh(&self) {
        let view = self.look();
        if let Ok(active) = &view.active {
            *lock(&self.last_key_id) = Some(active.key_id.clone());
        }
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The key that seals now, or why none does.
    pub(crate) fn active(&self) -> Result<Active, KeyringError> {
        self.view().active.clone().map_err(KeyringError::Unready)
    }

    /// The last `key_id` that was in force, also while its token is away.
    pub(crate) fn last_key_id(&self) -> Option<String> {
        lock(&self.last_key_id).clone()
    }

    /// Every key that a rule names or a token holds.
    pub(crate) fn reports(&self) -> Vec<KeyReport> {
        self.view().reports.clone()
    }

    /// Seals under the active key. Returns envelope and `key_id`.
    pub(crate) async fn seal(
        &self,
        plaintext: Secret,
        deadline: Instant,
    ) -> Result<(Vec<u8>, String), KeyringError> {
        let Active {
            token,
            key,
            wrap,
            key_id,
        } = self.active()?;
        let header = Header {
            wrap,
            key: key.fingerprint.prefix(),
            cluster: ClusterTag::of(&self.clusters.own),
            // The face has checked it against MAX_PLAINTEXT_LEN.
            plaintext_len: plaintext.len() as u32,
        };
        let sealed = token
            .seal(&key, wrap, header.aad(&key_id), plaintext, deadline)
            .await?;
        Ok((envelope::join(header, &sealed), key_id))
    }

    /// Opens an envelope that the API server keeps beside `key_id`.
    pub(crate) async fn open(
        &self,
        envelope: &[u8],
        key_id: &str,
        deadline: Instant,
    ) -> Result<Opened, KeyringError> {
        let (header, sealed) = envelope::split(envelope)?;
        if !self.cluster_tags.contains(&header.cluster) {
            return Err(KeyringError::OtherCluster {
                tag: header.cluster,
                own: self.clusters.own.clone(),
            });
        }
        let view = self.view();
        let Some(holders) = view.holders.get(&header.key) else {
            return Err(if view.down.is_empty() {
                KeyringError::UnknownKey(header.key)
            } else {
                // A token that is away may hold it: that is an outage, not an unknown key.
                KeyringError::Unready(view.down.join("; "))
            });
        };
        let mut last = None;
        // In the configured order; the next token is asked only when the one before is away.
        for holder in holders {
            let opened = holder
                .token
                .unseal(
                    &holder.key,
                    header.wrap,
                    header.aad(key_id),
                    sealed.to_vec(),
                    header.plaintext_len,
                    deadline,
                )
                .await;
            match opened {
                Ok(plaintext) => {
                    return Ok(Opened {
                        plaintext,
                        listed: holder.listed,
                    });
                }
                Err(error @ TokenError::Down { .. }) => last = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        Err(match last {
            Some(error) => error.into(),
            None => KeyringError::UnknownKey(header.key),
        })
    }

    /// Asks every token that is up for its keys again: one may have been made since.
    pub(crate) async fn look_again(&self, deadline: Instant) {
        for named in &self.tokens {
            // A failure shows in the token's state, which the refresh below reads.
            let _ = named.token.refresh(deadline).await;
        }
        self.refresh();
    }

    /// A real seal and unseal under the active key.
    pub(crate) async fn probe(&self, deadline: Instant) -> Result<(), KeyringError> {
        let Active {
            token, key, wrap, ..
        } = self.active()?;
        Ok(token.probe(&key, wrap, deadline).await?)
    }

    fn look(&self) -> View {
        let mut view = View {
            active: Err("no key is active in the configuration".to_owned()),
            holders: HashMap::new(),
            down: Vec::new(),
            reports: Vec::new(),
        };
        let states: Vec<(&NamedToken, State)> = self
            .tokens
            .iter()
            .map(|named| (named, named.token.state().borrow().clone()))
            .collect();
        for (named, state) in &states {
            match state {
                State::Up { description, .. } => {
                    for info in &description.keys {
                        let listed = self
                            .rules
                            .iter()
                            .any(|rule| matches(rule, named, state, info));
                        view.holders
                            .entry(info.key.fingerprint.prefix())
                            .or_default()
                            .push(Holder {
                                token: named.token.clone(),
                                key: info.key.clone(),
                                listed,
                            });
                        if !listed {
                            view.reports.push(unlisted(named, info));
                        }
                    }
                }
                other => view.down.push(why_not_up(&named.name, other)),
            }
        }
        for rule in &self.rules {
            let found = self.find(rule, &states);
            view.reports.push(self.report(rule, &found));
            if rule.state == KeyState::Active {
                view.active = found.and_then(|(named, info)| {
                    let wrap = usable(info)?;
                    Ok(Active {
                        token: named.token.clone(),
                        key: info.key.clone(),
                        wrap,
                        key_id: self.key_id(rule, info),
                    })
                });
            }
        }
        view
    }

    fn key_id(&self, rule: &KeyRule, info: &KeyInfo) -> String {
        identity::key_id(&info.key.fingerprint, rule.epoch, &self.clusters.own)
    }

    /// The one key a rule names, on the first token that is up.
    fn find<'a>(
        &self,
        rule: &KeyRule,
        states: &'a [(&'a NamedToken, State)],
    ) -> Result<(&'a NamedToken, &'a KeyInfo), String> {
        let mut seen = Vec::new();
        let mut away = Vec::new();
        for (named, state) in states {
            let State::Up { description, .. } = state else {
                away.push(why_not_up(&named.name, state));
                continue;
            };
            let mut found = description
                .keys
                .iter()
                .filter(|info| matches(rule, named, state, info));
            match (found.next(), found.count()) {
                (Some(info), 0) => return Ok((named, info)),
                (Some(_), more) => {
                    return Err(format!(
                        "{} matches {} keys on token `{}`; add `id=` to the URI so that it names exactly one",
                        rule.uri,
                        more + 1,
                        named.name
                    ));
                }
                (None, _) => seen.push(labels(&named.name, &description.keys)),
            }
        }
        // A token that is away is the better reason: the key is probably there.
        Err(if away.is_empty() {
            format!("no key matches {}: {}", rule.uri, seen.join("; "))
        } else {
            away.join("; ")
        })
    }

    fn report(&self, rule: &KeyRule, found: &Result<(&NamedToken, &KeyInfo), String>) -> KeyReport {
        let info = found.as_ref().ok();
        KeyReport {
            uri: Some(rule.uri.to_string()),
            label: rule.uri.object.clone().unwrap_or_default(),
            fingerprint: info.map(|(_, info)| info.key.fingerprint.prefix().to_string()),
            state: rule.state.name(),
            epoch: Some(rule.epoch),
            key_id: info.map(|(_, info)| self.key_id(rule, info)),
            backup: if rule.backup_acknowledged {
                "acknowledged"
            } else {
                "not acknowledged"
            },
            token: info.map(|(named, _)| named.name.clone()),
            mechanism: info.and_then(|(_, info)| mechanism_name(info)),
            problem: match found {
                Ok((_, info)) => usable(info).err(),
                Err(reason) => Some(reason.clone()),
            },
        }
    }
}

fn unlisted(named: &NamedToken, info: &KeyInfo) -> KeyReport {
    KeyReport {
        uri: None,
        label: info.key.label.clone(),
        fingerprint: Some(info.key.fingerprint.prefix().to_string()),
        state: "unlisted",
        epoch: None,
        key_id: None,
        backup: "unknown",
        token: Some(named.name.clone()),
        mechanism: mechanism_name(info),
        problem: None,
    }
}

fn mechanism_name(info: &KeyInfo) -> Option<&'static str> {
    use hsm_wire::envelope::Mechanism;
    info.wrap.as_ref().ok().map(|wrap| match wrap.mechanism {
        Mechanism::AesGcm => "AES-GCM",
        Mechanism::AesKwp => "AES-KWP",
        Mechanism::AesCbcHmac => "AES-CBC-PAD + HMAC",
        Mechanism::RsaOaepHmac => "RSA-OAEP + HMAC",
    })
}

fn matches(rule: &KeyRule, named: &NamedToken, state: &State, info: &KeyInfo) -> bool {
    let State::Up { description, .. } = state else {
        return false;
    };
    // The slot is the token's business: a key's URI may repeat the token's `slot-id`.
    (rule.uri.slot_id.is_none() || rule.uri.slot_id == named.uri.slot_id)
        && rule.uri.matches_token(&description.token, None)
        && rule.uri.matches_secret_key(&info.key.label, &info.key.id)
}

/// A KEK must never have been readable outside the HSM, and must have a wrap that works.
fn usable(info: &KeyInfo) -> Result<Wrap, String> {
    let label = &info.key.label;
    if !info.sensitive {
        return Err(format!(
            "key `{label}` is not CKA_SENSITIVE: its value can be read; generate a new one"
        ));
    }
    if info.extractable {
        return Err(format!(
            "key `{label}` is CKA_EXTRACTABLE; generate a new one that is not"
        ));
    }
    if !info.never_extractable {
        return Err(format!(
            "key `{label}` is not CKA_NEVER_EXTRACTABLE: it was imported or once extractable; generate it inside the HSM"
        ));
    }
    info.wrap
        .as_ref()
        .copied()
        .map_err(|reason| format!("key `{label}` cannot wrap: {reason}"))
}

fn labels(token: &str, keys: &[KeyInfo]) -> String {
    if keys.is_empty() {
        return format!("token `{token}` holds no AES key");
    }
    let labels: Vec<_> = keys
        .iter()
        .map(|info| format!("`{}`", info.key.label))
        .collect();
    format!("token `{token}` holds {}", labels.join(", "))
}

fn why_not_up(name: &str, state: &State) -> String {
    match state {
        State::Starting => format!("token `{name}` is starting"),
        State::Up { .. } => format!("token `{name}` is up"),
        State::Down { reason, .. } => format!("token `{name}` is down: {reason}"),
        State::Latched { reason, .. } => format!("token `{name}` is latched: {reason}"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
