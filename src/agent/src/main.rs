//! hsmd: the node's daemon. Kubernetes KMS v2 over keys that never leave the HSM.
//!
//! This file is the command line; [`run`] is the daemon.

mod check;
mod health;
mod keyring;
mod kms;
mod listen;
mod peer;
mod pin;
mod reload;
mod run;
mod telemetry;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use hsm_config::report;
use listen::Endpoint;
use telemetry::LogFormat;

/// musl's allocator maps and unmaps pages for the buffers of every request, which is an eighth of a
/// Decrypt's time here; this one keeps them. It is small, and pure Rust, so no C compiler is needed.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// Seal Kubernetes Secrets under a key that never leaves the HSM
#[derive(Parser)]
#[command(version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    ///
    /// It binds its sockets first and stays up whatever is missing: configuration, module, token or
    /// PIN. What it lacks is named by its log, its health socket and the Status call.
    ///
    /// SIGHUP reads the configuration again, SIGTERM ends the daemon when the calls under way are
    /// answered.
    Run {
        /// Configuration file; watched, and taken when it is complete, valid and a legal step from the
        /// one in force
        #[arg(long, value_name = "FILE", default_value = "/etc/hsm/hsmd.yaml")]
        config: PathBuf,
        /// KMS socket until a configuration names others; repeatable
        #[arg(
            long,
            value_name = "URI",
            default_values = ["unix:///var/log/audit/kube/hsm-kms.sock", "unix:///@hsm-kms"]
        )]
        listen: Vec<Endpoint>,
        /// Health socket; without it, the configuration's, else unix:///run/hsm/health.sock
        #[arg(long, value_name = "URI")]
        health_listen: Option<Endpoint>,
        /// Form of the log on standard error
        #[arg(long, value_name = "FORM", default_value = "text")]
        log_format: LogFormat,
    },
    /// Check a configuration file without starting anything
    ///
    /// Exit status: 0 if the daemon would take it, 1 if not.
    Check {
        /// Configuration file
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    // Before anything is opened: only now do open descriptors tell what was inherited.
    pin::adopt_inherited();
    match Cli::parse().command {
        Command::Run {
            config,
            listen,
            health_listen,
            log_format,
        } => {
            let health = match health_listen {
                Some(Endpoint::Path { path, .. }) => Some(run::default_health(path)),
                Some(Endpoint::Abstract(_)) => {
                    eprint!(
                        "{}",
                        report::entry(
                            "--health-listen names an abstract socket, which every process could open",
                            [],
                            Some("write unix:///PATH"),
                        )
                    );
                    return ExitCode::from(2);
                }
                None => None,
            };
            run::run(run::Settings {
                config,
                listen,
                health,
                log_format,
            })
        }
        Command::Check { file } => {
            let (out, err, code) = check::command(&file);
            print!("{out}");
            eprint!("{err}");
            ExitCode::from(code)
        }
    }
}
