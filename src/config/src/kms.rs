//! The `kms` section: where kube-apiserver finds us, who may call, and which keys seal.

use crate::reader::{Complaint, Cursor};
use crate::values;
use crate::{Endpoint, KeyRule, KeyState, Rules, WhenLost};
use hsm_wire::uri::{ObjectType, Uri};

const MAX_ENDPOINTS: usize = 8;
const MAX_KEYS: usize = 64;
const MAX_UIDS: usize = 16;

/// The KMS v2 face.
#[derive(Debug, Clone, PartialEq)]
pub struct Kms {
    /// In place of the built-in sockets, if the file says so.
    pub listen: Option<Vec<Endpoint>>,
    /// What Status says while the HSM is lost.
    pub when_lost: WhenLost,
    /// Exactly one is active; retired ones have lower epochs, pending ones higher.
    pub keys: Vec<KeyRule>,
    /// Who may call.
    pub peers: Rules,
}

pub(super) fn read(cursor: &Cursor<'_>) -> Option<Kms> {
    let fields = cursor.fields(&["listen", "when_hsm_is_lost", "keys", "peers"])?;
    let listen = fields.optional("listen", listen);
    let when_lost = fields.or("when_hsm_is_lost", WhenLost::default(), |cursor| {
        cursor.word(&[
            ("fail-closed", WhenLost::FailClosed),
            ("coast", WhenLost::Coast),
        ])
    });
    let keys = fields.required(
        "keys",
        "keys: [{uri: pkcs11:token=…;object=…;type=secret-key, epoch: 1, state: active, backup: acknowledged}]",
        keys,
    );
    let peers = fields.or("peers", Rules::default(), peers);
    Some(Kms {
        listen: listen?,
        when_lost: when_lost?,
        keys: keys?,
        peers: peers?,
    })
}

fn listen(cursor: &Cursor<'_>) -> Option<Vec<Endpoint>> {
    let mut seen: Vec<String> = Vec::new();
    cursor.each(1..=MAX_ENDPOINTS, |item| {
        let endpoint = endpoint(item)?;
        // Printed, an endpoint is its place alone: mode and owner do not make it another.
        let place = endpoint.to_string();
        if seen.contains(&place) {
            return item.complain(Complaint::new(format!("{place} is listed twice")));
        }
        seen.push(place);
        Some(endpoint)
    })
}

fn endpoint(cursor: &Cursor<'_>) -> Option<Endpoint> {
    let fields = cursor.fields(&["path", "mode", "owner", "abstract"])?;
    let mode = fields.or("mode", 0o600, values::socket_mode);
    let owner = fields.or("owner", (65534, 65534), values::owner);
    match (fields.get("path"), fields.get("abstract")) {
        (Some(path), None) => {
            let path = values::socket_path(path);
            let (uid, gid) = owner?;
            let built = Endpoint::path(path?, mode?, uid, gid);
            built.map_or_else(
                |cause| cursor.complain(Complaint::new("no socket to listen at").because(cause)),
                Some,
            )
        }
        (None, Some(name)) => {
            for file_only in ["mode", "owner"] {
                if let Some(given) = fields.get(file_only) {
                    given.complain::<()>(
                        Complaint::new("an abstract socket has neither mode nor owner").hint(
                            "its callers are told apart by their cgroup; leave the field out",
                        ),
                    );
                }
            }
            let built = Endpoint::abstract_name(values::abstract_name(name)?);
            built.map_or_else(
                |cause| cursor.complain(Complaint::new("no socket to listen at").because(cause)),
                Some,
            )
        }
        _ => cursor.complain(
            Complaint::new("a socket has either `path` or `abstract`")
                .hint("write {path: /run/hsm/kms.sock} or {abstract: hsm-kms}"),
        ),
    }
}

fn keys(cursor: &Cursor<'_>) -> Option<Vec<KeyRule>> {
    let items = cursor.list(1..=MAX_KEYS)?;
    let read: Vec<Option<KeyRule>> = items.iter().map(key).collect();
    let keys: Vec<KeyRule> = read.into_iter().collect::<Option<_>>()?;
    let mut active: Option<&KeyRule> = None;
    for (index, (item, key)) in items.iter().zip(&keys).enumerate() {
        if let Some(other) = keys[..index].iter().find(|other| other.uri == key.uri) {
            item.complain::<()>(Complaint::new(format!(
                "the key is listed twice: {}",
                other.uri
            )));
        }
        if let Some(other) = keys[..index].iter().find(|other| other.epoch == key.epoch) {
            item.complain::<()>(
                Complaint::new(format!("epoch {} is {}'s already", key.epoch, other.uri))
                    .hint("give each key an epoch of its own: it is part of the key_id"),
            );
        }
        if key.state != KeyState::Active {
            continue;
        }
        match active {
            None => active = Some(key),
            Some(other) => {
                item.complain::<()>(
                    Complaint::new(format!("a second active key, beside {}", other.uri))
                        .hint("exactly one key seals; make the other one `retired`, or this one `pending`"),
                );
            }
        }
    }
    let Some(active) = active else {
        return cursor.complain(
            Complaint::new("no key is active, so nothing could be sealed")
                .hint("set `state: active` for exactly one key"),
        );
    };
    in_order(&items, &keys, active);
    Some(keys)
}

