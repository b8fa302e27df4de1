//! What must hold between the sections, once each of them is right by itself.

use std::path::Path;

use crate::reader::{Complaint, Cursor, Way};
use crate::{Config, Endpoint, tokens};

/// A key on a token that nobody configured would never be found.
pub(super) fn keys_name_configured_tokens(root: &Cursor<'_>, config: &Config) {
    for (index, key) in config.kms.keys.iter().enumerate() {
        if config
            .tokens
            .iter()
            .any(|token| tokens::may_hold(&token.uri, &key.uri))
        {
            continue;
        }
        let way = [
            Way::Name("kms"),
            Way::Name("keys"),
            Way::Index(index),
            Way::Name("uri"),
        ];
        if let Some(cursor) = root.find(&way) {
            let tokens: Vec<String> = config
                .tokens
                .iter()
                .map(|token| format!("`{}` is {}", token.name, token.uri))
                .collect();
            cursor.complain::<()>(
                Complaint::new("the URI's token attributes match no configured token")
                    .hint(tokens.join(", ")),
            );
        }
    }
}

/// Vendor code is not trusted with the node: a host must neither pass as a client nor be shown the
/// files that would let it, whatever the file says.
pub(super) fn hosts_stay_apart(root: &Cursor<'_>, config: &Config) {
    let guarded = guarded(config);
    let procs = [Path::new("/proc"), &config.kms.peers.host_proc];
    for (index, token) in config.tokens.iter().enumerate() {
        let Some(isolation) = &token.launch.isolation else {
            continue;
        };
        let Some(here) = root.find(&[Way::Name("tokens"), Way::Index(index)]) else {
            continue;
        };
        let host = |rest: Way<'_>| here.find(&[Way::Name("host"), rest]);
        if config.kms.peers.uids.contains(&isolation.uid) {
            // The default uid stands nowhere in the file.
            let cursor = host(Way::Name("uid")).unwrap_or_else(|| here.clone());
            cursor.complain::<()>(
                Complaint::new(format!(
                    "host uid {} is a client's (kms.peers.uid): the module could call the socket itself",
                    isolation.uid
                ))
                .hint("give the host a uid that nothing else on the node has"),
            );
        }
        for (field, paths) in [
            ("read_only", &isolation.read_only),
            ("read_write", &isolation.read_write),
        ] {
            let Some(list) = host(Way::Name(field)) else {
                continue;
            };
            for (item, path) in paths.iter().enumerate() {
                let shown = if procs.iter().any(|proc| path.starts_with(proc)) {
                    Some("the processes of the node")
                } else {
                    let found = guarded
                        .iter()
                        .find(|(_, guarded)| guarded.starts_with(path));
                    found.map(|(what, _)| *what)
                };
                if let Some(what) = shown
                    && let Some(cursor) = list.find(&[Way::Index(item)])
                {
                    cursor.complain::<()>(
                        Complaint::new(format!("{} would show the module {what}", path.display()))
                            .hint("name the files that the module needs, not a folder above them"),
                    );
                }
            }
        }
    }
}

/// What no host may see, and so no folder above it.
fn guarded(config: &Config) -> Vec<(&'static str, &Path)> {
    let mut guarded = vec![
        ("kernel settings", Path::new("/sys")),
        ("all devices", Path::new("/dev")),
        ("Talos' configuration files", Path::new("/system/overlays")),
        ("the processes of the node", Path::new("/proc")),
        ("the processes of the node", &config.kms.peers.host_proc),
        // The built-in places, which stay in use where the file names no others.
        ("a client's socket", Path::new("/var/log/audit/kube")),
        ("a client's socket", Path::new("/run/hsm")),
    ];
    for token in &config.tokens {
        guarded.extend(token.pin.source.file().map(|file| ("a PIN", file)));
    }
    for dir in &config.state_dirs {
        guarded.push(("the notes on refused PINs", dir));
    }
    let listen = config.kms.listen.iter().flatten();
    for endpoint in listen.chain(&config.health_listen) {
        if let Endpoint::Path { path, .. } = endpoint {
            guarded.push(("a client's socket", path));
        }
    }
    guarded
}
