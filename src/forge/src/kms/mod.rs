//! `hsmctl kms`: the keys that seal Kubernetes Secrets.

mod inspect;
mod keys;
mod plan;

use clap::Subcommand;

use crate::outcome::{Failure, Outcome};

/// One command.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Compare two configurations: what changes, is it a legal step, what must happen first
    #[command(after_long_help = plan::EXAMPLES)]
    Plan(plan::Args),
    /// Show every key that a node's daemon knows, and which envelopes need it
    #[command(after_long_help = keys::EXAMPLES)]
    Keys(keys::Args),
    /// Say what a stored Secret was sealed with and what opening it takes
    #[command(after_long_help = inspect::EXAMPLES)]
    Inspect(inspect::Args),
}

impl Command {
    /// Does it.
    pub(crate) fn run(self) -> Result<Outcome, Failure> {
        match self {
            Self::Plan(args) => plan::run(&args),
            Self::Keys(args) => keys::run(&args),
            Self::Inspect(args) => inspect::run(&args),
        }
    }
}
