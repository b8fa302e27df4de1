//! The envelope: what kube-apiserver stores as `encryptedDEKSource` beside every object in etcd.
//!
//! ```text
//! offset  size  field
//!      0     4  magic "THSM"
//!      4     1  format version, 1
//!      5     1  mechanism            (Mechanism)
//!      6     1  IV mode              (IvMode)
//!      7     1  reserved, 0
//!      8     8  key fingerprint, first 8 bytes  (identity::Fingerprint)
//!     16     8  cluster tag                     (identity::cluster_tag)
//!     24     4  plaintext length in bytes, big-endian
//!     28     –  sealed: nonce, ciphertext, tag, as the mechanism lays them out
//! ```
//!
//! The header is in clear and authenticated: the AAD of the seal is the header followed by the
//! `key_id` that the API server keeps beside the envelope. So "another cluster", "unknown key" and
//! "tampered" are three different findings, and none of them needs the HSM but the last.
//!
//! These bytes bind every later version: a Secret written today must open in ten years.

use thiserror::Error;

use crate::cursor::{MalformedError, Reader, Writer};
use crate::identity::{ClusterTag, Fingerprint, FingerprintPrefix};

/// First bytes of every envelope.
pub const MAGIC: [u8; 4] = *b"THSM";
/// The only format version that exists.
pub const VERSION: u8 = 1;
/// Bytes in the header.
pub const HEADER_LEN: usize = 28;
/// Longest envelope kube-apiserver accepts (its `encryptedDEKSource` limit, inclusive).
pub const MAX_LEN: usize = 1024;
/// Longest plaintext that may be sealed. The API server sends 32 bytes; 512 leaves room for any
/// seed it may choose and keeps every envelope under [`MAX_LEN`].
pub const MAX_PLAINTEXT_LEN: usize = 512;
/// Bytes of the IV in front of an AES-GCM ciphertext whose IV the caller knows.
pub const GCM_IV_LEN: usize = 12;
/// Bytes of the IV in front of an AES-GCM ciphertext whose IV the token appended.
pub const GCM_APPENDED_IV_LEN: usize = 16;
/// Bytes of the tag behind an AES-GCM ciphertext.
pub const GCM_TAG_LEN: usize = 16;
/// Bytes of SHA-256(AAD), which AES-KWP seals in front of the plaintext.
pub const AAD_DIGEST_LEN: usize = 32;
/// Bytes of the IV in front of an AES-CBC ciphertext.
pub const CBC_IV_LEN: usize = 16;
/// Bytes that tell which key made the MAC.
pub const MAC_MARK_LEN: usize = 8;
/// Bytes of the MAC, the end of the sealed part.
pub const MAC_LEN: usize = 16;
/// Longest `key_id` the API server keeps.
pub const MAX_KEY_ID_LEN: usize = 1024;

/// How the plaintext was sealed. The number is on disk for ever: never reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mechanism {
    /// AES-GCM with a 96-bit IV and a 128-bit tag (SP 800-38D; PKCS#11 `CKM_AES_GCM`).
    AesGcm = 1,
    /// AES-KWP by `C_WrapKey`/`C_UnwrapKey` (SP 800-38F) of SHA-256(AAD) ‖ plaintext.
    AesKwp = 2,
    /// AES-CBC-PAD, then HMAC-SHA-256 with a second key: IV ‖ ciphertext ‖ mark of that key ‖ the
    /// first half of the HMAC over AAD ‖ IV ‖ ciphertext.
    AesCbcHmac = 3,
    /// RSA-OAEP, then HMAC-SHA-256 with a second key: a byte for OAEP's hash (1 SHA-256, 2 SHA-1) ‖
    /// ciphertext ‖ mark of that key ‖ the first half of the HMAC over AAD ‖ all before the mark.
    RsaOaepHmac = 4,
}

/// Who chose the IV and where it lies in the sealed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum IvMode {
    /// The mechanism has none.
    None = 0,
    /// We chose it (random bytes of the token); it comes first, 12 bytes for GCM and 16 for CBC.
    Caller = 1,
    /// The token chose it and wrote it back through the parameter (AWS CloudHSM); first 12 bytes.
    Returned = 2,
    /// The token chose 16 bytes and appended them to the ciphertext (Luna in FIPS mode). Stored first,
    /// as the others.
    Appended = 3,
}

