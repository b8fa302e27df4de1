//! `hsmctl kms inspect`: the clear part of an envelope in words. No key and no daemon is asked, and
//! nothing is opened.

mod stored;
#[cfg(test)]
mod tests;
mod words;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hsm_wire::envelope::{self, EnvelopeError, HEADER_LEN, Header};
use serde_json::{Value, json};

use crate::outcome::{self, Failure, Format, Outcome};
use crate::text::{paragraph, table};
use stored::{NotFound, Object, Stored};
use words::Names;

pub(crate) const EXAMPLES: &str = "\
Examples:
  etcdctl get /registry/secrets/default/db | hsmctl kms inspect -
  etcdctl get --print-value-only /registry/secrets/default/db | hsmctl kms inspect - --config /etc/hsm/hsmd.yaml
  hsmctl kms inspect VEhTTQEBAQ... --cluster rciis-production --cluster rciis-staging
  hsmctl kms inspect -o json stored.bin | jq -r .envelope.fingerprint

Taken are an envelope (encryptedDEKSource) and a whole value from etcd, as raw bytes, base64 or
hexadecimal digits.

Exit status: 0 it is an envelope, 1 it is none or damaged, 2 a wrong command line. Whether a tag
or MAC is right only the key can tell.";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Base64 or hexadecimal digits, a file, or `-` for standard input
    #[arg(value_name = "CIPHERTEXT|FILE|-")]
    what: String,
    /// Name of a cluster that may have sealed it; repeatable
    #[arg(long, value_name = "NAME")]
    cluster: Vec<String>,
    /// Configuration whose cluster names may have sealed it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Form of the answer
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

pub(crate) fn run(args: &Args) -> Result<Outcome, Failure> {
    let configured = match &args.config {
        Some(file) => Some(
            hsm_config::load(file)
                .map_err(|errors| Failure::reported(&[errors.report()]))?
                .clusters,
        ),
        None => None,
    };
    let names = Names {
        given: args.cluster.clone(),
        configured,
    };
    let bytes = read(&args.what)?;
    let stored = stored::find(&bytes).map_err(|error| not_found(&error, &args.what))?;
    let found = Found {
        split: envelope::split(&stored.envelope),
        stored: &stored,
        names: &names,
    };
    let out = match args.output {
        Format::Text => found.text(),
        Format::Json => outcome::json(&found.json()),
    };
    Ok(match found.split {
        Ok(_) => Outcome::done(out),
        Err(error) => Outcome::refused(
            out,
            Failure::because(
                "the ciphertext is no envelope of this plugin",
                &error,
                hint(&error),
            ),
        ),
    })
}

fn read(what: &str) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    // One byte more than allowed tells the right size from a longer one.
    let limit = stored::MAX_BYTES as u64 + 1;
    let read = if what == "-" {
        io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else if names_a_file(what) {
        File::open(what).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    } else {
        return Ok(what.as_bytes().to_vec());
    };
    let shown = if what == "-" { "standard input" } else { what };
    read.map_err(|error| Failure::because(&format!("{shown} cannot be read"), &error, None))?;
    if bytes.len() > stored::MAX_BYTES {
        let what = format!("{shown} is longer than {} bytes", stored::MAX_BYTES);
        return Err(Failure::new(
            &what,
            Some("give one value of etcd at a time"),
        ));
    }
    Ok(bytes)
}

/// A file of that name comes before digits that look like it. What begins like a path is none of our
/// envelopes: those begin with `VEhT` or `5448`.
fn names_a_file(what: &str) -> bool {
    what.starts_with(['/', '.']) || Path::new(what).exists()
}

fn not_found(error: &NotFound, what: &str) -> Failure {
    let hint = match error {
        NotFound::Unknown(_) if what != "-" && !names_a_file(what) => Some(
            "there is no file of that name either; give encryptedDEKSource in base64, or `-` and a value from etcd on standard input",
        ),
        NotFound::Nothing | NotFound::Unknown(_) => {
            Some("give encryptedDEKSource, or what `etcdctl get --print-value-only KEY` prints")
        }
        NotFound::Plain => Some(
            "it was written before encryption was configured, or its resource is not listed there; rewrite it once it is",
        ),
        NotFound::OtherProvider(_) => {
            Some("only objects under `k8s:enc:kms:v2:` went through a KMS v2 plugin")
        }
        NotFound::ProviderCut | NotFound::NotAnObject { .. } => {
            Some("a terminal may have changed the bytes; pipe them, or encode them with `base64`")
        }
    };
    Failure::of(error, hint)
}

