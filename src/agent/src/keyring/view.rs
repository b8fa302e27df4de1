//! What can be done at this moment: the rules of the configuration joined with what the tokens hold.
//!
//! Pure but for reading each token's present state. The keyring makes a new [`View`] whenever a token
//! changes and replaces the old one as a whole.
//!
//! **Ordered tokens.** The first token in the configured order that is up serves. When it goes, the
//! next one that holds the *same* key does; when it comes back, it serves again only after it has
//! stayed for [`HAND_BACK`], so that a link that comes and goes does not drag every call with it.
//! **Same key** means same fingerprint: the first key seen under a rule is the rule's key, and another
//! one under the same label, on whatever token, is refused and reported.

use std::collections::HashMap;
use std::time::Duration;

use hsm_token_client::{State, Token, TokenError};
use hsm_wire::envelope::{self, Header, Wrap};
use hsm_wire::host::{Description, KeyClass, KeyInfo, KeyRef};
use hsm_wire::identity::{self, ClusterTag, Fingerprint, FingerprintPrefix};
use hsm_wire::secret::Secret;
use hsm_wire::uri::{ObjectType, Uri};
use tokio::time::Instant;

use super::{KeyRule, KeyState, NamedToken};

/// How long a token that came back must stay before it serves again.
const HAND_BACK: Duration = Duration::from_secs(30);

/// Shorter RSA keys are not for what must stay secret (SP 800-131A).
const MIN_RSA_BITS: u16 = 2048;

/// The key that seals now.
#[derive(Clone)]
pub(crate) struct Active {
    /// Tokens that hold it: the one that serves, then the others in the configured order.
    pub(super) holders: Vec<Holder>,
    /// What Status and Encrypt report.
    pub(crate) key_id: String,
}

/// A key on a token.
#[derive(Clone)]
pub(super) struct Holder {
    token: Token,
    key: KeyRef,
    /// How it seals.
    wrap: Wrap,
    /// Is there a rule for it?
    pub(super) listed: bool,
}

/// A key that rule or token shows, for health and status.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct KeyReport {
    pub(crate) uri: Option<String>,
    pub(crate) label: String,
    pub(crate) fingerprint: Option<String>,
    pub(crate) state: &'static str,
    pub(crate) epoch: Option<u64>,
    pub(crate) key_id: Option<String>,
    pub(crate) backup: &'static str,
    pub(crate) token: Option<String>,
    pub(crate) mechanism: Option<&'static str>,
    pub(crate) passed_over: Vec<PassedOver>,
    pub(crate) problem: Option<String>,
}

/// A better mechanism, and why the token does not use it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct PassedOver {
    pub(crate) mechanism: &'static str,
    pub(crate) reason: String,
}

/// What was learnt and must outlive a view, and a configuration.
#[derive(Clone, Default)]
pub(super) struct Memory {
    /// The last active `key_id` that a token confirmed; what `coast` goes on reporting.
    pub(super) last_key_id: Option<String>,
    /// Which key a rule means, once one was seen.
    keys: HashMap<Uri, Fingerprint>,
    up_since: HashMap<String, Instant>,
    serving: Option<String>,
}

/// See the module.
pub(super) struct View {
    pub(super) active: Result<Active, String>,
    pub(super) holders: HashMap<FingerprintPrefix, Vec<Holder>>,
    /// Reasons why tokens that may hold further keys are not up.
    pub(super) down: Vec<String>,
    pub(super) reports: Vec<KeyReport>,
}

impl Default for View {
    fn default() -> Self {
        Self {
            active: Err("the tokens have not been looked at yet".to_owned()),
            holders: HashMap::new(),
            down: Vec::new(),
            reports: Vec::new(),
        }
    }
}

impl Holder {
    pub(super) async fn seal(
        &self,
        cluster: ClusterTag,
        key_id: &str,
        plaintext: Secret,
        deadline: Instant,
    ) -> Result<Vec<u8>, TokenError> {
        let header = Header {
            wrap: self.wrap,
            key: self.key.fingerprint.prefix(),
            cluster,
            // The face has checked it against MAX_PLAINTEXT_LEN.
            plaintext_len: plaintext.len() as u32,
        };
        let aad = header.aad(key_id);
        let sealed = self
            .token
            .seal(&self.key, self.wrap, aad, plaintext, deadline)
            .await?;
        Ok(envelope::join(header, &sealed))
    }