/// A mechanism together with its IV mode: what the host needs to know to seal or unseal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Wrap {
    /// How.
    pub mechanism: Mechanism,
    /// With whose IV.
    pub iv_mode: IvMode,
}

impl Wrap {
    /// AES-GCM with an IV of ours.
    pub const AES_GCM: Self = Self {
        mechanism: Mechanism::AesGcm,
        iv_mode: IvMode::Caller,
    };

    /// AES-GCM with an IV that the token writes back.
    pub const AES_GCM_RETURNED: Self = Self {
        mechanism: Mechanism::AesGcm,
        iv_mode: IvMode::Returned,
    };
    /// AES-GCM with an IV that the token appends.
    pub const AES_GCM_APPENDED: Self = Self {
        mechanism: Mechanism::AesGcm,
        iv_mode: IvMode::Appended,
    };
    /// AES-KWP.
    pub const AES_KWP: Self = Self {
        mechanism: Mechanism::AesKwp,
        iv_mode: IvMode::None,
    };
    /// AES-CBC-PAD and HMAC.
    pub const AES_CBC_HMAC: Self = Self {
        mechanism: Mechanism::AesCbcHmac,
        iv_mode: IvMode::Caller,
    };
    /// RSA-OAEP and HMAC.
    pub const RSA_OAEP_HMAC: Self = Self {
        mechanism: Mechanism::RsaOaepHmac,
        iv_mode: IvMode::None,
    };

    /// Its name, for people; None for a pair that nothing writes.
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::AES_GCM => "AES-GCM",
            Self::AES_GCM_RETURNED => "AES-GCM with an IV that the token returns",
            Self::AES_GCM_APPENDED => "AES-GCM with an IV that the token appends",
            Self::AES_KWP => "AES-KWP",
            Self::AES_CBC_HMAC => "AES-CBC-PAD + HMAC",
            Self::RSA_OAEP_HMAC => "RSA-OAEP + HMAC",
            _ => return None,
        })
    }

    /// Reads the two bytes of a header or host message.
    pub fn from_bytes([mechanism, iv_mode]: [u8; 2]) -> Result<Self, MalformedError> {
        let mechanism = match mechanism {
            1 => Mechanism::AesGcm,
            2 => Mechanism::AesKwp,
            3 => Mechanism::AesCbcHmac,
            4 => Mechanism::RsaOaepHmac,
            _ => return Err(MalformedError::Value("mechanism")),
        };
        let iv_mode = match iv_mode {
            0 => IvMode::None,
            1 => IvMode::Caller,
            2 => IvMode::Returned,
            3 => IvMode::Appended,
            _ => return Err(MalformedError::Value("IV mode")),
        };
        Ok(Self { mechanism, iv_mode })
    }

    /// The two bytes of a header or host message.
    pub fn to_bytes(self) -> [u8; 2] {
        [self.mechanism as u8, self.iv_mode as u8]
    }

    /// Length of the sealed part for a plaintext of this length, where the layout fixes it.
    pub fn sealed_len(self, plaintext_len: u32) -> Option<usize> {
        let len = plaintext_len as usize;
        match self {
            Self::AES_GCM | Self::AES_GCM_RETURNED => Some(GCM_IV_LEN + len + GCM_TAG_LEN),
            Self::AES_GCM_APPENDED => Some(GCM_APPENDED_IV_LEN + len + GCM_TAG_LEN),
            // Whole blocks of 8 bytes and one more (RFC 5649 section 4.1).
            Self::AES_KWP => Some((AAD_DIGEST_LEN + len).next_multiple_of(8) + 8),
            Self::AES_CBC_HMAC => {
                let padded = (len + 1).next_multiple_of(16);
                Some(CBC_IV_LEN + padded + MAC_MARK_LEN + MAC_LEN)
            }
            // RSA-OAEP's is the modulus'; the others nothing writes.
            _ => None,
        }
    }
}

/// The clear part of an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How it was sealed.
    pub wrap: Wrap,
    /// Which key sealed it.
    pub key: FingerprintPrefix,
    /// For which cluster.
    pub cluster: ClusterTag,
    /// Bytes of the plaintext.
    pub plaintext_len: u32,
}

