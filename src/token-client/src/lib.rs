//! Spawns the module host `hsm-token`, supervises it, and gives its operations deadlines and
//! recovery.
//!
//! A vendor's PKCS#11 module may hang, crash or write anywhere; so it lives in a process of its own,
//! and this crate is everything that the daemon knows of that process. A [`Token`] is one configured
//! token. It answers every operation by the caller's deadline, whatever its host does.
//!
//! | module | what it does |
//! |---|---|
//! | [`config`] | what a token is made of |
//! | [`token`] | the handle: operations, state, counters |
//! | `shared`, `dispatch` | the queue, who is sent when, who hangs, who is refused; `dispatch` is pure |
//! | `supervise`, `ladder` | starts and replaces hosts; `ladder` says how fast |
//! | `login`, `latch` | the PIN for a host, and the notes on those that were refused |
//! | `host`, `spawn`, `channel`, `output` | one host: its process, its socket, what it prints |
//! | `fake` | a token in memory, for the tests of the crates above (feature `fake`) |
//!
//! Everything runs inside one tokio `current_thread` runtime, but for one thread per token that
//! spawns the host and waits for it.

mod channel;
pub mod config;
mod dispatch;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod host;
mod ladder;
mod latch;
mod login;
mod output;
mod shared;
mod spawn;
mod supervise;
mod text;
pub mod token;

pub use config::{Config, Isolation, Launch, Loader, PinSource};
pub use error::TokenError;
pub use spawn::owns;
pub use token::{State, Stats, Token};