    pub(super) async fn open(
        &self,
        header: Header,
        sealed: &[u8],
        key_id: &str,
        deadline: Instant,
    ) -> Result<Secret, TokenError> {
        let aad = header.aad(key_id);
        let (sealed, len) = (sealed.to_vec(), header.plaintext_len);
        self.token
            .unseal(&self.key, header.wrap, aad, sealed, len, deadline)
            .await
    }

    pub(super) async fn probe(&self, deadline: Instant) -> Result<(), TokenError> {
        self.token.probe(&self.key, self.wrap, deadline).await
    }
}

/// A token that is up.
struct Up<'a> {
    named: &'a NamedToken,
    description: std::sync::Arc<Description>,
}

impl View {
    pub(super) fn look(
        cluster: &str,
        rules: &[KeyRule],
        tokens: &[NamedToken],
        memory: &mut Memory,
        now: Instant,
    ) -> Self {
        let mut up = Vec::new();
        let mut view = Self {
            active: Err("no key is active in the configuration".to_owned()),
            ..Self::default()
        };
        let mut starting = false;
        for named in tokens {
            match named.token.state().borrow().clone() {
                State::Up { description, .. } => up.push(Up { named, description }),
                other => {
                    starting |= matches!(other, State::Starting);
                    view.down.push(why_not_up(&named.name, &other));
                }
            }
        }
        memory.put_in_order(&mut up, now);
        for rule in rules {
            let found = find(rule, &up, memory, &view.down, starting);
            let report = report(rule, &found, cluster);
            if rule.state == KeyState::Active {
                view.active = found.and_then(|found| active(rule, &found, cluster));
            }
            view.reports.push(report);
        }
        view.list_holders(rules, &up);
        if let Ok(active) = &view.active {
            memory.last_key_id = Some(active.key_id.clone());
        }
        view
    }

    fn list_holders(&mut self, rules: &[KeyRule], up: &[Up<'_>]) {
        for token in up {
            for info in &token.description.keys {
                let listed = rules.iter().any(|rule| matches(rule, token, info));
                if !listed {
                    self.reports.push(unlisted(token.named, info));
                }
                let holder = token.holder(info, listed);
                let prefix = info.key.fingerprint.prefix();
                self.holders.entry(prefix).or_default().push(holder);
            }
        }
    }
}

impl Memory {
    /// The token that serves first; the others as configured.
    fn put_in_order(&mut self, up: &mut [Up<'_>], now: Instant) {
        self.up_since
            .retain(|name, _| up.iter().any(|token| token.named.name == *name));
        for token in up.iter() {
            let name = token.named.name.clone();
            self.up_since.entry(name).or_insert(now);
        }
        let serving = up
            .iter()
            .position(|token| Some(&token.named.name) == self.serving.as_ref());
        let stayed = |token: &Up<'_>| {
            let since = self.up_since.get(&token.named.name);
            since.is_some_and(|since| now.duration_since(*since) >= HAND_BACK)
        };
        let first = match serving {
            Some(serving) => up[..serving].iter().position(stayed).unwrap_or(serving),
            None => 0,
        };
        if let Some(chosen) = up.get(first) {
            if self.serving.is_some() && self.serving.as_ref() != Some(&chosen.named.name) {
                tracing::warn!(token = chosen.named.name, "another token serves now");
            }
            self.serving = Some(chosen.named.name.clone());
            up[..=first].rotate_right(1);
        }
    }
}

impl Up<'_> {
    fn holder(&self, info: &KeyInfo, listed: bool) -> Holder {
        Holder {
            token: self.named.token.clone(),
            key: info.key.clone(),
            // Opening goes by the envelope's header; only a key that can seal becomes active.
            wrap: info.wrap.as_ref().copied().unwrap_or(Wrap::AES_GCM),
            listed,
        }
    }
}

