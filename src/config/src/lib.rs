//! The daemon's configuration: one strict YAML file, read into values that cannot be wrong.
//!
//! [`parse`] is pure. What it returns has passed every check that can be made without the token; what
//! it refuses comes back as [`Errors`], all of them at once, each with line, column, field, cause and
//! a way out. There is no default for anything that decides whose Secrets are sealed under what.
//!
//! | module | what it does |
//! |---|---|
//! | `document` | YAML → plain values and their places, within limits |
//! | `reader` | plain values → fields of the right type; notes every mistake |
//! | `values` | names, paths, durations, modes |
//! | `tokens`, `kms` | the two sections |
//! | `across` | what must hold between sections |
//! | `rules`, `endpoint`, [`pin`] | the values that come out of it, for those who know no configuration |
//! | [`plan`] | may this configuration follow that one? |
//! | [`report`] | how errors are printed for a person |
//!
//! **Invariant:** no message repeats a value from `pin` or `env`, where a secret may stand by mistake.
//! **Invariant:** a [`Config`] comes from [`parse`] only.

mod across;
mod document;
mod endpoint;
mod error;
mod kms;
pub mod pin;
pub mod plan;
mod reader;
pub mod report;
mod rules;
mod tokens;
mod values;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

pub use document::MAX_BYTES;
pub use endpoint::{Endpoint, EndpointError};
pub use error::Errors;
pub use kms::Kms;
pub use rules::{ClusterNames, KeyRule, KeyState, Rules, WhenLost};
pub use tokens::{Pin, Token};

use document::Node;
use error::Problem;
use reader::{Complaint, Cursor, Fields, Log};

/// A checked configuration.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Whose Secrets are sealed, and under which former names they still open.
    pub clusters: ClusterNames,
    /// In the order in which keys are looked for.
    pub tokens: Vec<Token>,
    /// The KMS v2 face.
    pub kms: Kms,
    /// Where the notes on refused PINs are kept.
    pub state_dirs: Vec<PathBuf>,
    /// Where health is served, if the file says so.
    pub health_listen: Option<Endpoint>,
}

/// Reads and checks a file.
pub fn load(path: &Path) -> Result<Config, Errors> {
    let file = path.display().to_string();
    let mut bytes = Vec::new();
    let read = File::open(path)
        // One byte more than allowed tells a file of the right size from a longer one.
        .and_then(|opened| opened.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| error.to_string());
    parse(&decode(read.map(|_| bytes), &file)?, &file)
}

/// The limits that come before any parser: a content at all, its size, its encoding.
pub fn decode(read: Result<Vec<u8>, String>, file: &str) -> Result<String, Errors> {
    let bytes = read.map_err(|cause| {
        Errors::one(
            file,
            Problem::new("the file cannot be read").because(&cause),
        )
    })?;
    if bytes.len() > MAX_BYTES {
        let problem = Problem::new(format!("longer than {MAX_BYTES} bytes"))
            .hint("is this the right file? a configuration takes a few thousand bytes");
        return Err(Errors::one(file, problem));
    }
    String::from_utf8(bytes).map_err(|error| {
        let before = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..before]
            .iter()
            .filter(|b| **b == b'\n')
            .count();
        Errors::one(
            file,
            Problem::new(format!("not UTF-8 text, from line {line} on")),
        )
    })
}

/// Checks a text; `file` names it in errors.
pub fn parse(text: &str, file: &str) -> Result<Config, Errors> {
    let document = document::parse(text, file)?;
    if document == Node::Nothing {
        let problem = Problem::new("the file is empty").hint(
            "to run without a configuration, remove the file; the daemon then waits unconfigured",
        );
        return Err(Errors::one(file, problem));
    }
    let log = Log::default();
    match read(&Cursor::root(&document, &log)) {
        Some(config) if log.is_empty() => Ok(config),
        _ => Err(log.into_errors(text, file)),
    }
}

fn read(root: &Cursor<'_>) -> Option<Config> {
    let fields = root.fields(&[
        "cluster",
        "accept_clusters",
        "tokens",
        "kms",
        "state_dirs",
        "health",
    ])?;
    let clusters = clusters(&fields);
    let tokens = fields.required(
        "tokens",
        "tokens: [{name: …, uri: …, module: …, pin: …}]",
        |c| tokens::read(c),
    );
    let kms = fields.required("kms", "kms: {keys: [{uri: …, epoch: 1, …}]}", kms::read);
    let default_dirs = vec![PathBuf::from("/run/hsm"), PathBuf::from("/var/lib/hsm")];
    let state_dirs = fields.or("state_dirs", default_dirs, |c| c.each(1..=8, values::path));
    let health_listen = fields.optional("health", health);
    let config = Config {
        clusters: clusters?,
        tokens: tokens?,
        kms: kms?,
        state_dirs: state_dirs?,
        health_listen: health_listen?,
    };
    across::keys_name_configured_tokens(root, &config);
    across::hosts_stay_apart(root, &config);
    Some(config)
}

fn clusters(fields: &Fields<'_>) -> Option<ClusterNames> {
    let own = fields.required("cluster", "cluster: NAME", values::cluster_name);
    let mut seen: Vec<String> = Vec::new();
    let accepted = fields.or("accept_clusters", Vec::new(), |list| {
        list.each(0..=16, |item| {
            let name = values::cluster_name(item)?;
            if seen.contains(&name) {
                return item.complain(Complaint::new(format!("`{name}` is listed twice")));
            }
            if own.as_ref() == Some(&name) {
                return item.complain(
                    Complaint::new(format!("`{name}` is this cluster's own name"))
                        .hint("list former names only"),
                );
            }
            seen.push(name.clone());
            Some(name)
        })
    });
    Some(ClusterNames {
        own: own?,
        accepted: accepted?,
    })
}

fn health(cursor: &Cursor<'_>) -> Option<Endpoint> {
    let fields = cursor.fields(&["listen"])?;
    fields.required("listen", "listen: unix:///run/hsm/health.sock", |cursor| {
        cursor.text("a socket as unix:///PATH", |text| {
            match text.parse() {
                // An abstract socket has no mode: every process on the node could read the status.
                Ok(Endpoint::Abstract(_)) => Err(Complaint::new(
                    "health is served on a path only, which its mode protects",
                )
                .hint("write unix:///PATH")),
                Ok(endpoint) => Ok(endpoint),
                Err(cause) => Err(Complaint::new("no socket to listen at").because(cause)),
            }
        })
    })
}

#[cfg(test)]
mod tests;
