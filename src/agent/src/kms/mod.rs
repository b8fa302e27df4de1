//! The KMS v2 face: kube-apiserver's `KeyManagementService` over the keyring.
//!
//! | module | what it does |
//! |---|---|
//! | [`service`] | gRPC: routes, deadlines, the three methods |
//! | [`messages`] | the protobuf of requests and answers |
//! | [`flight`] | identical Decrypts in flight share one operation |
//! | [`prober`] | the background seal and unseal that Status reports |
//!
//! **Invariant:** Status never waits for the HSM; it reports what the prober found.
//! **Invariant:** nothing here can be lost: an envelope opens with the key, the cluster's name and
//! the `key_id` that the API server keeps beside it.

mod flight;
mod messages;
mod prober;
mod service;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

pub(crate) use hsm_config::WhenLost;
use hsm_wire::secret::Secret;
use tokio::sync::Notify;

use crate::keyring::{Keyring, KeyringError, Opened};
pub(crate) use prober::run as probe;
pub(crate) use service::serve;

/// The KMS API this face speaks; kube-apiserver compares it with "v2".
pub(crate) const API_VERSION: &str = "v2";

/// What the face can work with at the moment.
enum Plane {
    /// No configuration, or a broken one: why.
    Unready(String),
    Ready {
        keyring: Arc<Keyring>,
        when_lost: WhenLost,
    },
}

/// Health as Status, readiness and the status page show it: one answer for all.
#[derive(Debug, Clone)]
pub(crate) struct Health {
    /// Ready, or why not.
    pub(crate) outcome: Result<(), String>,
    /// Since when it has been ready, or not ready.
    pub(crate) since: SystemTime,
}

/// What the face counted since the process began.
#[derive(Default)]
pub(crate) struct Counters {
    status: AtomicU64,
    encrypt_ok: AtomicU64,
    encrypt_failed: AtomicU64,
    decrypt_ok: AtomicU64,
    decrypt_failed: AtomicU64,
    decrypt_shared: AtomicU64,
    decrypt_unlisted: AtomicU64,
    peers_refused: Mutex<BTreeMap<&'static str, u64>>,
}

impl Counters {
    /// A peer was turned away, for the reason with this label.
    pub(crate) fn refuse_peer(&self, label: &'static str) {
        *self
            .peers_refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(label)
            .or_default() += 1;
    }

    /// All of them, by name.
    pub(crate) fn report(&self) -> serde_json::Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        serde_json::json!({
            "status": read(&self.status),
            "encrypt_ok": read(&self.encrypt_ok),
            "encrypt_failed": read(&self.encrypt_failed),
            "decrypt_ok": read(&self.decrypt_ok),
            "decrypt_failed": read(&self.decrypt_failed),
            "decrypt_shared": read(&self.decrypt_shared),
            "decrypt_unlisted": read(&self.decrypt_unlisted),
            "peers_refused": *self.peers_refused.lock().unwrap_or_else(PoisonError::into_inner),
        })
    }
}

/// An opened envelope or the reason why not, as callers in one flight share it.
type SharedOpening = Result<(Arc<Secret>, bool), KeyringError>;

/// The face. One per process, whatever sockets lead to it.
pub(crate) struct Face {
    plane: RwLock<Plane>,
    pulse: Mutex<prober::Pulse>,
    last_health: Mutex<Health>,
    flights: flight::Flights<(Vec<u8>, String), SharedOpening>,
    /// Wakes the prober: keyring or a token changed.
    changed: Notify,
    /// What happened.
    pub(crate) counters: Counters,
}

impl Face {
    /// A face that answers from now on, and says why it cannot do more.
    pub(crate) fn new(why_unready: &str) -> Arc<Self> {
        Arc::new(Self {
            plane: RwLock::new(Plane::Unready(why_unready.to_owned())),
            pulse: Mutex::default(),
            last_health: Mutex::new(Health {
                outcome: Err(why_unready.to_owned()),
                since: SystemTime::now(),
            }),
            flights: flight::Flights::default(),
            changed: Notify::new(),
            counters: Counters::default(),
        })
    }

    /// Takes over a keyring. Requests under way end on the one they began with.
    pub(crate) fn use_keyring(&self, keyring: Arc<Keyring>, when_lost: WhenLost) {
        self.replace(Plane::Ready { keyring, when_lost });
    }

    /// Goes on answering, but only with the reason.
    pub(crate) fn unready(&self, why: &str) {
        self.replace(Plane::Unready(why.to_owned()));
    }

    fn replace(&self, plane: Plane) {
        *self.plane.write().unwrap_or_else(PoisonError::into_inner) = plane;
        // A finding about the former keyring says nothing of this one.
        *self.pulse() = prober::Pulse::default();
        self.changed.notify_one();
    }

    /// A token came, went or changed.
    pub(crate) fn tokens_changed(&self) {
        self.changed.notify_one();
    }

    /// The keyring in use.
    pub(crate) fn keyring(&self) -> Result<Arc<Keyring>, String> {
        match &*self.plane.read().unwrap_or_else(PoisonError::into_inner) {
            Plane::Ready { keyring, .. } => Ok(Arc::clone(keyring)),
            Plane::Unready(why) => Err(why.clone()),
        }
    }

    fn when_lost(&self) -> WhenLost {
        match &*self.plane.read().unwrap_or_else(PoisonError::into_inner) {
            Plane::Ready { when_lost, .. } => *when_lost,
            Plane::Unready(_) => WhenLost::FailClosed,
        }
    }

    fn pulse(&self) -> std::sync::MutexGuard<'_, prober::Pulse> {
        self.pulse.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Health now. Touches no HSM.
    pub(crate) fn health(&self) -> Health {
        let outcome = self.judge();
        let mut last = self
            .last_health
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if last.outcome != outcome {
            match (&last.outcome, &outcome) {
                (Err(_), Ok(())) => tracing::info!("KMS is ready"),
                (_, Err(reason)) => tracing::warn!(%reason, "KMS is not ready"),
                (Ok(()), Ok(())) => {}
            }
            if last.outcome.is_ok() != outcome.is_ok() {
                last.since = SystemTime::now();
            }
            last.outcome = outcome;
        }
        last.clone()
    }

    fn judge(&self) -> Result<(), String> {
        self.keyring()?
            .active()
            .map_err(|error| error.to_string())?;
        self.pulse().verdict()
    }

    async fn open(
        &self,
        envelope: Vec<u8>,
        key_id: String,
        deadline: tokio::time::Instant,
    ) -> SharedOpening {
        let keyring = self.keyring().map_err(KeyringError::Unready)?;
        loop {
            let keyring = Arc::clone(&keyring);
            let (bytes, id) = (envelope.clone(), key_id.clone());
            let (answer, shared) = self
                .flights
                .join((envelope.clone(), key_id.clone()), move || async move {
                    let Opened { plaintext, listed } = keyring.open(&bytes, &id, deadline).await?;
                    Ok((Arc::new(plaintext), listed))
                })
                .await;
            let answer = answer
                .unwrap_or_else(|| Err(KeyringError::Unready("the daemon is stopping".to_owned())));
            if shared {
                if is_deadline(&answer) && tokio::time::Instant::now() < deadline {
                    // It was the other caller's deadline; ours has time left.
                    continue;
                }
                self.counters.decrypt_shared.fetch_add(1, Ordering::Relaxed);
            }
            return answer;
        }
    }
}

fn is_deadline(answer: &SharedOpening) -> bool {
    matches!(answer, Err(KeyringError::Token(error))
        if matches!(**error, hsm_token_client::TokenError::Deadline { .. }))
}
