//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::process::Caller;

/// Measure KMS v2 plugins with one load generator
#[derive(Debug, Parser)]
#[command(name = "hsm-bench", version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compare hsmd with a Go peer and the two limits, in rounds (hack/bench calls this)
    Kms(KmsArgs),
    /// Drive one server and print a line of JSON
    Load(LoadArgs),
    /// Wait for a server's first answer to Status
    FirstAnswer(FirstAnswerArgs),
    /// Drive the PKCS#11 module in this process and print a line of JSON
    Raw(RawArgs),
    /// Serve KMS v2 shaped answers without any crypto
    Echo(EchoArgs),
}

/// An operation of KMS v2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Op {
    Decrypt,
    Encrypt,
    Status,
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Decrypt => "decrypt",
            Self::Encrypt => "encrypt",
            Self::Status => "status",
        }
    }
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Who {
    Raw,
    Echo,
    Hsmd,
    Peer,
}

impl Who {
    pub(crate) const ALL: [Self; 4] = [Self::Raw, Self::Echo, Self::Hsmd, Self::Peer];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Echo => "echo",
            Self::Hsmd => "hsmd",
            Self::Peer => "peer",
        }
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct KmsArgs {
    /// Folder for sockets and logs; the caller must be able to reach it
    #[arg(long)]
    pub(crate) folder: PathBuf,
    /// The hsmd program, with hsm-token beside it
    #[arg(long)]
    pub(crate) hsmd: Option<PathBuf>,
    /// Its configuration
    #[arg(long)]
    pub(crate) hsmd_config: Option<PathBuf>,
    /// The path socket that its configuration names
    #[arg(long)]
    pub(crate) hsmd_socket: Option<PathBuf>,
    /// The Go peer
    #[arg(long)]
    pub(crate) peer: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) key: KeyArgs,
    #[command(flatten)]
    pub(crate) caller: Caller,
    /// Seconds per row and round
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
    /// Rounds; a row's figures are the medians over them
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// Measure only these
    #[arg(long, value_delimiter = ',')]
    pub(crate) who: Vec<Who>,
    /// Write the figures as JSON
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct KeyArgs {
    /// The PKCS#11 module
    #[arg(long)]
    pub(crate) module: PathBuf,
    /// Label of the token
    #[arg(long)]
    pub(crate) token_label: String,
    /// Label of the AES key
    #[arg(long)]
    pub(crate) key_label: String,
    /// File with the user PIN
    #[arg(long)]
    pub(crate) pin_file: PathBuf,
}

#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct RowArgs {
    #[arg(long)]
    pub(crate) op: Op,
    /// Requests in flight
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) concurrency: u16,
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct LoadArgs {
    #[arg(long)]
    pub(crate) socket: PathBuf,
    #[command(flatten)]
    pub(crate) row: RowArgs,
    /// Measure while the module hangs: prepare, print "ready", wait for a line, leave so many Decrypts unanswered and take any answer to --op
    #[arg(long)]
    pub(crate) while_hung: Option<u16>,
    #[command(flatten)]
    pub(crate) caller: Caller,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct FirstAnswerArgs {
    #[arg(long)]
    pub(crate) socket: PathBuf,
    #[command(flatten)]
    pub(crate) caller: Caller,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct RawArgs {
    #[command(flatten)]
    pub(crate) key: KeyArgs,
    #[command(flatten)]
    pub(crate) row: RowArgs,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct EchoArgs {
    #[arg(long)]
    pub(crate) socket: PathBuf,
}
