//! What the daemon says of itself: readiness, and the status page as JSON.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use hsm_token_client::State;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::health::{Source, rfc3339};
use crate::keyring::NamedToken;
use crate::kms::Face;
use crate::listen::{self, Endpoint};

/// How the configuration stands.
#[derive(Debug, Clone)]
pub(super) struct Configuration {
    pub(super) file: PathBuf,
    /// When the one in force was taken over; none while none is.
    pub(super) loaded_at: Option<SystemTime>,
    /// Why the newest file was not taken.
    pub(super) rejected: Option<String>,
}

/// The parts that the main loop replaces.
struct Parts {
    configuration: Configuration,
    sockets: Vec<(Endpoint, watch::Receiver<listen::State>)>,
}

/// The page.
pub(super) struct Page {
    began: Instant,
    face: Arc<Face>,
    parts: Mutex<Parts>,
}

impl Page {
    pub(super) fn new(face: Arc<Face>, file: PathBuf) -> Arc<Self> {
        let configuration = Configuration {
            file,
            loaded_at: None,
            rejected: None,
        };
        Arc::new(Self {
            began: Instant::now(),
            face,
            parts: Mutex::new(Parts {
                configuration,
                sockets: Vec::new(),
            }),
        })
    }

    pub(super) fn set_sockets(&self, sockets: Vec<(Endpoint, watch::Receiver<listen::State>)>) {
        self.parts().sockets = sockets;
    }

    pub(super) fn taken(&self) {
        let mut parts = self.parts();
        parts.configuration.loaded_at = Some(SystemTime::now());
        parts.configuration.rejected = None;
    }

    pub(super) fn rejected(&self, why: String) {
        self.parts().configuration.rejected = Some(why);
    }

    pub(super) fn removed(&self) {
        let mut parts = self.parts();
        parts.configuration.loaded_at = None;
        parts.configuration.rejected = None;
    }

    fn parts(&self) -> std::sync::MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Not ready while a name that kube-apiserver may call is another's: it would hand them its
    /// seeds, however well our keys do.
    fn why_unready(&self) -> Option<String> {
        let taken =
            self.parts()
                .sockets
                .iter()
                .find_map(|(endpoint, state)| match &*state.borrow() {
                    listen::State::Taken { holder } => {
                        Some(format!("{endpoint} is taken: {holder}"))
                    }
                    _ => None,
                });
        taken.or_else(|| self.face.health().outcome.err())
    }
}

impl Source for Page {
    fn unready(&self) -> Vec<String> {
        self.why_unready()
            .map(|reason| format!("kms: {reason}"))
            .into_iter()
            .collect()
    }

    fn status(&self) -> Value {
        let health = self.face.health();
        let keyring = self.face.keyring().ok();
        let reason = self.why_unready();
        let parts = self.parts();
        let listeners: Vec<Value> = parts
            .sockets
            .iter()
            .map(|(endpoint, state)| {
                let state = state.borrow();
                json!({ "endpoint": endpoint.to_string(), "state": state.label(), "reason": state.reason() })
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime_seconds": self.began.elapsed().as_secs(),
            "configuration": configuration(&parts.configuration),
            "kms": {
                "ready": reason.is_none(),
                "reason": reason,
                "since": rfc3339(health.since),
                "key_id": keyring.as_ref().and_then(|keyring| Some(keyring.active().ok()?.key_id)),
                "listeners": listeners,
                "counters": self.face.counters.report(),
            },
            "keys": keyring.as_ref().map(|keyring| keyring.reports()).unwrap_or_default(),
            "tokens": keyring.as_ref().map(|keyring| keyring.tokens().iter().map(token).collect::<Vec<_>>()).unwrap_or_default(),
        })
    }
}

fn configuration(configuration: &Configuration) -> Value {
    let state = match (&configuration.loaded_at, &configuration.rejected) {
        (Some(_), _) => "loaded",
        (None, Some(_)) => "broken",
        (None, None) => "unconfigured",
    };
    json!({
        "state": state,
        "file": configuration.file,
        "loaded_at": configuration.loaded_at.map(rfc3339),
        "rejected": configuration.rejected,
    })
}

fn token(named: &NamedToken) -> Value {
    let stats = named.token.stats();
    let (state, reason, since, host_pid, serial) = match &*named.token.state().borrow() {
        State::Starting => ("starting", None, None, None, None),
        State::Up {
            description,
            host_pid,
            ..
        } => (
            "up",
            None,
            None,
            *host_pid,
            Some(description.token.serial.clone()),
        ),
        State::Down { reason, since } => ("down", Some(reason.clone()), Some(*since), None, None),
        State::Latched { reason, since } => {
            ("latched", Some(reason.clone()), Some(*since), None, None)
        }
    };
    json!({
        "name": named.name,
        "state": state,
        "reason": reason,
        "since": since.map(rfc3339),
        "host_pid": host_pid,
        "serial": serial,
        "recovery": {
            "retried": stats.retried,
            "relogin": stats.relogin,
            "reinit": stats.reinit,
            "respawned": stats.respawned,
            "down": stats.down,
            "stuck": stats.stuck,
            "crashed": stats.crashed,
        },
    })
}
