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

#[cfg(test)]
mod tests;
mod view;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

pub(crate) use hsm_config::{ClusterNames, KeyRule, KeyState};
use hsm_token_client::{Token, TokenError};
use hsm_wire::envelope::{self, EnvelopeError};
use hsm_wire::identity::{ClusterTag, FingerprintPrefix};
use hsm_wire::secret::Secret;
use hsm_wire::uri::Uri;
use tokio::time::Instant;

pub(crate) use view::{Active, KeyReport};
use view::{Memory, View};

/// Between looks for a key that an envelope names and no token was seen to hold. A look is some
/// operations for each key on the token; envelopes with made-up fingerprints must not cost more.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

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

/// Rules and tokens, joined.
pub(crate) struct Keyring {
    clusters: ClusterNames,
    cluster_tags: HashSet<ClusterTag>,
    rules: Vec<KeyRule>,
    tokens: Vec<NamedToken>,
    view: RwLock<Arc<View>>,
    memory: Mutex<Memory>,
    /// When an unknown key was last looked for. Held while looking: who comes meanwhile waits for the
    /// answer instead of asking again.
    looked: tokio::sync::Mutex<Option<Instant>>,
}

impl Keyring {
    /// Joins checked rules with running tokens. Call [`Self::refresh`] whenever a token changes.
    /// `before` is the keyring that this one replaces: what was learnt of the keys stays known.
    pub(crate) fn new(
        clusters: ClusterNames,
        rules: Vec<KeyRule>,
        tokens: Vec<NamedToken>,
        before: Option<&Self>,
    ) -> Arc<Self> {
        let memory = before.map_or_else(Memory::default, |keyring| lock(&keyring.memory).clone());
        let cluster_tags = std::iter::once(&clusters.own)
            .chain(&clusters.accepted)
            .map(|name| ClusterTag::of(name))
            .collect();
        let keyring = Arc::new(Self {
            clusters,
            cluster_tags,
            rules,
            tokens,
            view: RwLock::default(),
            memory: Mutex::new(memory),
            looked: tokio::sync::Mutex::default(),
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
        let view = View::look(
            &self.clusters.own,
            &self.rules,
            &self.tokens,
            &mut lock(&self.memory),
            Instant::now(),
        );
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
        lock(&self.memory).last_key_id.clone()
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
        let Active { holders, key_id } = self.active()?;
        let cluster = ClusterTag::of(&self.clusters.own);
        let mut away = None;
        for holder in &holders {
            let copy = Secret::copy_of(plaintext.expose());
            match holder.seal(cluster, &key_id, copy, deadline).await {
                Ok(envelope) => return Ok((envelope, key_id)),
                Err(error) if is_away(&error) => away = away.or(Some(error)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(away.map_or_else(nobody, KeyringError::from))
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
        let mut view = self.view();
        if !view.holders.contains_key(&header.key) {
            self.look_for(header.key, deadline).await;
            view = self.view();
        }
        let Some(holders) = view.holders.get(&header.key) else {
            return Err(if view.down.is_empty() {
                KeyringError::UnknownKey(header.key)
            } else {
                // A token that is away may hold it: that is an outage, not an unknown key.
                KeyringError::Unready(view.down.join("; "))
            });
        };
        let mut away = None;
        for holder in holders {
            match holder.open(header, sealed, key_id, deadline).await {
                Ok(plaintext) => {
                    return Ok(Opened {
                        plaintext,
                        listed: holder.listed,
                    });
                }
                Err(error) if is_away(&error) => away = away.or(Some(error)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(away.map_or_else(nobody, KeyringError::from))
    }

    /// A key may have been made, and another node may seal with it, since the tokens were looked at.
    async fn look_for(&self, key: FingerprintPrefix, deadline: Instant) {
        let Ok(mut looked) = tokio::time::timeout_at(deadline, self.looked.lock()).await else {
            return;
        };
        let recently = looked.is_some_and(|at| at.elapsed() < LOOK_AGAIN);
        if !recently && !self.view().holders.contains_key(&key) {
            self.look_again(deadline).await;
            *looked = Some(Instant::now());
        }
    }

    /// Asks every token that is up for its keys again: one may have been made since.
    pub(crate) async fn look_again(&self, deadline: Instant) {
        for named in &self.tokens {
            // A failure shows in the token's state, which the refresh below reads.
            let _ = named.token.refresh(deadline).await;
        }
        self.refresh();
    }

    /// Does a rule name a key that is not there, or not as it should be?
    pub(crate) fn lacks_a_key(&self) -> bool {
        let reports = &self.view().reports;
        reports
            .iter()
            .any(|report| report.uri.is_some() && report.problem.is_some())
    }

    /// A seal and unseal on each token that would serve if the first went: one that went unnoticed
    /// would be handed to, and away from again. What fails shows in the token's own state.
    pub(crate) async fn probe_standbys(&self, deadline: Instant) {
        let Ok(active) = self.active() else {
            return;
        };
        for holder in active.holders.iter().skip(1) {
            let _ = holder.probe(deadline).await;
        }
    }

    /// A real seal and unseal under the active key.
    pub(crate) async fn probe(&self, deadline: Instant) -> Result<(), KeyringError> {
        let mut away = None;
        for holder in &self.active()?.holders {
            match holder.probe(deadline).await {
                Ok(()) => return Ok(()),
                Err(error) if is_away(&error) => away = away.or(Some(error)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(away.map_or_else(nobody, KeyringError::from))
    }
}

/// The next token may do better: this one is away, lost, or has no time.
fn is_away(error: &TokenError) -> bool {
    match error {
        TokenError::Down { .. } | TokenError::Overloaded { .. } => true,
        TokenError::Fault { fault, .. } => fault.kind.is_token_lost() || fault.kind.is_latched(),
        TokenError::Deadline { .. } => false,
    }
}

fn nobody() -> KeyringError {
    KeyringError::Unready("no token holds the key any more".to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
