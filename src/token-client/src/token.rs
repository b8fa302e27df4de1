//! The handle of one token: operations with deadlines, state, counters.

use std::sync::Arc;
use std::time::SystemTime;

use hsm_wire::envelope::Wrap;
use hsm_wire::host::{Description, KeyRef};
use hsm_wire::secret::Secret;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::Config;
use crate::error::TokenError;

/// Whether the token can be used.
#[derive(Debug, Clone)]
pub enum State {
    /// A host is being started for the first time, or in the place of one that served; operations
    /// wait for it.
    Starting,
    /// The token is open.
    Up {
        /// What the host found on it.
        description: Arc<Description>,
        /// Pid of the host; none for a fake.
        host_pid: Option<u32>,
    },
    /// Operations are refused at once; a fresh host is tried again and again.
    Down {
        /// Why.
        reason: String,
        /// Since when.
        since: SystemTime,
    },
    /// The PIN was refused. Nothing is tried until the configuration brings another one.
    Latched {
        /// Why.
        reason: String,
        /// Since when.
        since: SystemTime,
    },
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Operations that the host tried again on a new session.
    pub retried: u64,
    /// Logins that the host repeated.
    pub relogin: u64,
    /// `C_Finalize` and `C_Initialize` in a running host.
    pub reinit: u64,
    /// Hosts that came up in the place of an earlier one.
    pub respawned: u64,
    /// Times the token went down.
    pub down: u64,
    /// Operations that took longer than `call_timeout`.
    pub stuck: u64,
    /// Hosts that ended by themselves or spoke nonsense.
    pub crashed: u64,
}

/// One token. Clones share it; the last one that goes stops it.
#[derive(Clone)]
pub struct Token(Arc<Inner>);

struct Inner {
    name: String,
    state: watch::Receiver<State>,
}

impl Token {
    /// Starts the token's host and its supervision, inside the current tokio runtime. Returns at
    /// once: [`Token::state`] says what comes of it.
    pub fn start(config: Config) -> Self {
        let (_, state) = watch::channel(State::Starting);
        Self(Arc::new(Inner {
            name: config.name,
            state,
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its state, now and as it changes.
    pub fn state(&self) -> watch::Receiver<State> {
        self.0.state.clone()
    }

    /// Its counters.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Wraps `plaintext` under `key`, bound to `aad`: nonce, ciphertext and tag as `wrap` lays them
    /// out.
    pub async fn seal(
        &self,
        _key: &KeyRef,
        _wrap: Wrap,
        _aad: Vec<u8>,
        _plaintext: Secret,
        _deadline: Instant,
    ) -> Result<Vec<u8>, TokenError> {
        Err(self.down())
    }

    /// Undoes [`Token::seal`].
    pub async fn unseal(
        &self,
        _key: &KeyRef,
        _wrap: Wrap,
        _aad: Vec<u8>,
        _sealed: Vec<u8>,
        _plaintext_len: u32,
        _deadline: Instant,
    ) -> Result<Secret, TokenError> {
        Err(self.down())
    }

    /// Seals and unseals fresh random bytes under `key` and compares.
    pub async fn probe(
        &self,
        _key: &KeyRef,
        _wrap: Wrap,
        _deadline: Instant,
    ) -> Result<(), TokenError> {
        Err(self.down())
    }

    /// Ends the host and the supervision; every operation from now on is refused.
    pub async fn stop(&self) {}

    fn down(&self) -> TokenError {
        TokenError::Down {
            token: self.0.name.clone(),
            reason: "not started".into(),
        }
    }
}
