//! hsmctl: the operator's tool. It plans, explains and shows; what it prints is for people, or for
//! programs with `-o json`.
//!
//! | module | what it does |
//! |---|---|
//! | [`kms`] | the key-encryption keys of Kubernetes Secrets |
//! | [`outcome`] | what a command leaves behind: two streams and an exit status |
//! | [`text`] | lines of a bearable length |

mod kms;
mod outcome;
mod text;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use outcome::Outcome;

/// Operate keys that never leave an HSM
#[derive(Parser)]
#[command(version, disable_help_subcommand = true, after_long_help = EXIT_STATUS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Exit status:
  0  done; for `kms plan`: the step is legal
  1  refused, or an input that is wrong or cannot be read
  2  a wrong command line

Errors go to standard error as `error:`, `caused by:` and `hint:`. There are no colours.";

#[derive(Subcommand)]
enum Command {
    /// Plan a rotation, explain a stored Secret, show a node's keys
    #[command(subcommand)]
    Kms(kms::Command),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Kms(command) => command.run(),
    };
    outcome.unwrap_or_else(Outcome::from).leave()
}
