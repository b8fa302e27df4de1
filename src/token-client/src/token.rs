//! The handle of one token: operations with deadlines, state, counters.

use std::sync::Arc;
use std::time::SystemTime;

use hsm_wire::envelope::Wrap;
use hsm_wire::host::{Answer, Description, KeyRef, Request};
use hsm_wire::secret::Secret;
use tokio::sync::{oneshot, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use crate::config::Config;
use crate::dispatch::Dispatch;
use crate::error::TokenError;
use crate::host::Hosts;
use crate::shared::Shared;
use crate::supervise::supervise;

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
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    stopped: watch::Receiver<bool>,
}

impl Token {
    /// Starts the token's host and its supervision, inside the current tokio runtime. Returns at
    /// once: [`Token::state`] says what comes of it.
    pub fn start(config: Config) -> Self {
        let hosts = Hosts::processes(config.name.clone(), config.launch.clone());
        Self::start_on(config, hosts)
    }

    pub(crate) fn start_on(config: Config, hosts: Hosts) -> Self {
        let dispatch = Dispatch::new(config.sessions, config.call_timeout);
        let shared = Arc::new(Shared::new(config.name.clone(), dispatch));
        let (stop, told) = watch::channel(false);
        let (done, stopped) = watch::channel(false);
        tokio::spawn(supervise(Arc::clone(&shared), config, hosts, told, done));
        Self(Arc::new(Inner {
            shared,
            stop,
            stopped,
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.shared.name
    }

    /// Its state, now and as it changes.
    pub fn state(&self) -> watch::Receiver<State> {
        self.0.shared.state()
    }

    /// Its counters.
    pub fn stats(&self) -> Stats {
        self.0.shared.stats()
    }

    /// Wraps `plaintext` under `key`, bound to `aad`: nonce, ciphertext and tag as `wrap` lays them
    /// out.
    pub async fn seal(
        &self,
        key: &KeyRef,
        wrap: Wrap,
        aad: Vec<u8>,
        plaintext: Secret,
        deadline: Instant,
    ) -> Result<Vec<u8>, TokenError> {
        let key = key.clone();
        let request = Request::Seal {
            key,
            wrap,
            aad,
            plaintext,
        };
        match self.ask(request, deadline).await? {
            Answer::Sealed(sealed) => Ok(sealed),
            _ => Err(self.no_such_answer()),
        }
    }

    /// Undoes [`Token::seal`]. The plaintext has `plaintext_len` bytes.
    pub async fn unseal(
        &self,
        key: &KeyRef,
        wrap: Wrap,
        aad: Vec<u8>,
        sealed: Vec<u8>,
        plaintext_len: u32,
        deadline: Instant,
    ) -> Result<Secret, TokenError> {
        let key = key.clone();
        let request = Request::Unseal {
            key,
            wrap,
            aad,
            sealed,
            plaintext_len,
        };
        match self.ask(request, deadline).await? {
            Answer::Unsealed(plaintext) => Ok(plaintext),
            _ => Err(self.no_such_answer()),
        }
    }

    /// Seals and unseals fresh random bytes under `key` and compares.
    pub async fn probe(
        &self,
        key: &KeyRef,
        wrap: Wrap,
        deadline: Instant,
    ) -> Result<(), TokenError> {
        let key = key.clone();
        match self.ask(Request::Probe { key, wrap }, deadline).await? {
            Answer::Probed => Ok(()),
            _ => Err(self.no_such_answer()),
        }
    }

    /// Looks at the token's keys anew and shows them in [`Token::state`]: a key may have been made
    /// since the host was started.
    pub async fn refresh(&self, deadline: Instant) -> Result<(), TokenError> {
        match self.ask(Request::Describe, deadline).await? {
            Answer::Described(description) => {
                self.0.shared.described(description);
                Ok(())
            }
            _ => Err(self.no_such_answer()),
        }
    }

    /// Ends the host and the supervision, and returns when both have; every operation from now on
    /// is refused.
    pub async fn stop(&self) {
        self.0.stop.send_replace(true);
        // An error says that the supervision was dropped with its runtime.
        let _ = self.0.stopped.clone().wait_for(|stopped| *stopped).await;
    }

    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, TokenError> {
        let shared = &self.0.shared;
        let (reply, answer) = oneshot::channel();
        let id = shared.submit(request, deadline, reply)?;
        let _place = Place { shared, id };
        // First everybody else who is ready: they may have operations of their own.
        yield_now().await;
        shared.look_for_answer();
        match timeout_at(deadline, answer).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) => Err(shared.down("its supervision has ended")),
            Err(_) => Err(TokenError::Deadline {
                token: shared.name.clone(),
            }),
        }
    }

    // Answers are compared with their questions before they come here.
    fn no_such_answer(&self) -> TokenError {
        self.0
            .shared
            .down("the module host answered another question")
    }
}

/// A caller's place in the queue, freed when the caller goes.
struct Place<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.shared.abandon(self.id);
    }
}

#[cfg(test)]
mod tests;
