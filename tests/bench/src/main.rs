//! Measures a KMS v2 plugin from where kube-apiserver stands: one HTTP/2 connection over a unix socket.
//!
//! `kms` runs the whole comparison. The other subcommands are the processes that it starts: the load generator (`load`,
//! `first-answer`), which drives every server alike, and the two limits (`raw`, `echo`).

mod args;
mod client;
mod compare;
mod echo;
mod error;
mod first_answer;
mod load;
mod messages;
mod process;
mod raw;
mod report;
mod samples;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Args, Command};
use crate::error::BenchError;

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                eprintln!("caused by: {inner}");
                cause = inner.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), BenchError> {
    match command {
        // No runtime: the limit is the module's, on plain threads.
        Command::Raw(args) => raw::run(&args),
        Command::Kms(args) => block_on(compare::run(args)),
        Command::Load(args) => {
            args.caller.become_it()?;
            block_on(load::run(args))
        }
        Command::FirstAnswer(args) => {
            args.caller.become_it()?;
            block_on(first_answer::run(args))
        }
        Command::Echo(args) => block_on(echo::run(&args.socket)),
    }
}

fn block_on(future: impl Future<Output = Result<(), BenchError>>) -> Result<(), BenchError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| BenchError::Io {
            doing: "start the async runtime",
            source,
        })?
        .block_on(future)
}