fn hint(error: &EnvelopeError) -> Option<&'static str> {
    match error {
        EnvelopeError::ForeignFormat => Some(
            "only the plugin that wrote it can open it; see which provider of EncryptionConfiguration that is",
        ),
        EnvelopeError::Version(_) => Some("use the hsmctl and hsmd that wrote it, or later ones"),
        EnvelopeError::Empty
        | EnvelopeError::TooLong(_)
        | EnvelopeError::Truncated(_)
        | EnvelopeError::Trailing(_) => {
            Some("was it copied whole? in etcd it cannot become longer or shorter by itself")
        }
        EnvelopeError::Header(_) | EnvelopeError::PlaintextLen(_) => Some(
            "its bytes were changed after it was written; restore the object from an etcd snapshot",
        ),
    }
}

struct Found<'a> {
    split: Result<(Header, &'a [u8]), EnvelopeError>,
    stored: &'a Stored,
    names: &'a Names,
}

impl Found<'_> {
    fn text(&self) -> String {
        let mut out = String::new();
        if let Some(object) = &self.stored.object {
            out += "object in etcd\n";
            out += &table("  ", &object_rows(object));
        }
        let Ok((header, sealed)) = &self.split else {
            return out;
        };
        let parts: Vec<String> = words::parts(header.wrap, sealed)
            .iter()
            .map(|(name, len)| format!("{name} {len}"))
            .collect();
        out += "envelope\n";
        out += &table(
            "  ",
            &[
                (
                    "size",
                    format!(
                        "{} bytes: header {HEADER_LEN}, {}",
                        self.stored.envelope.len(),
                        parts.join(", ")
                    ),
                ),
                ("version", envelope::VERSION.to_string()),
                (
                    "mechanism",
                    format!(
                        "{}{}",
                        words::mechanism(header.wrap),
                        words::iv(header.wrap)
                    ),
                ),
                ("key", format!("fingerprint {}", header.key)),
                (
                    "MAC key",
                    words::mac_key(header.wrap, sealed)
                        .map_or(String::new(), |mark| format!("mark {mark}")),
                ),
                ("cluster", self.cluster(header)),
                ("plaintext", format!("{} bytes", header.plaintext_len)),
            ],
        );
        out += "to open it\n";
        for need in words::needs(header, sealed, self.names, self.stored.object.as_ref()) {
            out += &paragraph("  - ", &need);
        }
        out
    }

    fn cluster(&self, header: &Header) -> String {
        let tag = header.cluster;
        let all = self.names.all();
        match self.names.of(tag) {
            Some((name, how)) => format!("tag {tag}: {name} ({how})"),
            None if all.is_empty() => format!("tag {tag}"),
            None => format!("tag {tag}: not {}", all.join(", not ")),
        }
    }

    fn json(&self) -> Value {
        let object = self.stored.object.as_ref().map(|object| {
            json!({
                "name": object.name,
                "provider": object.provider,
                "key_id": object.key_id,
                "data_bytes": object.data_len,
                "annotations": object.annotations,
                "source_type": object.source_type,
            })
        });
        let envelope = match &self.split {
            Ok((header, sealed)) => {
                let parts: serde_json::Map<String, Value> = words::parts(header.wrap, sealed)
                    .into_iter()
                    .map(|(name, len)| (name.replace(' ', "_"), json!(len)))
                    .collect();
                json!({
                    "bytes": self.stored.envelope.len(),
                    "version": envelope::VERSION,
                    "mechanism": words::mechanism(header.wrap),
                    "iv": words::iv_mode(header.wrap),
                    "fingerprint": header.key.to_string(),
                    "mac_key": words::mac_key(header.wrap, sealed),
                    "cluster_tag": header.cluster.to_string(),
                    "cluster": self.names.of(header.cluster).map(|(name, _)| name),
                    "plaintext_bytes": header.plaintext_len,
                    "sealed_parts": parts,
                })
            }
            Err(_) => Value::Null,
        };
        let needs = self.split.as_ref().ok().map(|(header, sealed)| {
            words::needs(header, sealed, self.names, self.stored.object.as_ref())
        });
        json!({
            "object": object,
            "envelope": envelope,
            "problem": self.split.as_ref().err().map(ToString::to_string),
            "needs": needs,
        })
    }
}

fn object_rows(object: &Object) -> [(&'static str, String); 6] {
    let source = match object.source_type {
        0 => "a key for AES-GCM (before Kubernetes 1.29)".to_owned(),
        1 => "a seed, from which each write derives its key".to_owned(),
        other => format!("of a kind that is not known here ({other})"),
    };
    [
        ("name", object.name.clone().unwrap_or_default()),
        ("provider", object.provider.clone()),
        ("key_id", object.key_id.clone()),
        ("data", format!("{} bytes", object.data_len)),
        ("annotations", object.annotations.join(", ")),
        ("source", source),
    ]
}