/// Epochs tell the order of activation. This holds within one file, so that going back to an older
/// key cannot slip through while the daemon is restarted and has no running configuration to compare.
fn in_order(items: &[Cursor<'_>], keys: &[KeyRule], active: &KeyRule) {
    for (item, key) in items.iter().zip(keys) {
        let (wrong, hint) = match key.state {
            KeyState::Pending => (
                key.epoch < active.epoch,
                "raise its epoch: a key that is activated later has a higher one",
            ),
            KeyState::Retired => (
                key.epoch > active.epoch,
                "to go back to a former key, give it an epoch higher than every other",
            ),
            KeyState::Active => continue,
        };
        if wrong {
            let order = if key.state == KeyState::Pending {
                "below"
            } else {
                "above"
            };
            item.complain::<()>(
                Complaint::new(format!(
                    "a {} key with epoch {}, {order} the active key's {}",
                    key.state.name(),
                    key.epoch,
                    active.epoch
                ))
                .hint(hint),
            );
        }
    }
}

fn key(cursor: &Cursor<'_>) -> Option<KeyRule> {
    let fields = cursor.fields(&["uri", "epoch", "state", "backup", "allow_rsa_oaep"])?;
    let allow_rsa_oaep = fields.or("allow_rsa_oaep", false, |cursor| cursor.boolean());
    let uri = fields.required(
        "uri",
        "uri: pkcs11:token=…;object=…;type=secret-key",
        // Where the permission itself cannot be read, that is the mistake to report.
        |cursor| key_uri(cursor, allow_rsa_oaep.unwrap_or(true)),
    );
    if let (Some(true), Some(uri), Some(cursor)) =
        (allow_rsa_oaep, &uri, fields.get("allow_rsa_oaep"))
        && uri.object_type != Some(ObjectType::Private)
    {
        return cursor.complain(
            Complaint::new("goes with a URI of `type=private` only")
                .hint("leave it out: a secret key needs no permission"),
        );
    }
    let epoch = fields.required("epoch", "epoch: 1", |cursor| cursor.integer(1..=u32::MAX));
    let state = fields.required("state", "state: pending", |cursor| {
        cursor.word(&[
            ("pending", KeyState::Pending),
            ("active", KeyState::Active),
            ("retired", KeyState::Retired),
        ])
    });
    let backup = fields.optional("backup", |cursor| cursor.word(&[("acknowledged", ())]));
    let backup_acknowledged = backup?.is_some();
    if state == Some(KeyState::Active) && !backup_acknowledged {
        return fields.cursor().complain(
            Complaint::new("the active key needs `backup: acknowledged`").hint(
                "whoever loses the HSM loses every Secret; make sure that a copy of the key exists in a second HSM or a backup, then add the line",
            ),
        );
    }
    Some(KeyRule {
        uri: uri?,
        epoch: epoch?.into(),
        state: state?,
        backup_acknowledged,
        allow_rsa_oaep: allow_rsa_oaep?,
    })
}

fn key_uri(cursor: &Cursor<'_>, allow_rsa_oaep: bool) -> Option<Uri> {
    let uri = values::uri(cursor)?;
    if uri.object.is_none() && uri.id.is_none() {
        return cursor.complain(
            Complaint::new("names no key")
                .hint("add `;object=LABEL` or `;id=%01…`, so that it matches exactly one"),
        );
    }
    match uri.object_type {
        None | Some(ObjectType::SecretKey) => Some(uri),
        Some(ObjectType::Private) if allow_rsa_oaep => Some(uri),
        Some(ObjectType::Private) => cursor.complain(
            Complaint::new("names a private key, which seals by RSA-OAEP only if the rule allows it")
                .hint("use an AES key, `type=secret-key`; where the token can wrap with none, add `allow_rsa_oaep: true` (slower, and the token needs a key for HMAC with the same id)"),
        ),
        Some(_) => cursor.complain(
            Complaint::new("names an object that is no secret key").hint("write `type=secret-key`"),
        ),
    }
}

fn peers(cursor: &Cursor<'_>) -> Option<Rules> {
    let default = Rules::default();
    let fields = cursor.fields(&["uid", "host_proc", "pod_logs"])?;
    let uids = fields.or("uid", default.uids, |cursor| {
        cursor.each(1..=MAX_UIDS, |item| item.integer(0..=u32::MAX - 1))
    });
    let host_proc = fields.or("host_proc", default.host_proc, values::path);
    let pod_logs = fields.or("pod_logs", default.pod_logs, values::path);
    Some(Rules {
        uids: uids?,
        host_proc: host_proc?,
        pod_logs: pod_logs?,
    })
}
