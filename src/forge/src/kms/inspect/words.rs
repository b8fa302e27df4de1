//! An envelope's header in words, and what opening it takes.

use hsm_config::ClusterNames;
use hsm_wire::envelope::{GCM_TAG_LEN, Header, IvMode, Mechanism, Wrap};
use hsm_wire::identity::{ClusterTag, hex};

use super::stored::Object;

/// Names of clusters to compare with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    /// From the command line.
    pub(crate) given: Vec<String>,
    /// From a configuration file.
    pub(crate) configured: Option<ClusterNames>,
}

impl Names {
    /// Whose tag it is: the name, and how it is known.
    pub(crate) fn of(&self, tag: ClusterTag) -> Option<(&str, &'static str)> {
        let own = self.configured.iter().map(|names| &names.own);
        let accepted = self.configured.iter().flat_map(|names| &names.accepted);
        own.map(|name| (name, "the configuration's own name"))
            .chain(accepted.map(|name| (name, "in the configuration's accept_clusters")))
            .chain(self.given.iter().map(|name| (name, "as given")))
            .map(|(name, how)| (name.as_str(), how))
            .find(|(name, _)| ClusterTag::of(name) == tag)
    }

    /// Every name, for saying that none of them fits.
    pub(crate) fn all(&self) -> Vec<&str> {
        let configured = self.configured.iter();
        let configured =
            configured.flat_map(|names| [&names.own].into_iter().chain(&names.accepted));
        configured.chain(&self.given).map(String::as_str).collect()
    }
}

/// As the daemon's status names it.
pub(crate) fn mechanism(wrap: Wrap) -> &'static str {
    match wrap.mechanism {
        Mechanism::AesGcm => "AES-GCM",
        Mechanism::AesKwp => "AES-KWP",
        Mechanism::AesCbcHmac => "AES-CBC-PAD + HMAC",
        Mechanism::RsaOaepHmac => "RSA-OAEP + HMAC",
    }
}

/// A word for programs.
pub(crate) fn iv_mode(wrap: Wrap) -> &'static str {
    match wrap.iv_mode {
        IvMode::None => "none",
        IvMode::Caller => "caller",
        IvMode::Returned => "returned",
        IvMode::Appended => "appended",
    }
}

/// Who chose the IV.
pub(crate) fn iv(wrap: Wrap) -> &'static str {
    match (wrap.mechanism, wrap.iv_mode) {
        (Mechanism::AesCbcHmac, _) => ", IV from the token's random numbers",
        (Mechanism::AesKwp | Mechanism::RsaOaepHmac, _) | (_, IvMode::None) => "",
        (_, IvMode::Caller) => ", IV chosen by the daemon",
        (_, IvMode::Returned) => ", IV chosen by the token and returned",
        (_, IvMode::Appended) => ", IV chosen by the token and appended",
    }
}

/// Parts of the sealed bytes, with their lengths.
pub(crate) fn parts(wrap: Wrap, sealed: &[u8]) -> Vec<(&'static str, usize)> {
    let len = sealed.len();
    let around = |front: (&'static str, usize), middle, back: &[(&'static str, usize)]| {
        let outer: usize = front.1 + back.iter().map(|(_, len)| len).sum::<usize>();
        let middle = (middle, len.saturating_sub(outer));
        let all = [front, middle].into_iter().chain(back.iter().copied());
        all.filter(|(_, len)| *len > 0).collect()
    };
    const MAC: [(&str, usize); 2] = [("mark of the MAC key", MARK_LEN), ("MAC", MAC_LEN)];
    match wrap.mechanism {
        Mechanism::AesGcm => {
            let iv = if wrap.iv_mode == IvMode::Appended {
                16
            } else {
                12
            };
            around(("IV", iv), "ciphertext", &[("tag", GCM_TAG_LEN)])
        }
        Mechanism::AesKwp => vec![("wrapped hash and plaintext", len)],
        Mechanism::AesCbcHmac => around(("IV", 16), "ciphertext", &MAC),
        Mechanism::RsaOaepHmac => around(("", 0), "ciphertext", &MAC),
    }
}

const MARK_LEN: usize = 8;
const MAC_LEN: usize = 16;

/// Which key made the MAC, where there is a second key.
pub(crate) fn mac_key(wrap: Wrap, sealed: &[u8]) -> Option<String> {
    if !matches!(
        wrap.mechanism,
        Mechanism::AesCbcHmac | Mechanism::RsaOaepHmac
    ) {
        return None;
    }
    let (rest, _) = sealed.split_last_chunk::<MAC_LEN>()?;
    let (_, mark) = rest.split_last_chunk::<MARK_LEN>()?;
    Some(hex(mark))
}

/// What has to be there to open it, as sentences.
pub(crate) fn needs(
    header: &Header,
    sealed: &[u8],
    names: &Names,
    object: Option<&Object>,
) -> Vec<String> {
    let mut needs = vec![match header.wrap.mechanism {
        Mechanism::RsaOaepHmac => format!(
            "a token that holds the RSA private key with fingerprint {}; `hsmctl kms keys` lists those of a node",
            header.key
        ),
        _ => format!(
            "a token that holds the key with fingerprint {}; `hsmctl kms keys` lists those of a node",
            header.key
        ),
    }];
    if let Some(mark) = mac_key(header.wrap, sealed) {
        needs.push(format!(
            "on the same token, the key for HMAC with the same CKA_ID; its mark is {mark}"
        ));
    }
    let tag = header.cluster;
    needs.push(match (names.of(tag), names.all().as_slice()) {
        (Some((name, "as given")), _) => {
            format!("a daemon whose `cluster` is {name}, or that lists it in accept_clusters")
        }
        (Some((name, how)), _) => format!("the cluster name {name}, which is {how}"),
        (None, []) => format!(
            "a daemon whose `cluster` or accept_clusters has the name behind tag {tag}; --cluster NAME tells whether it is NAME"
        ),
        (None, _) => format!(
            "a daemon whose `cluster` or accept_clusters has the name behind tag {tag}, which is none of those given here"
        ),
    });
    needs.push(match object.map(|object| &object.key_id) {
        Some(key_id) => {
            format!("the key_id that is stored with it, {key_id}: it is authenticated too")
        }
        None => "the key_id that kube-apiserver stored with it: it is authenticated too".to_owned(),
    });
    if object.is_some_and(|object| !object.annotations.is_empty()) {
        needs.push(
            "the object without its annotations: this plugin writes none and refuses them"
                .to_owned(),
        );
    }
    needs
}