/// A rule's key, on every token that holds it.
struct Found<'a> {
    on: Vec<(&'a Up<'a>, &'a KeyInfo)>,
    /// Tokens that hold another key under the rule's name.
    others: Vec<String>,
}

fn find<'a>(
    rule: &KeyRule,
    up: &'a [Up<'a>],
    memory: &mut Memory,
    down: &[String],
    starting: bool,
) -> Result<Found<'a>, String> {
    let mut on: Vec<(&Up<'_>, &KeyInfo)> = Vec::new();
    let mut others = Vec::new();
    // Which key the rule means is learnt from the first token; it must have had its chance.
    if starting && !memory.keys.contains_key(&rule.uri) {
        return Err(down.join("; "));
    }
    for token in up {
        let keys = &token.description.keys;
        let matching: Vec<_> = keys
            .iter()
            .filter(|info| matches(rule, token, info))
            .collect();
        let info = match matching[..] {
            [] => continue,
            [info] => info,
            _ => {
                return Err(format!(
                    "{} matches {} keys on token `{}`; add `id=` to the URI so that it names exactly one",
                    rule.uri,
                    matching.len(),
                    token.named.name
                ));
            }
        };
        let seen = info.key.fingerprint;
        let meant = *memory.keys.entry(rule.uri.clone()).or_insert(seen);
        if seen == meant {
            on.push((token, info));
        } else {
            others.push(format!(
                "token `{}` holds another key under {}: its fingerprint is {}, not {}",
                token.named.name,
                rule.uri,
                seen.prefix(),
                meant.prefix()
            ));
        }
    }
    if !on.is_empty() {
        return Ok(Found { on, others });
    }
    // The better reason first: a key that is another one, then a token that is away.
    Err(if !others.is_empty() {
        others.join("; ")
    } else if !down.is_empty() {
        down.join("; ")
    } else {
        let seen: Vec<_> = up
            .iter()
            .map(|token| labels(&token.named.name, &token.description.keys))
            .collect();
        let hint = if rule.allow_rsa_oaep {
            "; an RSA key counts only where it may decrypt and a key for HMAC has the same CKA_ID"
        } else {
            ""
        };
        format!("no key matches {}: {}{hint}", rule.uri, seen.join("; "))
    })
}

fn active(rule: &KeyRule, found: &Found<'_>, cluster: &str) -> Result<Active, String> {
    let mut holders = Vec::new();
    let mut problem = None;
    for (token, info) in &found.on {
        match usable(info) {
            Ok(_) => holders.push(token.holder(info, true)),
            Err(reason) => problem = problem.or(Some(reason)),
        }
    }
    match (holders.is_empty(), problem) {
        (true, Some(problem)) => Err(problem),
        _ => Ok(Active {
            holders,
            key_id: key_id(rule, found, cluster),
        }),
    }
}

fn key_id(rule: &KeyRule, found: &Found<'_>, cluster: &str) -> String {
    // All of them are the same key.
    let fingerprint = found.on[0].1.key.fingerprint;
    identity::key_id(&fingerprint, rule.epoch, cluster)
}

fn report(rule: &KeyRule, found: &Result<Found<'_>, String>, cluster: &str) -> KeyReport {
    let first = found.as_ref().ok().map(|found| found.on[0].1);
    KeyReport {
        uri: Some(rule.uri.to_string()),
        label: rule.uri.object.clone().unwrap_or_default(),
        fingerprint: first.map(|info| info.key.fingerprint.prefix().to_string()),
        state: rule.state.name(),
        epoch: Some(rule.epoch),
        key_id: found
            .as_ref()
            .ok()
            .map(|found| key_id(rule, found, cluster)),
        backup: if rule.backup_acknowledged {
            "acknowledged"
        } else {
            "not acknowledged"
        },
        token: found.as_ref().ok().map(|found| {
            let names: Vec<_> = found
                .on
                .iter()
                .map(|(up, _)| up.named.name.as_str())
                .collect();
            names.join(", ")
        }),
        mechanism: first.and_then(mechanism_name),
        passed_over: first.map(passed_over).unwrap_or_default(),
        problem: match found {
            Ok(found) if !found.others.is_empty() => Some(found.others.join("; ")),
            Ok(found) => usable(found.on[0].1).err(),
            Err(reason) => Some(reason.clone()),
        },
    }
}

