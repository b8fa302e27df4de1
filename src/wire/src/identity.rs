//! Names that are derived, never chosen: fingerprint of a key, tag of a cluster, `key_id`.
//!
//! All three are SHA-256 over a domain string and the parts, each part with its length in front, so
//! that no two different inputs give the same bytes to hash. None is secret.

use std::fmt;

use sha2::{Digest, Sha256};

/// The block that a key encrypts (or MACs) to show which key it is.
///
/// One AES block, non-zero: the encryption of the zero block is GHASH's key, and `CKA_CHECK_VALUE`
/// would give away its first bytes. Read as a GCM counter block, its counter is 0x65792021, far
/// above any counter that sealing [`crate::envelope::MAX_PLAINTEXT_LEN`] bytes reaches.
pub const FINGERPRINT_BLOCK: [u8; 16] = *b"talos-hsm  key !";

/// How the token computed the block's image. It is part of the hash: the two differ for one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FingerprintMethod {
    /// AES-CMAC (SP 800-38B) of the block.
    Cmac,
    /// AES-ECB of the block, where the key or token has no CMAC.
    Ecb,
}

/// Tells one key from every other, wherever it lies and whatever its label.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

/// The part of a fingerprint that fits into an envelope.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FingerprintPrefix(pub [u8; 8]);

/// Stands for the cluster's name in an envelope.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterTag(pub [u8; 8]);

impl Fingerprint {
    /// Of a symmetric key, from what the token answered for [`FINGERPRINT_BLOCK`].
    pub fn of_block_image(method: FingerprintMethod, image: &[u8; 16]) -> Self {
        let method: &[u8] = match method {
            FingerprintMethod::Cmac => b"cmac",
            FingerprintMethod::Ecb => b"ecb",
        };
        Self(hash(b"talos-hsm fingerprint v1", &[method, image]))
    }

    /// The first 8 bytes.
    pub fn prefix(&self) -> FingerprintPrefix {
        let mut out = [0; 8];
        out.copy_from_slice(&self.0[..8]);
        FingerprintPrefix(out)
    }
}

impl ClusterTag {
    /// Of a cluster's configured name.
    pub fn of(cluster: &str) -> Self {
        let full = hash(b"talos-hsm cluster v1", &[cluster.as_bytes()]);
        let mut out = [0; 8];
        out.copy_from_slice(&full[..8]);
        Self(out)
    }
}

/// The `key_id` that Status and Encrypt report: 32 lower-case hex digits.
///
/// It changes with key, epoch and cluster, and can be computed on every node without asking any
/// other: nodes that disagree show different ids in the API server's metrics.
pub fn key_id(fingerprint: &Fingerprint, epoch: u64, cluster: &str) -> String {
    let full = hash(
        b"talos-hsm key-id v1",
        &[&fingerprint.0, &epoch.to_be_bytes(), cluster.as_bytes()],
    );
    hex(&full[..16])
}

fn hash(domain: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in std::iter::once(&domain).chain(parts) {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// Lower-case hex digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
            // Writing to a String cannot fail.
            let _ = write!(out, "{byte:02x}");
            out
        })
}

macro_rules! shown_as_hex {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex(&self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    )*};
}

shown_as_hex!(Fingerprint, FingerprintPrefix, ClusterTag);
