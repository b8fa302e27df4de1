//! The log: one line an event, on standard error, where Talos, systemd and kubelet collect it.
//!
//! Level by `HSMD_LOG` in tracing's directive syntax (`info`, `hsmd=debug`), `info` by default.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging. Call once, first.
pub(crate) fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env("HSMD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}
