//! `hsmctl kms keys`: what the daemon of this node knows of its keys, from its health socket.

mod http;
mod status;

use std::io;
use std::path::PathBuf;

use hsm_config::Endpoint;
use serde_json::{Value, json};

use crate::outcome::{self, Failure, Format, Outcome};
use crate::text::{paragraph, table};
use http::HttpError;
use status::{Key, Status, Token};

pub(crate) const EXAMPLES: &str = "\
Examples:
  hsmctl kms keys
  hsmctl kms keys --socket unix:///run/hsm/other-health.sock
  hsmctl kms keys -o json | jq -r '.keys[] | select(.problem) | .label'

Two nodes hold the same key if they show the same fingerprint; they are at the same step of a
rotation if they show the same key_id for the active key.

Exit status: 0 the daemon answered, 1 it did not, 2 a wrong command line.";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The daemon's health socket, as a path or unix:///PATH
    #[arg(long, value_name = "SOCKET", default_value = "/run/hsm/health.sock", value_parser = socket)]
    socket: PathBuf,
    /// Form of the answer
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

fn socket(text: &str) -> Result<PathBuf, String> {
    if !text.starts_with("unix:") {
        return Ok(text.into());
    }
    match text.parse() {
        Ok(Endpoint::Path { path, .. }) => Ok(path),
        Ok(Endpoint::Abstract(_)) => Err("health is never served on an abstract socket".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub(crate) fn run(args: &Args) -> Result<Outcome, Failure> {
    let socket = args.socket.display();
    let page = http::get(&args.socket, "/status").map_err(|error| {
        let what = format!("the daemon's status cannot be read from {socket}");
        Failure::because(&what, &error, hint(&error))
    })?;
    let status = Status::read(&page).map_err(|error| {
        let what = format!("{socket} does not answer with the daemon's status");
        Failure::because(&what, &error, Some("is another service listening there?"))
    })?;
    Ok(Outcome::done(match args.output {
        Format::Text => text(&status),
        Format::Json => outcome::json(&as_json(&status)),
    }))
}

fn hint(error: &HttpError) -> Option<&'static str> {
    match error {
        HttpError::Connect(cause) => Some(match cause.kind() {
            io::ErrorKind::PermissionDenied => {
                "the health socket belongs to root: run this as root"
            }
            io::ErrorKind::ConnectionRefused => "the daemon that made it is gone: start hsmd",
            _ => "is hsmd running on this machine? name its `health.listen` by --socket",
        }),
        HttpError::Late => Some("the process is there and does not answer: look at its log"),
        HttpError::Strange(_) | HttpError::Status(_) | HttpError::TooLong => {
            Some("name the health socket, not that of the KMS plugin")
        }
        HttpError::Broken(_) => None,
    }
}

fn text(status: &Status) -> String {
    let kms = &status.kms;
    let readiness = match (&kms.reason, kms.ready) {
        (_, true) => "ready".to_owned(),
        (Some(reason), false) => format!("not ready: {reason}"),
        (None, false) => "not ready".to_owned(),
    };
    let mut out = paragraph("", &format!("hsmd {}: {readiness}", status.version));
    let configuration = &status.configuration;
    out += &table(
        "  ",
        &[
            ("key_id", kms.key_id.clone().unwrap_or_default()),
            (
                "configuration",
                format!("{} ({})", configuration.file, configuration.state),
            ),
            (
                "rejected",
                configuration
                    .rejected
                    .as_deref()
                    .map_or(String::new(), one_line),
            ),
        ],
    );
    for token in &status.tokens {
        let reason = token.reason.as_ref();
        let reason = reason.map_or(String::new(), |reason| format!(": {reason}"));
        out += &paragraph(
            "  token ",
            &format!("{} {}{reason}", token.name, token.state),
        );
    }
    for key in &status.keys {
        out += &describe(key);
    }
    if status.keys.is_empty() {
        out += "\nno keys\n";
    }
    out
}

/// What the daemon printed of the newest file, for a table.
fn one_line(report: &str) -> String {
    let lines: Vec<&str> = report
        .lines()
        .map(|line| line.trim_start_matches("error: "))
        .filter(|line| !line.is_empty())
        .collect();
    lines.join("; ")
}

fn describe(key: &Key) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let passed_over: Vec<String> = key
        .passed_over
        .iter()
        .map(|better| format!("{} ({})", better.mechanism, better.reason))
        .collect();
    let name = match (key.label.as_str(), &key.uri) {
        ("", Some(uri)) => uri,
        ("", None) => "(no label)",
        (label, _) => label,
    };
    let mut out = String::from("\n");
    out += &paragraph("", &format!("{name}: {}: {}", key.state, key.meaning()));
    out + &table(
        "  ",
        &[
            ("problem", text(&key.problem)),
            ("fingerprint", text(&key.fingerprint)),
            (
                "epoch",
                key.epoch.map_or(String::new(), |epoch| epoch.to_string()),
            ),
            ("key_id", text(&key.key_id)),
            ("backup", key.backup.clone()),
            ("token", text(&key.token)),
            ("mechanism", text(&key.mechanism)),
            ("passed over", passed_over.join("; ")),
            ("uri", text(&key.uri)),
            ("needed by", key.needed_by().unwrap_or_default()),
        ],
    )
}

fn as_json(status: &Status) -> Value {
    let keys: Vec<Value> = status
        .keys
        .iter()
        .map(|key| {
            let mut value = json!(key);
            value["needed_by"] = json!(key.needed_by());
            value
        })
        .collect();
    let tokens: &[Token] = &status.tokens;
    json!({
        "version": status.version,
        "ready": status.kms.ready,
        "reason": status.kms.reason,
        "key_id": status.kms.key_id,
        "configuration": status.configuration,
        "tokens": tokens,
        "keys": keys,
    })
}
