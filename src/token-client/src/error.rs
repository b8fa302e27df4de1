//! Why an operation on a token failed.

use std::time::Duration;

use hsm_wire::fault::Fault;
use thiserror::Error;

/// Why an operation failed. Cloned for callers that share one operation.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenError {
    /// The token cannot be used now; nothing was waited for.
    #[error("token {token} is down: {reason}")]
    Down {
        /// Name of the token.
        token: String,
        /// Why, as its state says.
        reason: String,
    },
    /// The operation could not have finished in time and was refused at once.
    #[error(
        "token {token} has {waiting} operations to do first, too many to do this one by its \
         deadline (it would take about {} ms)",
        expected.as_millis()
    )]
    Overloaded {
        /// Name of the token.
        token: String,
        /// Operations before this one.
        waiting: usize,
        /// How long it would have taken.
        expected: Duration,
    },
    /// The caller's deadline passed.
    #[error("token {token} did not answer by the deadline")]
    Deadline {
        /// Name of the token.
        token: String,
    },
    /// The host answered that it could not do it.
    #[error("token {token} could not do the operation")]
    Fault {
        /// Name of the token.
        token: String,
        /// What the host said.
        #[source]
        fault: Fault,
    },
}