/// Why bytes are not an envelope of ours. Each is the stored data's fault, never the HSM's.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum EnvelopeError {
    /// No bytes.
    #[error("ciphertext is empty")]
    Empty,
    /// Longer than the API server can ever have stored.
    #[error("ciphertext has {0} bytes, over the limit of {MAX_LEN}")]
    TooLong(usize),
    /// Too short for a header and the sealed part that it announces.
    #[error("ciphertext has {0} bytes and is cut short")]
    Truncated(usize),
    /// Longer than the sealed part that the header announces.
    #[error("ciphertext has {0} bytes more than its header announces")]
    Trailing(usize),
    /// Another plugin's data, or none of ours.
    #[error("ciphertext does not begin with the magic of this plugin: another KMS plugin wrote it")]
    ForeignFormat,
    /// A later version wrote it.
    #[error("ciphertext has format version {0}, this daemon reads only {VERSION}")]
    Version(u8),
    /// A mechanism or IV mode that does not exist, or a set reserved byte.
    #[error("ciphertext header is damaged")]
    Header(#[source] MalformedError),
    /// The length in the header cannot be.
    #[error(
        "ciphertext header claims a plaintext of {0} bytes, over the limit of {MAX_PLAINTEXT_LEN}"
    )]
    PlaintextLen(u32),
}

impl Header {
    /// The 28 bytes.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[5..7].copy_from_slice(&self.wrap.to_bytes());
        out[8..16].copy_from_slice(&self.key.0);
        out[16..24].copy_from_slice(&self.cluster.0);
        out[24..28].copy_from_slice(&self.plaintext_len.to_be_bytes());
        out
    }

    /// What the seal authenticates: the header, then the API server's `key_id` for the object.
    pub fn aad(self, key_id: &str) -> Vec<u8> {
        let mut aad = Vec::with_capacity(HEADER_LEN + key_id.len());
        aad.extend_from_slice(&self.to_bytes());
        aad.extend_from_slice(key_id.as_bytes());
        aad
    }
}

/// Puts header and sealed part together.
pub fn join(header: Header, sealed: &[u8]) -> Vec<u8> {
    let mut writer = Writer::with_capacity(HEADER_LEN + sealed.len());
    writer.put(&header.to_bytes()).put(sealed);
    writer.finish().to_vec()
}

/// Takes an envelope apart. Checks form and limits only; who may open it is the keyring's question.
pub fn split(envelope: &[u8]) -> Result<(Header, &[u8]), EnvelopeError> {
    let len = envelope.len();
    if len == 0 {
        return Err(EnvelopeError::Empty);
    }
    if len > MAX_LEN {
        return Err(EnvelopeError::TooLong(len));
    }
    let seen = &envelope[..len.min(MAGIC.len())];
    if seen != &MAGIC[..seen.len()] {
        return Err(EnvelopeError::ForeignFormat);
    }
    if len <= HEADER_LEN {
        return Err(EnvelopeError::Truncated(len));
    }
    let mut reader = Reader::new(&envelope[MAGIC.len()..]);
    let header = read_fields(&mut reader)?;
    if header.plaintext_len as usize > MAX_PLAINTEXT_LEN {
        return Err(EnvelopeError::PlaintextLen(header.plaintext_len));
    }
    let sealed = reader.rest();
    // Found here, a cut envelope is told from a tampered one, and costs no HSM operation.
    match header.wrap.sealed_len(header.plaintext_len) {
        Some(announced) if sealed.len() < announced => Err(EnvelopeError::Truncated(len)),
        Some(announced) if sealed.len() > announced => {
            Err(EnvelopeError::Trailing(sealed.len() - announced))
        }
        _ => Ok((header, sealed)),
    }
}

fn read_fields(reader: &mut Reader<'_>) -> Result<Header, EnvelopeError> {
    let version = reader.u8("version").map_err(EnvelopeError::Header)?;
    if version != VERSION {
        return Err(EnvelopeError::Version(version));
    }
    let fields = |reader: &mut Reader<'_>| {
        let wrap = Wrap::from_bytes(reader.array("mechanism")?)?;
        if reader.u8("reserved byte")? != 0 {
            return Err(MalformedError::Value("reserved byte"));
        }
        Ok(Header {
            wrap,
            key: FingerprintPrefix(reader.array("key fingerprint")?),
            cluster: ClusterTag(reader.array("cluster tag")?),
            plaintext_len: reader.u32("plaintext length")?,
        })
    };
    fields(reader).map_err(EnvelopeError::Header)
}

impl From<&Fingerprint> for FingerprintPrefix {
    fn from(fingerprint: &Fingerprint) -> Self {
        fingerprint.prefix()
    }
}