fn unlisted(named: &NamedToken, info: &KeyInfo) -> KeyReport {
    KeyReport {
        uri: None,
        label: info.key.label.clone(),
        fingerprint: Some(info.key.fingerprint.prefix().to_string()),
        state: "unlisted",
        epoch: None,
        key_id: None,
        backup: "unknown",
        token: Some(named.name.clone()),
        mechanism: mechanism_name(info),
        passed_over: passed_over(info),
        problem: None,
    }
}

fn mechanism_name(info: &KeyInfo) -> Option<&'static str> {
    info.wrap.as_ref().ok().and_then(|wrap| wrap.name())
}

fn passed_over(info: &KeyInfo) -> Vec<PassedOver> {
    let better = info.passed_over.iter();
    better
        .map(|better| PassedOver {
            mechanism: better.wrap.name().unwrap_or("unknown"),
            reason: better.reason.clone(),
        })
        .collect()
}

fn matches(rule: &KeyRule, token: &Up<'_>, info: &KeyInfo) -> bool {
    // The slot is the token's business: a key's URI may repeat the token's `slot-id`.
    (rule.uri.slot_id.is_none() || rule.uri.slot_id == token.named.uri.slot_id)
        && rule.uri.matches_token(&token.description.token, None)
        && matches_key(rule, info)
}

fn matches_key(rule: &KeyRule, info: &KeyInfo) -> bool {
    let KeyRef { label, id, .. } = &info.key;
    match info.class {
        KeyClass::Secret => rule.uri.matches_secret_key(label, id),
        // Never by chance: everything that opens then takes an RSA operation.
        KeyClass::Private => {
            rule.allow_rsa_oaep
                && rule.uri.object_type == Some(ObjectType::Private)
                && rule.uri.object.as_ref().is_none_or(|is| is == label)
                && rule.uri.id.as_ref().is_none_or(|is| is == id)
        }
    }
}

/// A KEK must never have been readable outside the HSM, and must have a wrap that works.
fn usable(info: &KeyInfo) -> Result<Wrap, String> {
    let label = &info.key.label;
    if !info.sensitive {
        return Err(format!(
            "key `{label}` is not CKA_SENSITIVE: its value can be read; generate a new one"
        ));
    }
    if info.extractable {
        return Err(format!(
            "key `{label}` is CKA_EXTRACTABLE; generate a new one that is not"
        ));
    }
    if !info.never_extractable {
        return Err(format!(
            "key `{label}` is not CKA_NEVER_EXTRACTABLE: it was imported or once extractable; generate it inside the HSM"
        ));
    }
    if info.class == KeyClass::Private && info.bits < MIN_RSA_BITS {
        return Err(format!(
            "key `{label}` is an RSA key of {} bits; generate one of {MIN_RSA_BITS} or more",
            info.bits
        ));
    }
    info.wrap
        .as_ref()
        .copied()
        .map_err(|reason| format!("key `{label}` cannot wrap: {reason}"))
}

fn labels(token: &str, keys: &[KeyInfo]) -> String {
    if keys.is_empty() {
        return format!("token `{token}` holds no AES key");
    }
    let labels: Vec<_> = keys
        .iter()
        .map(|info| format!("`{}`", info.key.label))
        .collect();
    format!("token `{token}` holds {}", labels.join(", "))
}

fn why_not_up(name: &str, state: &State) -> String {
    match state {
        State::Starting => format!("token `{name}` is starting"),
        State::Up { .. } => format!("token `{name}` is up"),
        State::Down { reason, .. } => format!("token `{name}` is down: {reason}"),
        State::Latched { reason, .. } => format!("token `{name}` is latched: {reason}"),
    }
}

#[cfg(test)]
mod tests;
